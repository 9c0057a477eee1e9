//! The figures of a run. `results.toml` keeps them, so that RESULTS.md and results.svg can be rendered without
//! measuring.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::compare::{Column, Role, RowSamples};
use crate::rows::{Against, Row, Target};

/// The head of the file.
const ABOUT: &str = "\
# The figures of the run that RESULTS.md and results.svg show. `make bench` writes this file;
# `cargo bench --bench load -- render` renders both from it without measuring.
#
# medians: by server, a number for each of the row's measures; nan: not measured.
# comparisons: what genblk is compared with; ratios are medians of the rounds' ratios of genblk to it.

";

/// The figures of a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figures {
    /// Hardware, kernel and versions.
    pub machine: Vec<String>,
    /// All columns, in the order of the report.
    pub columns: Vec<String>,
    /// The columns of peers.
    pub peers: Vec<String>,
    pub disturbance: Disturbance,
    pub rows: Vec<RowFigures>,
}

/// How busy other processes kept the machine.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disturbance {
    pub rounds: usize,
    /// Rounds before which others used more than a tenth of the CPU time.
    pub disturbed_rounds: usize,
    pub mean_percent: f64,
}

/// The figures of a row.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RowFigures {
    pub key: String,
    pub measures: Vec<String>,
    /// What could not be measured, and why.
    pub not_measured: Vec<String>,
    pub medians: BTreeMap<String, Vec<f64>>,
    pub comparisons: BTreeMap<String, Comparison>,
}

/// genblk against something else, by measure.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Comparison {
    /// Medians of what genblk is compared with.
    pub reference: Vec<f64>,
    pub ratio: Vec<f64>,
}

impl Figures {
    pub fn new(machine: Vec<String>, rows: &[RowSamples]) -> Self {
        let (mut columns, mut peers) = (Vec::new(), Vec::new());
        for column in rows.iter().flat_map(|row| &row.columns) {
            let name = column.participant.name().to_string();
            let is_peer = matches!(column.participant.role, Role::Peer { .. });
            for list in [Some(&mut columns), is_peer.then_some(&mut peers)].into_iter().flatten() {
                if !list.contains(&name) {
                    list.push(name.clone());
                }
            }
        }
        let rows_figures = rows.iter().map(RowSamples::figures).collect();
        Self { machine, columns, peers, disturbance: Disturbance::of(rows), rows: rows_figures }
    }

    /// The text of `results.toml`.
    pub fn to_text(&self) -> String {
        format!("{ABOUT}{}", toml::to_string(self).expect("figures are plain values"))
    }

    /// # Errors
    /// The text is not that of a `results.toml`.
    pub fn from_text(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|e| e.to_string())
    }

    /// # Errors
    /// The file cannot be read, or is something else.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = fs::read_to_string(path).map_err(|e| e.to_string());
        text.and_then(|text| Self::from_text(&text)).map_err(|e| format!("{}: {e}", path.display()))
    }

    /// Joins the figures with their rows.
    ///
    /// # Errors
    /// The figures do not fit the rows: they have to be measured again.
    pub fn results<'a>(&'a self, rows: &'a [Row]) -> Result<Vec<RowResult<'a>>, String> {
        let join = |figures: &'a RowFigures| {
            let row = rows.iter().find(|row| row.key == figures.key);
            row.filter(|row| row.measures.iter().map(|measure| measure.name()).eq(&figures.measures))
                .map(|row| RowResult { row, figures, peers: &self.peers })
                .ok_or_else(|| format!("row {} has changed since it was measured", figures.key))
        };
        self.rows.iter().map(join).collect()
    }
}

impl Disturbance {
    fn of(rows: &[RowSamples]) -> Self {
        let busy: Vec<f64> = rows.iter().flat_map(|row| row.busy.iter().copied()).collect();
        let disturbed_rounds = busy.iter().filter(|fraction| **fraction > 0.1).count();
        let mean_percent = 100.0 * busy.iter().sum::<f64>() / busy.len().max(1) as f64;
        Self { rounds: busy.len(), disturbed_rounds, mean_percent: rounded(mean_percent) }
    }
}

impl RowSamples {
    fn figures(&self) -> RowFigures {
        let measures = 0..self.row.measures.len();
        let by_measure = |of: &dyn Fn(usize) -> Option<f64>| -> Vec<f64> {
            measures.clone().map(|measure| of(measure).map_or(f64::NAN, rounded)).collect()
        };
        let medians = self.columns.iter().map(|column| {
            let medians = by_measure(&|measure| median(&numbers(column, measure)));
            (column.participant.name().to_string(), medians)
        });
        let named = self.row.targets.iter().map(|target| target.against);
        let against: Vec<Against> = [Against::Limit, Against::Peers, Against::Base].into_iter().chain(named).collect();
        let comparisons = against.iter().filter(|against| **against != Against::Constant).filter_map(|against| {
            let reference = by_measure(&|measure| median(&self.reference(measure, *against)));
            let ratio = by_measure(&|measure| self.ratio(measure, *against));
            let found = ratio.iter().any(|ratio| ratio.is_finite());
            found.then(|| (against.name().to_string(), Comparison { reference, ratio }))
        });
        let reasons = self.columns.iter().flat_map(|column| &column.rounds).filter_map(|round| round.as_ref().err());
        let not_measured: BTreeSet<&String> = reasons.collect();
        RowFigures {
            key: self.row.key.to_string(),
            measures: self.row.measures.iter().map(|measure| measure.name().to_string()).collect(),
            not_measured: not_measured.into_iter().cloned().collect(),
            medians: medians.collect(),
            comparisons: comparisons.collect(),
        }
    }

    /// genblk's numbers, by round; NaN where there is none.
    fn genblk(&self, measure: usize) -> Vec<f64> {
        let column = self.columns.iter().find(|column| column.participant.role == Role::Genblk);
        column.map(|column| numbers(column, measure)).unwrap_or_default()
    }

    /// The numbers to compare genblk with, by round: those of the best peer, or of the lowest limit, of that round.
    fn reference(&self, measure: usize, against: Against) -> Vec<f64> {
        let counts = |column: &&Column| match (against, column.participant.role) {
            (Against::Limit, Role::Limit) | (Against::Peers, Role::Peer { .. }) => true,
            (Against::Volatile, Role::Volatile) | (Against::Base, Role::Base) => true,
            (Against::Qemu, Role::Peer { qemu }) => qemu,
            (Against::Named(name), Role::Peer { .. }) => column.participant.name().starts_with(name),
            _ => false,
        };
        let columns: Vec<Vec<f64>> = self.columns.iter().filter(counts).map(|c| numbers(c, measure)).collect();
        let takes_larger = self.row.measures[measure].higher_is_better() == (against != Against::Limit);
        let pick = |a: f64, b: f64| if takes_larger { a.max(b) } else { a.min(b) };
        let rounds = self.columns.first().map_or(0, |column| column.rounds.len());
        (0..rounds).map(|round| columns.iter().map(|column| column[round]).fold(f64::NAN, pick)).collect()
    }

    /// The median of the rounds' ratios; `None`: there was nothing to compare with.
    fn ratio(&self, measure: usize, against: Against) -> Option<f64> {
        let pairs = self.genblk(measure).into_iter().zip(self.reference(measure, against));
        median(&pairs.map(|(genblk, reference)| genblk / reference).collect::<Vec<_>>())
    }
}

fn numbers(column: &Column, measure: usize) -> Vec<f64> {
    column.rounds.iter().map(|round| round.as_ref().map_or(f64::NAN, |numbers| numbers[measure])).collect()
}

/// The median of the finite values.
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

/// Four significant digits: one more than the report shows.
fn rounded(value: f64) -> f64 {
    format!("{value:.3e}").parse().expect("a number that was just printed")
}

/// A row with its figures.
#[derive(Clone, Copy, Debug)]
pub struct RowResult<'a> {
    pub row: &'a Row,
    pub figures: &'a RowFigures,
    peers: &'a [String],
}

impl RowResult<'_> {
    /// The median of a column.
    pub fn median(&self, column: &str, measure: usize) -> Option<f64> {
        self.figures.medians.get(column).map(|medians| medians[measure]).filter(|median| median.is_finite())
    }

    /// The median of what genblk is compared with.
    pub fn reference(&self, measure: usize, against: Against) -> Option<f64> {
        let comparison = self.figures.comparisons.get(against.name());
        comparison.map(|comparison| comparison.reference[measure]).filter(|median| median.is_finite())
    }

    /// The median of the rounds' ratios to what genblk is compared with.
    pub fn ratio(&self, measure: usize, against: Against) -> Option<f64> {
        let comparison = self.figures.comparisons.get(against.name());
        comparison.map(|comparison| comparison.ratio[measure]).filter(|ratio| ratio.is_finite())
    }

    /// How many times better genblk is than the best peer, by the first measure.
    pub fn advantage(&self) -> Option<f64> {
        self.times_better(self.ratio(0, Against::Peers)?)
    }

    /// How many times better the limit is than the best peer, by the first measure.
    pub fn limit_advantage(&self) -> Option<f64> {
        Some(self.advantage()? / self.times_better(self.ratio(0, Against::Limit)?)?)
    }

    /// The peer with the best median of the first measure.
    pub fn best_peer(&self) -> Option<(&str, f64)> {
        let more = self.row.measures[0].higher_is_better();
        let medians = self.peers.iter().filter_map(|peer| Some((peer.as_str(), self.median(peer, 0)?)));
        let better = |a: &f64, b: &f64| if more { a.total_cmp(b) } else { b.total_cmp(a) };
        medians.max_by(|(_, a), (_, b)| better(a, b))
    }

    fn times_better(&self, ratio: f64) -> Option<f64> {
        let times = if self.row.measures[0].higher_is_better() { ratio } else { 1.0 / ratio };
        Some(times).filter(|times| times.is_finite())
    }

    /// The number that a target is about, and whether it meets the target; `None`: not measured.
    pub fn verdict(&self, target: &Target) -> Option<(f64, bool)> {
        let value = match target.against {
            Against::Constant => self.median(GENBLK, target.measure)?,
            against => self.ratio(target.measure, against)?,
        };
        let more = self.row.measures[target.measure].higher_is_better();
        Some((value, if more { value >= target.factor } else { value <= target.factor }))
    }

    /// Whether a measured target is missed.
    pub fn misses(&self) -> bool {
        self.row.targets.iter().any(|target| self.verdict(target).is_some_and(|(_, met)| !met))
    }
}

/// The column of genblk with its defaults.
pub const GENBLK: &str = "genblk";
