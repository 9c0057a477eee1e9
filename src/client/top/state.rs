//! The state of `genblk top`: the last two samples, the history before them, and the choices made by keys.

use std::collections::{BTreeMap, VecDeque};

use super::super::interval::{Interval, MEDIAN, P99, P999, seconds_between, to_f64};
use super::super::sample::DaemonSample;
use super::super::table::Numbers;
use crate::control::wire::{DeviceStatistics, DeviceStatus};
use crate::error::Result;

/// Most intervals that a sparkline shows.
const HISTORY: usize = 240;

/// The commands of the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TopCommand {
    Quit,
    /// Back to the overview; from there, quit.
    Back,
    Redraw,
    NextSort,
    Up,
    Down,
    Histogram,
    Pause,
    Help,
}

/// The view below the list of disks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum TopView {
    /// Details of the selected disk.
    #[default]
    Details,
    /// Its latencies.
    Histogram,
    /// The keys and columns.
    Help,
}

/// The column by which the disks are sorted, largest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum SortKey {
    /// In the daemon's order.
    #[default]
    Order,
    Reads,
    Writes,
    ReadLatency,
    FlushLatency,
    Dirty,
    Busy,
}

impl SortKey {
    const ALL: [Self; 7] =
        [Self::Order, Self::Reads, Self::Writes, Self::ReadLatency, Self::FlushLatency, Self::Dirty, Self::Busy];

    /// The title of the column.
    pub fn name(self) -> &'static str {
        match self {
            Self::Order => "none",
            Self::Reads => "r/s",
            Self::Writes => "w/s",
            Self::ReadLatency => "r99",
            Self::FlushLatency => "f99",
            Self::Dirty => "dirty",
            Self::Busy => "busy",
        }
    }

    fn next(self) -> Self {
        let at = Self::ALL.iter().position(|key| *key == self).unwrap_or(0);
        Self::ALL[(at + 1) % Self::ALL.len()]
    }

    fn value(self, interval: &Interval<'_>) -> u64 {
        match self {
            Self::Order => 0,
            Self::Reads => interval.requests("read").count,
            Self::Writes => interval.requests("write").count,
            Self::ReadLatency => interval.requests("read").all().quantile(P99).unwrap_or(0),
            Self::FlushLatency => interval.requests("flush").all().quantile(P99).unwrap_or(0),
            Self::Dirty => interval.now.cache.dirty_pages,
            Self::Busy => interval.busy_ns(),
        }
    }
}

/// The activity of a disk in the last intervals.
#[derive(Clone, Debug, Default)]
pub(super) struct DiskHistory {
    /// Reads per second.
    pub reads: VecDeque<u64>,
    /// Writes per second.
    pub writes: VecDeque<u64>,
}

/// See the module.
#[derive(Debug)]
pub(super) struct TopState {
    before: DaemonSample,
    now: DaemonSample,
    history: BTreeMap<String, DiskHistory>,
    /// Why there is no newer sample.
    last_error: Option<String>,
    sort: SortKey,
    view: TopView,
    is_paused: bool,
    /// The selected disk.
    selected: Option<String>,
}

impl TopState {
    /// A state that shows averages since the daemon's start.
    pub fn new(now: DaemonSample) -> Self {
        let before = DaemonSample { time_us: now.description.since_us, statistics: Vec::new(), ..now.clone() };
        let selected = now.devices.first().map(|device| device.name.clone());
        let (sort, view) = (SortKey::default(), TopView::default());
        Self { before, now, history: BTreeMap::new(), last_error: None, sort, view, is_paused: false, selected }
    }

    /// Adds a new sample, or the reason why there is none.
    pub fn update(&mut self, sample: Result<DaemonSample>) {
        let sample = match sample {
            Ok(sample) => sample,
            Err(e) => {
                self.last_error = Some(e.to_string());
                return;
            }
        };
        self.last_error = None;
        let is_same_daemon = sample.description == self.now.description;
        self.before = std::mem::replace(&mut self.now, sample);
        if !is_same_daemon {
            // Another daemon: its counters started at 0.
            *self = Self {
                sort: self.sort,
                view: self.view,
                selected: self.selected.take(),
                ..Self::new(self.now.clone())
            };
            return;
        }
        let seconds = self.seconds();
        let counts: Vec<(String, u64, u64)> = self
            .intervals()
            .iter()
            .map(|interval| {
                let [reads, writes] = ["read", "write"].map(|operation| interval.requests(operation).count);
                (interval.now.name.clone(), reads, writes)
            })
            .collect();
        self.history.retain(|name, _| counts.iter().any(|(found, ..)| found == name));
        for (name, reads, writes) in counts {
            let history = self.history.entry(name).or_default();
            for (values, count) in [(&mut history.reads, reads), (&mut history.writes, writes)] {
                values.push_back(per_second(count, seconds));
                if values.len() > HISTORY {
                    values.pop_front();
                }
            }
        }
    }

    /// Executes the command of a key.
    pub fn apply(&mut self, command: TopCommand) {
        let toggled = |view, now| if view == now { TopView::Details } else { view };
        match command {
            TopCommand::Quit | TopCommand::Redraw => {}
            TopCommand::Back => self.view = TopView::Details,
            TopCommand::NextSort => self.sort = self.sort.next(),
            TopCommand::Histogram => self.view = toggled(TopView::Histogram, self.view),
            TopCommand::Help => self.view = toggled(TopView::Help, self.view),
            TopCommand::Pause => self.is_paused = !self.is_paused,
            TopCommand::Up | TopCommand::Down => {
                let names: Vec<String> = self.disks().iter().map(|(device, _)| device.name.clone()).collect();
                let at = self.selected_of(&names);
                let at = if command == TopCommand::Up { at.saturating_sub(1) } else { at + 1 };
                self.selected = names.get(at.min(names.len().saturating_sub(1))).cloned();
            }
        }
    }

    /// Whether updates are paused until the key is pressed again.
    pub fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// The index of the selected disk in a list of disks; the first if it was detached.
    pub fn selected_of(&self, names: &[String]) -> usize {
        names.iter().position(|name| Some(name) == self.selected.as_ref()).unwrap_or(0)
    }

    pub fn view(&self) -> TopView {
        self.view
    }

    pub fn sort(&self) -> SortKey {
        self.sort
    }

    /// The newest sample.
    pub fn now(&self) -> &DaemonSample {
        &self.now
    }

    /// Why there is no newer sample.
    pub fn last_error(&self) -> Option<&str> {
        self.last_error.as_deref()
    }

    pub fn history(&self, name: &str) -> Option<&DiskHistory> {
        self.history.get(name)
    }

    /// Length of the interval between the samples.
    pub fn seconds(&self) -> f64 {
        seconds_between(self.before.time_us, self.now.time_us)
    }

    fn intervals(&self) -> Vec<Interval<'_>> {
        let times = [self.before.time_us, self.now.time_us];
        Interval::of_all(&self.before.statistics, &self.now.statistics, times, Numbers::Short)
    }

    /// The disks with their activity, sorted.
    pub fn disks(&self) -> Vec<(&DeviceStatus, Option<Interval<'_>>)> {
        let mut intervals: BTreeMap<&str, Interval<'_>> =
            self.intervals().into_iter().map(|interval| (interval.now.name.as_str(), interval)).collect();
        let mut disks: Vec<_> =
            self.now.devices.iter().map(|device| (device, intervals.remove(device.name.as_str()))).collect();
        if self.sort != SortKey::Order {
            let key =
                |interval: &Option<Interval<'_>>| interval.as_ref().map_or(0, |interval| self.sort.value(interval));
            disks.sort_by_cached_key(|(_, interval)| std::cmp::Reverse(key(interval)));
        }
        disks
    }

    /// Latencies of requests of one kind, from memory and waited: 50th, 99th and 99.9th percentile of each.
    pub fn percentiles(interval: &Interval<'_>, operation: &str) -> [String; 2] {
        let requests = interval.requests(operation);
        [&requests.from_memory, &requests.waited].map(|latencies| {
            let times = [MEDIAN, P99, P999].map(|share| interval.numbers.time(latencies.quantile(share)));
            times.map(|time| format!("{time:>5}")).join(" ")
        })
    }

    /// The sums over all disks: reads and writes; pages read, and those of them from memory; dirty pages and their
    /// limit.
    pub fn totals(&self) -> TopTotals {
        let mut totals = TopTotals::default();
        for interval in self.intervals() {
            totals.reads = totals.reads.saturating_add(interval.requests("read").count);
            totals.writes = totals.writes.saturating_add(interval.requests("write").count);
            totals.hit_pages = totals.hit_pages.saturating_add(interval.cache(|cache| cache.hit_pages));
            totals.miss_pages = totals.miss_pages.saturating_add(interval.cache(|cache| cache.miss_pages));
            let DeviceStatistics { cache, .. } = interval.now;
            totals.dirty_pages = totals.dirty_pages.saturating_add(cache.dirty_pages);
            totals.limit_pages = totals.limit_pages.saturating_add(cache.dirty_limit_pages);
        }
        totals
    }
}

/// See [`TopState::totals`].
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TopTotals {
    pub reads: u64,
    pub writes: u64,
    pub hit_pages: u64,
    pub miss_pages: u64,
    pub dirty_pages: u64,
    pub limit_pages: u64,
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate is positive and far below 2^53")]
fn per_second(count: u64, seconds: f64) -> u64 {
    if seconds > 0.0 { (to_f64(count) / seconds) as u64 } else { 0 }
}
