//! RESULTS.md: the rows, their targets, and the medians of all columns.

use std::fmt::Write;

use crate::figures::{Disturbance, Figures, GENBLK, RowResult};
use crate::medium::Medium;
use crate::rows::{Against, Row};

/// A number with three significant digits.
pub fn show(value: Option<f64>) -> String {
    match value {
        None => "-".to_string(),
        Some(value) if value >= 1e6 => format!("{:.2} M", value / 1e6),
        Some(value) if value >= 1e4 => format!("{:.0} k", value / 1e3),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

/// A Markdown table that is aligned as plain text, too.
pub fn table(head: &[String], lines: &[Vec<String>]) -> String {
    let widths: Vec<usize> = (0..head.len())
        .map(|at| lines.iter().chain([&head.to_vec()]).map(|line| line[at].len()).max().unwrap_or(0))
        .collect();
    let line = |cells: &[String]| {
        let cells: Vec<String> = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
    line(head) + &line(&rule) + &lines.iter().map(|cells| line(cells)).collect::<String>()
}

/// A Markdown list.
pub fn bullets(items: &[String]) -> String {
    items.iter().map(|item| format!("- {item}\n")).collect()
}

fn words(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_string()).collect()
}

/// One line for each target.
pub fn targets(results: &[RowResult<'_>]) -> String {
    let mut lines = Vec::new();
    for result in results {
        for target in &result.row.targets {
            let measure = result.row.measures[target.measure];
            let constant = target.against == Against::Constant;
            let reference =
                if constant { Some(target.factor) } else { result.reference(target.measure, target.against) };
            let sign = if measure.higher_is_better() { ">=" } else { "<=" };
            let times = if constant { "" } else { " x" };
            let (value, met) = match result.verdict(target) {
                Some((value, met)) => (format!("{}{times}", show(Some(value))), if met { "yes" } else { "**no**" }),
                None => ("-".to_string(), "not run"),
            };
            lines.push(vec![
                result.row.key.to_string(),
                measure.name().to_string(),
                show(result.median(GENBLK, target.measure)),
                target.against.name().to_string(),
                show(reference),
                value,
                format!("{sign} {}{times}", target.factor),
                met.to_string(),
            ]);
        }
    }
    let head = ["row", "measure", "genblk", "compared with", "its value", "genblk is", "target", "met"];
    table(&words(&head), &lines)
}

/// How many targets are met, and how many were measured.
fn score(results: &[RowResult<'_>]) -> (usize, usize) {
    let verdicts = results.iter().flat_map(|result| result.row.targets.iter().filter_map(|t| result.verdict(t)));
    verdicts.fold((0, 0), |(met, measured), (_, good)| (met + usize::from(good), measured + 1))
}

/// The medians of all columns.
pub fn medians(columns: &[String], results: &[RowResult<'_>]) -> String {
    let mut lines = Vec::new();
    for result in results {
        for (at, measure) in result.row.measures.iter().enumerate() {
            let row = [result.row.key.to_string(), measure.name().to_string()];
            let medians = columns.iter().map(|column| show(result.median(column, at)));
            lines.push(row.into_iter().chain(medians).collect());
        }
    }
    let head: Vec<String> = words(&["row", "measure"]).into_iter().chain(columns.iter().cloned()).collect();
    table(&head, &lines)
}

/// genblk compared with another build of itself; empty if there was none.
pub fn compared_with_base(results: &[RowResult<'_>]) -> String {
    let mut lines = Vec::new();
    for result in results {
        for (at, measure) in result.row.measures.iter().enumerate() {
            let Some(ratio) = result.ratio(at, Against::Base) else { continue };
            let better = if measure.higher_is_better() { "more is better" } else { "less is better" };
            lines.push(vec![
                result.row.key.to_string(),
                measure.name().to_string(),
                show(result.median(GENBLK, at)),
                show(result.reference(at, Against::Base)),
                format!("{ratio:.3} x"),
                better.to_string(),
            ]);
        }
    }
    if lines.is_empty() {
        return String::new();
    }
    table(&words(&["row", "measure", "genblk", "base", "genblk is", ""]), &lines)
}

/// What could not be measured, and why.
pub fn not_measured(results: &[RowResult<'_>]) -> String {
    let lines = |result: &RowResult<'_>| -> String {
        result.figures.not_measured.iter().map(|reason| format!("- {}: {reason}\n", result.row.key)).collect()
    };
    results.iter().map(lines).collect()
}

impl Disturbance {
    /// A line of the report: a run that was disturbed says so itself.
    pub fn describe(self) -> String {
        let Self { rounds, disturbed_rounds, mean_percent } = self;
        let warning = if disturbed_rounds * 10 > rounds {
            " **This run was disturbed: its rows with polling mean nothing.**"
        } else {
            ""
        };
        format!(
            "Other processes used {mean_percent:.0} % of the CPU time before the rounds, and more than 10 % before \
             {disturbed_rounds} of {rounds}.{warning}"
        )
    }
}

const ABOUT: &str = "\
# genblk compared with other servers and the limit of the machine

`make bench` writes this file. Compare numbers only within one run: they depend on the machine, and on its state.
";

const LEGEND: &str = "\
- The **limit** approximates the best that this machine can do. Cached rows: a copy server, which uses genblk's
  virtqueue code and only copies between the guest and a buffer. Cold rows: the lower of genblk with all data cached,
  and io_uring with O_DIRECT on the device. genblk can exceed it: [bottlenecks.md](bottlenecks.md) compares the two.
- A **peer** is another server: qemu-storage-daemon (qsd) in three configurations, and those given with `--peer`. The
  best peer is chosen for each round. A server whose FLUSH completes before the data is on the device is left out of
  every row with a FLUSH, because it does less work.
- A **ratio** (\"genblk is\") is the median of the rounds' ratios, so it can differ from the ratio of the medians.
";

/// The whole report. `notes` has a section for each row whose bottleneck is known; the report quotes those of the rows
/// that miss a target.
pub fn document(figures: &Figures, results: &[RowResult<'_>], notes: &str) -> String {
    let machine = bullets(&figures.machine) + &bullets(&[figures.disturbance.describe()]);
    let (met, measured) = score(results);
    let mut text = format!(
        "{ABOUT}\n{machine}\n![genblk compared with the best other server of each row](results.svg)\n\n\
         ## Rows\n\n{}\n## Targets\n\n{met} of the {measured} measured targets are met.\n\n{}\n{LEGEND}",
        describe_rows(results),
        targets(results)
    );
    let _ = write!(text, "\n## Medians\n\n{}", medians(&figures.columns, results));
    let not_measured = not_measured(results);
    if !not_measured.is_empty() {
        let _ = write!(text, "\nNot measured:\n\n{not_measured}");
    }
    let missed = results.iter().filter(|result| result.misses());
    let missed: Vec<String> = missed.filter_map(|result| note(notes, result.row)).collect();
    if !missed.is_empty() {
        let _ = write!(text, "\n## Why rows miss their targets\n\n{}", missed.join("\n"));
    }
    text
}

/// What each row does, by medium.
fn describe_rows(results: &[RowResult<'_>]) -> String {
    let mut text = String::new();
    for group in results.chunk_by(|a, b| a.row.medium.title() == b.row.medium.title()) {
        let _ = writeln!(text, "**{}**\n", group[0].row.medium.title());
        for RowResult { row, .. } in group {
            let separator = if row.conditions.is_empty() { "" } else { "; " };
            let _ = writeln!(text, "- `{}`: {}{separator}{}", row.key, row.title, row.conditions);
        }
        text += "\n";
    }
    text.truncate(text.trim_end().len());
    text + "\n"
}

/// The section of a row.
fn note(notes: &str, row: &Row) -> Option<String> {
    let section = notes.split("\n## ").skip(1).find(|section| section.lines().next() == Some(row.key))?;
    let body = section.split_once('\n')?.1.trim();
    Some(format!("### {}\n\n{body}\n", row.key))
}

impl Medium {
    /// A heading for the rows on this medium.
    pub fn title(self) -> &'static str {
        match self {
            Self::Memory => "Cached: all data is in memory",
            Self::Disk => "Cold: a fast disk",
            Self::SlowDisk(_) => "A throttled disk",
        }
    }
}

impl Against {
    pub fn name(self) -> &'static str {
        match self {
            Self::Limit => "limit",
            Self::Peers => "best peer",
            Self::Qemu => "best of qsd",
            Self::Named(name) => name,
            Self::Volatile => "survive=never",
            Self::Base => "base",
            Self::Constant => "a constant",
        }
    }
}
