//! What came of a run: medians, ratios paired round by round, and whether the targets were reached.

use std::collections::BTreeSet;
use std::fmt::Write;

use crate::compare::{Column, Measured, Role};
use crate::rows::{Against, Target};

impl Measured {
    fn higher_is_better(&self, measure: usize) -> bool {
        self.row.measures[measure].higher_is_better()
    }

    /// genblk's numbers, by round; not a number where there is none.
    fn ours(&self, measure: usize) -> Vec<f64> {
        self.columns.iter().find(|c| c.entrant.role == Role::Genblk).map(|c| numbers(c, measure)).unwrap_or_default()
    }

    /// The best, or for a bound the lowest, number of those columns in each round.
    fn reference(&self, measure: usize, against: Against) -> Vec<f64> {
        let counts = |column: &&Column| match (against, column.entrant.role) {
            (Against::Limit, Role::Bound) | (Against::Peers, Role::Peer { .. }) => true,
            (Against::Volatile, Role::Volatile) => true,
            (Against::Qemu, Role::Peer { qemu }) => qemu,
            (Against::Named(name), Role::Peer { .. }) => column.entrant.name().starts_with(name),
            _ => false,
        };
        let columns: Vec<Vec<f64>> = self.columns.iter().filter(counts).map(|c| numbers(c, measure)).collect();
        // Of peers the best counts, of bounds the one that bounds.
        let takes_larger = self.higher_is_better(measure) == (against != Against::Limit);
        let pick = |a: f64, b: f64| if takes_larger { a.max(b) } else { a.min(b) };
        (0..self.columns[0].rounds.len())
            .map(|round| columns.iter().map(|column| column[round]).fold(f64::NAN, pick))
            .collect()
    }

    /// The median of the rounds' ratios; `None`: there was nobody to compare with.
    pub fn ratio(&self, measure: usize, against: Against) -> Option<f64> {
        let pairs = self.ours(measure).into_iter().zip(self.reference(measure, against));
        median(&pairs.map(|(ours, theirs)| ours / theirs).collect::<Vec<_>>())
    }

    /// How many times better genblk is than the best peer, by the first measure.
    pub fn advantage(&self) -> Option<f64> {
        self.better(self.ratio(0, Against::Peers)?)
    }

    /// The same of the limit.
    pub fn headroom(&self) -> Option<f64> {
        Some(self.advantage()? / self.better(self.ratio(0, Against::Limit)?)?)
    }

    fn better(&self, ratio: f64) -> Option<f64> {
        Some(if self.higher_is_better(0) { ratio } else { 1.0 / ratio }).filter(|ratio| ratio.is_finite())
    }

    /// A target's number, and whether that is enough; `None`: it was not measured.
    pub fn verdict(&self, target: &Target) -> Option<(f64, bool)> {
        let value = match target.against {
            Against::Itself => median(&self.ours(target.measure))?,
            against => self.ratio(target.measure, against)?,
        };
        let more = self.higher_is_better(target.measure);
        Some((value, if more { value >= target.factor } else { value <= target.factor }))
    }

    /// Whether anything that was measured falls short.
    pub fn misses(&self) -> bool {
        self.row.targets.iter().any(|target| self.verdict(target).is_some_and(|(_, reached)| !reached))
    }
}

fn numbers(column: &Column, measure: usize) -> Vec<f64> {
    column.rounds.iter().map(|round| round.as_ref().map_or(f64::NAN, |numbers| numbers[measure])).collect()
}

/// The median of the numbers among them.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut values: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

/// A number with three digits that count.
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

/// A table of Markdown that is one as plain text too.
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

fn words(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_string()).collect()
}

/// One line for each target.
pub fn targets(rows: &[Measured]) -> String {
    let mut lines = Vec::new();
    for measured in rows {
        for target in &measured.row.targets {
            let measure = measured.row.measures[target.measure];
            let reference = median(&measured.reference(target.measure, target.against));
            let (against, reference) = match target.against {
                Against::Limit => ("the limit", reference),
                Against::Peers => ("the best peer", reference),
                Against::Qemu => ("the best of qsd", reference),
                Against::Named(name) => (name, reference),
                Against::Volatile => ("survive=never", reference),
                Against::Itself => ("a constant", Some(target.factor)),
            };
            let sign = if measure.higher_is_better() { ">=" } else { "<=" };
            let times = if target.against == Against::Itself { "" } else { " x" };
            let (value, reached) = match measured.verdict(target) {
                Some((value, reached)) => {
                    (format!("{}{times}", show(Some(value))), if reached { "yes" } else { "**no**" })
                }
                None => ("-".to_string(), "not run"),
            };
            lines.push(vec![
                measured.row.name.to_string(),
                measure.unit().to_string(),
                show(median(&measured.ours(target.measure))),
                against.to_string(),
                show(reference),
                value,
                format!("{sign} {}{times}", target.factor),
                reached.to_string(),
            ]);
        }
    }
    table(&words(&["row", "measure", "genblk", "against", "that", "genblk is", "to reach", "reached"]), &lines)
}

/// How many targets are reached, and how many were measured.
fn score(rows: &[Measured]) -> (usize, usize) {
    let targets = rows.iter().flat_map(|row| row.row.targets.iter().filter_map(|target| row.verdict(target)));
    targets.fold((0, 0), |(reached, measured), (_, good)| (reached + usize::from(good), measured + 1))
}

/// The medians of everybody.
pub fn medians(rows: &[Measured]) -> String {
    let mut seen = BTreeSet::new();
    let columns = rows.iter().flat_map(|measured| &measured.columns);
    let names: Vec<&str> = columns.map(|column| column.entrant.name()).filter(|name| seen.insert(*name)).collect();
    let mut lines = Vec::new();
    for measured in rows {
        for (at, measure) in measured.row.measures.iter().enumerate() {
            let of = |name: &&str| {
                let column = measured.columns.iter().find(|column| column.entrant.name() == *name);
                show(column.and_then(|column| median(&numbers(column, at))))
            };
            let row = [measured.row.name.to_string(), measure.unit().to_string()];
            lines.push(row.into_iter().chain(names.iter().map(of)).collect());
        }
    }
    let head: Vec<&str> = ["row", "measure"].into_iter().chain(names.iter().copied()).collect();
    table(&words(&head), &lines)
}

/// Why something could not be measured, each reason once.
pub fn failures(rows: &[Measured]) -> String {
    let mut reasons = BTreeSet::new();
    for measured in rows {
        for column in &measured.columns {
            let name = measured.row.name;
            reasons.extend(
                column.rounds.iter().filter_map(|round| Some(format!("- {name}: {}\n", round.as_ref().err()?))),
            );
        }
    }
    reasons.into_iter().collect()
}

/// What others did on the machine meanwhile: a run that was disturbed says so itself.
pub fn disturbance(rows: &[Measured]) -> String {
    let rounds: Vec<f64> = rows.iter().flat_map(|measured| measured.busy.iter().copied()).collect();
    let disturbed = rounds.iter().filter(|busy| **busy > 0.1).count();
    let mean = 100.0 * rounds.iter().sum::<f64>() / rounds.len().max(1) as f64;
    let verdict =
        if disturbed * 10 > rounds.len() { " **This run was disturbed: rows that poll mean nothing.**" } else { "" };
    format!(
        "- Others took {mean:.0} % of the processors between the rounds, more than 10 % in {disturbed} of {}.{verdict}\n",
        rounds.len()
    )
}

/// The whole report. `notes` has a section for each row whose bottleneck is known; those that fall short are quoted.
pub fn document(rows: &[Measured], machine: &str, notes: &str) -> String {
    let mut text = format!(
        "# genblk against its peers and the limit\n\n\
         Written by `make bench`; only ratios within one run mean anything, machines and their moods differ.\n\n\
         {machine}{}\n![genblk against the best peer](results.svg)\n\n",
        disturbance(rows)
    );
    let (reached, measured) = score(rows);
    let _ = write!(
        text,
        "## What was to be reached\n\n{reached} of {measured} targets that were measured are reached.\n\n{}\n",
        targets(rows)
    );
    text += "The limit: a bare server on genblk's ring code that only copies (cached rows); the lower of genblk with\n\
             everything cached and io_uring with O_DIRECT on the device (cold rows). A ratio is the median of the\n\
             rounds' ratios, each of numbers of one round; a best peer is the best of its round.\n\n";
    text += "The rows:\n\n";
    for measured in rows {
        let _ = writeln!(text, "- `{}`: {}", measured.row.name, measured.row.title);
    }
    let _ = write!(text, "\n## Everybody's medians\n\n{}", medians(rows));
    let failures = failures(rows);
    if !failures.is_empty() {
        let _ = write!(text, "\nNot measured:\n\n{failures}");
    }
    let missing: String = rows.iter().filter(|m| m.misses()).filter_map(|m| note(notes, m.row.name)).collect();
    if !missing.is_empty() {
        let _ = write!(text, "\n## What holds it back\n\n{missing}");
    }
    text
}

/// The section of a row, as an item of a list.
fn note(notes: &str, name: &str) -> Option<String> {
    let section = notes.split("\n## ").skip(1).find(|section| section.lines().next() == Some(name))?;
    let body = section.split_once('\n')?.1.trim();
    Some(format!("- `{name}`: {body}\n"))
}
