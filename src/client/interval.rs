//! The differences between two samples of devices' statistics.

use std::sync::LazyLock;

use super::table::Numbers;
use crate::control::wire::{CacheStatistics, DeviceStatistics, RequestStatistics, StoreStatistics};
use crate::counters::latency::Latencies;

/// Percentiles, in thousandths.
pub(super) const MEDIAN: u64 = 500;
pub(super) const P99: u64 = 990;
pub(super) const P999: u64 = 999;

/// The time between two moments in microseconds.
pub(super) fn seconds_between(before_us: u64, now_us: u64) -> f64 {
    to_f64(now_us.saturating_sub(before_us)) / 1e6
}

/// A device's statistics at both ends of an interval.
pub(super) struct Interval<'a> {
    pub before: &'a DeviceStatistics,
    pub now: &'a DeviceStatistics,
    pub seconds: f64,
    pub numbers: Numbers,
}

impl<'a> Interval<'a> {
    /// The interval of each device of `now` between two times, in microseconds. A device missing in `before` was added
    /// in between, or counts since the first time.
    pub fn of_all(
        before: &'a [DeviceStatistics],
        now: &'a [DeviceStatistics],
        [before_us, now_us]: [u64; 2],
        numbers: Numbers,
    ) -> Vec<Self> {
        static NOTHING: LazyLock<DeviceStatistics> = LazyLock::new(DeviceStatistics::default);
        let of = |now: &'a DeviceStatistics| match before.iter().find(|before| before.name == now.name) {
            Some(before) => Self { before, now, seconds: seconds_between(before_us, now_us), numbers },
            None => {
                let seconds = seconds_between(before_us.max(now.since_us), now_us);
                Self { before: &NOTHING, now, seconds, numbers }
            }
        };
        now.iter().map(of).collect()
    }

    /// A count of the interval as a rate per second.
    pub fn rate(&self, more: u64) -> String {
        if self.seconds > 0.0 { self.numbers.count(to_f64(more) / self.seconds) } else { "-".to_owned() }
    }

    /// MiB per second, or bytes if numbers are exact.
    pub fn byte_rate(&self, bytes: u64) -> String {
        match self.numbers {
            _ if self.seconds <= 0.0 => "-".to_owned(),
            Numbers::Exact => self.rate(bytes),
            Numbers::Short => format!("{:.1}", to_f64(bytes) / self.seconds / 1_048_576.0),
        }
    }

    /// Time that all workers spent in turns with work.
    pub fn busy_ns(&self) -> u64 {
        let busy = |statistics: &DeviceStatistics| {
            statistics.workers.iter().fold(0, |sum: u64, worker| sum.saturating_add(worker.busy_ns))
        };
        busy(self.now).saturating_sub(busy(self.before))
    }

    /// The same in percent of a processor.
    pub fn busy_percent(&self) -> String {
        let busy_ns = self.busy_ns();
        if self.seconds > 0.0 { format!("{:.0}", to_f64(busy_ns) / self.seconds / 1e7) } else { "-".to_owned() }
    }

    /// Requests of one kind in the interval.
    pub fn requests(&self, operation: &str) -> RequestInterval {
        let find = |statistics: &DeviceStatistics| {
            statistics.requests.iter().find(|requests| requests.operation == operation).cloned().unwrap_or_default()
        };
        let (before, now): (RequestStatistics, RequestStatistics) = (find(self.before), find(self.now));
        let since = |now, before| Latencies::from(now).since(&Latencies::from(before));
        RequestInterval {
            count: now.requests.saturating_sub(before.requests),
            errors: now.errors.saturating_sub(before.errors),
            bytes: now.bytes.saturating_sub(before.bytes),
            from_memory: since(&now.from_memory, &before.from_memory),
            waited: since(&now.waited, &before.waited),
        }
    }

    /// The number of completed operations of one kind on the image.
    pub fn store(&self, operation: &str) -> u64 {
        let find = |statistics: &DeviceStatistics| {
            let found: Option<&StoreStatistics> = statistics.stores.iter().find(|store| store.operation == operation);
            found.map_or(0, |store| store.operations)
        };
        find(self.now).saturating_sub(find(self.before))
    }

    /// The latencies of the operations of one kind on the image.
    pub fn store_latencies(&self, operation: &str) -> Latencies {
        let find = |statistics: &DeviceStatistics| {
            let found = statistics.stores.iter().find(|store| store.operation == operation);
            found.map(|store| Latencies::from(&store.latency)).unwrap_or_default()
        };
        find(self.now).since(&find(self.before))
    }

    /// The increase of a counter of the cache.
    pub fn cache(&self, counter: impl Fn(&CacheStatistics) -> u64) -> u64 {
        counter(&self.now.cache).saturating_sub(counter(&self.before.cache))
    }

    /// Requested pages found in memory, in percent; holes are not counted.
    pub fn hit_percent(&self) -> String {
        let hits = self.cache(|cache| cache.hit_pages);
        percent(hits, hits.saturating_add(self.cache(|cache| cache.miss_pages)))
    }
}

/// Requests of one kind in an interval.
pub(super) struct RequestInterval {
    pub count: u64,
    pub errors: u64,
    pub bytes: u64,
    pub from_memory: Latencies,
    pub waited: Latencies,
}

impl RequestInterval {
    /// Latencies of all of them, whether they waited or not.
    pub fn all(&self) -> Latencies {
        let mut all = self.from_memory.clone();
        all.add(&self.waited);
        all
    }
}

/// A share in percent; `-` if the whole is 0.
pub(super) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.1}", to_f64(part) * 100.0 / to_f64(whole)) }
}

/// A number of which few digits are shown.
#[allow(clippy::cast_precision_loss, reason = "few digits are shown")]
pub(super) fn to_f64(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_interval_of_a_disk_begins_when_it_was_attached() {
        let device = |name: &str, since_us| DeviceStatistics { name: name.to_owned(), since_us, ..Default::default() };
        let [old, new] = [device("old", 10), device("new", 4_000_000)];
        let (before, now) = ([old.clone()], [old, new]);
        let seconds = |before: &[DeviceStatistics]| {
            let intervals = Interval::of_all(before, &now, [1_000_000, 5_000_000], Numbers::Short);
            intervals.iter().map(|interval| interval.rate(60)).collect::<Vec<_>>()
        };
        assert_eq!(seconds(&before), ["15", "60"]);
        assert_eq!(seconds(&[]), ["15", "60"]);
    }
}
