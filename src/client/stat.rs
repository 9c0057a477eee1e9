//! `genblk stat`: what the devices do, as rates and latencies of an interval.

use std::io::{self, Write};
use std::thread;
use std::time::Duration;

use super::ControlClient;
pub use super::table::Numbers;
use super::table::TextTable;
use crate::control::wire::{
    CacheStatistics, Description, DeviceStatistics, RequestStatistics, Statistics, StatisticsParameters,
    StoreStatistics,
};
use crate::counters::latency::{Latencies, bound_of};
use crate::error::{Error, ErrorKind, Result};
use crate::units::PAGE_BYTES;

/// What is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum View {
    /// A line for each device.
    #[default]
    Overview,
    /// Latencies: a line for each kind of request.
    Latencies,
    /// Histograms of the latencies of requests.
    Histograms,
    /// The caches.
    Cache,
}

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatOptions {
    /// One device; all without it.
    pub device: Option<String>,
    /// What is shown of them.
    pub view: View,
    /// Seconds between two reports; without them there is one.
    pub interval: Option<Duration>,
    /// How many reports; without end if there is an interval.
    pub count: Option<u64>,
    /// No header, and tabs.
    pub for_programs: bool,
    /// Bytes and nanoseconds.
    pub numbers: Numbers,
    /// A line with the time before each report.
    pub with_time: bool,
    /// Without the first report, which is about all the time since the daemon's start.
    pub without_first: bool,
    /// The replies as they came.
    pub as_json: bool,
}

/// Prints reports to standard output.
///
/// # Errors
/// Those of [`ControlClient::call`]; [`ErrorKind::System`] if standard output cannot be written to, except for a closed
/// pipe.
pub fn stat(client: &mut ControlClient, options: &StatOptions) -> Result<()> {
    let parameters = StatisticsParameters { device: options.device.clone(), interval_ms: None };
    let since_us = client.call::<Description>("Describe", &serde_json::json!({}))?.since_us;
    let mut before = Statistics { time_us: since_us, devices: Vec::new() };
    let mut reports = options.count.unwrap_or(if options.interval.is_some() { u64::MAX } else { 1 });
    let mut is_first = true;
    while reports > 0 {
        let raw = client.call_raw("Statistics", &parameters)?;
        let now: Statistics = serde_json::from_value(raw.clone())
            .map_err(|e| Error::io(ErrorKind::Control, "the daemon's statistics are of another version", e.into()))?;
        let shown = !(options.without_first && is_first);
        let text = match options.as_json {
            true => format!("{raw}\n"),
            false => report(&before, &now, options, is_first),
        };
        if shown && !print(&text)? {
            return Ok(());
        }
        (before, is_first) = (now, false);
        reports -= u64::from(shown);
        if reports > 0 {
            thread::sleep(options.interval.unwrap_or(Duration::from_secs(1)));
        }
    }
    Ok(())
}

/// Prints a report; returns false if the reader has closed the pipe.
fn print(text: &str) -> Result<bool> {
    let mut output = io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Error::io(ErrorKind::System, "cannot write to standard output", e)),
    }
}

fn report(before: &Statistics, now: &Statistics, options: &StatOptions, is_first: bool) -> String {
    let nothing = DeviceStatistics::default();
    let seconds = to_f64(now.time_us.saturating_sub(before.time_us)) / 1e6;
    let intervals = now.devices.iter().map(|device| {
        let earlier = before.devices.iter().find(|earlier| earlier.name == device.name).unwrap_or(&nothing);
        Interval { before: earlier, now: device, seconds, numbers: options.numbers }
    });
    let intervals: Vec<Interval<'_>> = intervals.collect();
    let with_header = !options.for_programs && (is_first || now.devices.len() > 1 || options.view != View::Overview);
    let render = |table: &TextTable| table.render(with_header, options.for_programs);
    let body = match options.view {
        View::Overview => render(&overview(&intervals)),
        View::Latencies => render(&latencies(&intervals)),
        View::Cache => render(&cache(&intervals)),
        View::Histograms => intervals.iter().map(|interval| render(&histogram(interval))).collect(),
    };
    match options.with_time {
        true => format!("{}\n{body}", now.time_us / 1_000_000),
        false => body,
    }
}

/// A device's statistics at both ends of an interval.
struct Interval<'a> {
    before: &'a DeviceStatistics,
    now: &'a DeviceStatistics,
    seconds: f64,
    numbers: Numbers,
}

impl Interval<'_> {
    fn rate(&self, more: u64) -> String {
        if self.seconds > 0.0 { self.numbers.count(to_f64(more) / self.seconds) } else { "-".to_owned() }
    }

    fn mib_rate(&self, bytes: u64) -> String {
        if self.seconds > 0.0 { format!("{:.1}", to_f64(bytes) / self.seconds / 1_048_576.0) } else { "-".to_owned() }
    }

    /// What requests of a kind did in the interval.
    fn requests(&self, operation: &str) -> RequestInterval {
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

    fn store(&self, operation: &str) -> u64 {
        let find = |statistics: &DeviceStatistics| {
            let found: Option<&StoreStatistics> = statistics.stores.iter().find(|store| store.operation == operation);
            found.map_or(0, |store| store.operations)
        };
        find(self.now).saturating_sub(find(self.before))
    }

    fn cache(&self, counter: impl Fn(&CacheStatistics) -> u64) -> u64 {
        counter(&self.now.cache).saturating_sub(counter(&self.before.cache))
    }

    fn hit_percent(&self) -> String {
        let hits = self.cache(|cache| cache.hit_pages);
        percent(hits, hits + self.cache(|cache| cache.miss_pages))
    }
}

struct RequestInterval {
    count: u64,
    errors: u64,
    bytes: u64,
    from_memory: Latencies,
    waited: Latencies,
}

impl RequestInterval {
    fn all(&self) -> Latencies {
        let mut all = self.from_memory.clone();
        all.add(&self.waited);
        all
    }
}

const MEDIAN: u64 = 500;
const P99: u64 = 990;
const P999: u64 = 999;

fn overview(intervals: &[Interval<'_>]) -> TextTable {
    let header = [
        "disk", "r/s", "rMiB/s", "hit%", "r50", "r99", "w/s", "wMiB/s", "w50", "w99", "f/s", "f99", "dirty", "rd/s",
        "wr/s",
    ];
    let mut table = TextTable::new(&header, 1);
    for interval in intervals {
        let [read, write, flush] = ["read", "write", "flush"].map(|operation| interval.requests(operation));
        let time = |latencies: &Latencies, share| interval.numbers.time(latencies.quantile(share));
        let (reads, writes, flushes) = (read.all(), write.all(), flush.all());
        table.row(vec![
            interval.now.name.clone(),
            interval.rate(read.count),
            interval.mib_rate(read.bytes),
            interval.hit_percent(),
            time(&reads, MEDIAN),
            time(&reads, P99),
            interval.rate(write.count),
            interval.mib_rate(write.bytes),
            time(&writes, MEDIAN),
            time(&writes, P99),
            interval.rate(flush.count),
            time(&flushes, P99),
            interval.numbers.bytes(interval.now.cache.dirty_pages * PAGE_BYTES),
            interval.rate(interval.store("read")),
            interval.rate(interval.store("write")),
        ]);
    }
    table
}

fn latencies(intervals: &[Interval<'_>]) -> TextTable {
    let mut table = TextTable::new(&["disk", "operation", "/s", "errors", "mean", "p50", "p99", "p99.9", "max"], 2);
    for interval in intervals {
        for requests in &interval.now.requests {
            let RequestInterval { count, errors, from_memory, waited, .. } = interval.requests(&requests.operation);
            let name = requests.operation.replace('_', " ");
            let splits = matches!(requests.operation.as_str(), "read" | "write");
            let rows = match splits {
                true => vec![(format!("{name}, from memory"), from_memory), (format!("{name}, waited"), waited)],
                false => vec![(name, waited)],
            };
            for (index, (name, latencies)) in rows.into_iter().enumerate() {
                let of_kind = latencies.count();
                debug_assert!(of_kind <= count || count == 0, "the histograms add up to the count");
                let time = |ns| interval.numbers.time(ns);
                table.row(vec![
                    interval.now.name.clone(),
                    name,
                    interval.rate(of_kind),
                    if index == 0 { errors.to_string() } else { "-".to_owned() },
                    time(latencies.mean_ns()),
                    time(latencies.quantile(MEDIAN)),
                    time(latencies.quantile(P99)),
                    time(latencies.quantile(P999)),
                    time((of_kind > 0).then_some(latencies.max_ns)),
                ]);
            }
        }
    }
    table
}

fn cache(intervals: &[Interval<'_>]) -> TextTable {
    let header = [
        "disk",
        "read/s",
        "hit%",
        "hole%",
        "ahead/s",
        "used%",
        "evict/s",
        "size",
        "free",
        "dirty",
        "limit",
        "stall",
        "throttled",
    ];
    let mut table = TextTable::new(&header, 1);
    for interval in intervals {
        let delta = |counter: fn(&CacheStatistics) -> u64| interval.cache(counter);
        let lookups = delta(|cache| cache.hit_pages + cache.miss_pages);
        let pages = |pages: u64| interval.numbers.bytes(pages * PAGE_BYTES);
        let now = &interval.now.cache;
        table.row(vec![
            interval.now.name.clone(),
            interval.rate(lookups),
            interval.hit_percent(),
            percent(delta(|cache| cache.hole_pages), lookups),
            interval.rate(delta(|cache| cache.readahead_pages)),
            percent(delta(|cache| cache.readahead_used_pages), delta(|cache| cache.readahead_pages)),
            interval.rate(delta(|cache| cache.evicted_pages)),
            pages(now.frames),
            pages(now.frames_free),
            pages(now.dirty_pages),
            pages(now.dirty_limit_pages),
            delta(|cache| cache.stalls).to_string(),
            delta(|cache| cache.throttled).to_string(),
        ]);
    }
    table
}

/// Requests by latency, in powers of two.
fn histogram(interval: &Interval<'_>) -> TextTable {
    let mut columns = Vec::new();
    for requests in &interval.now.requests {
        let RequestInterval { from_memory, waited, .. } = interval.requests(&requests.operation);
        let name = requests.operation.replace('_', " ");
        if matches!(requests.operation.as_str(), "read" | "write") {
            columns.push((format!("{name}, memory"), from_memory));
            columns.push((format!("{name}, waited"), waited));
        } else {
            columns.push((name, waited));
        }
    }
    let names: Vec<&str> = columns.iter().map(|(name, _)| name.as_str()).collect();
    let title = format!("{}: below", interval.now.name);
    let mut table = TextTable::new(&[&[title.as_str()], &names[..]].concat(), 1);
    for bits in 0..=36 {
        let within = |latencies: &Latencies| -> u64 {
            let counts = latencies.counts.iter().enumerate();
            counts
                .filter(|(bucket, _)| (bound_of(*bucket) - 1).checked_ilog2().map_or(0, |log| log + 1) == bits)
                .map(|(_, count)| count)
                .sum()
        };
        let counts: Vec<u64> = columns.iter().map(|(_, latencies)| within(latencies)).collect();
        if counts.iter().any(|count| *count > 0) {
            let shown = |count: &u64| if *count == 0 { "-".to_owned() } else { interval.numbers.count(to_f64(*count)) };
            let bound = interval.numbers.time(Some(1 << bits));
            table.row([vec![bound], counts.iter().map(shown).collect()].concat());
        }
    }
    table
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.1}", to_f64(part) * 100.0 / to_f64(whole)) }
}

#[allow(clippy::cast_precision_loss, reason = "few digits are shown")]
fn to_f64(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::wire::Latency;
    use crate::counters::latency::bucket_of;

    fn statistics(time_us: u64, reads: u64, ns: u64) -> Statistics {
        let mut latencies = Latencies { sum_ns: reads * ns, max_ns: ns, ..Latencies::default() };
        latencies.counts[bucket_of(ns)] = reads;
        let from_memory = Latency::from(&latencies);
        let read = RequestStatistics {
            operation: "read".to_owned(),
            requests: reads,
            bytes: reads * 4096,
            from_memory,
            ..RequestStatistics::default()
        };
        let cache = CacheStatistics { hit_pages: reads, ..CacheStatistics::default() };
        let device = DeviceStatistics { name: "vm1".to_owned(), requests: vec![read], cache, ..Default::default() };
        Statistics { time_us, devices: vec![device] }
    }

    #[test]
    fn a_report_has_the_rates_of_its_interval_and_a_dash_for_what_did_not_happen() {
        let (before, now) = (statistics(0, 1000, 1000), statistics(2_000_000, 3000, 1000));
        let text = report(&before, &now, &StatOptions::default(), true);
        let row: Vec<&str> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row[..4], ["vm1", "1.0k", "3.9", "100.0"]);
        assert_eq!(row[6..12], ["0", "0.0", "-", "-", "0", "-"], "there were no writes: {text}");
        let idle = report(&now, &Statistics { time_us: 3_000_000, ..now.clone() }, &StatOptions::default(), false);
        let row: Vec<&str> = idle.split_whitespace().collect();
        assert_eq!(row[..6], ["vm1", "0", "0.0", "-", "-", "-"], "no header, and no rate of nothing: {idle}");
    }

    #[test]
    fn histograms_count_each_request_once_by_powers_of_two() {
        let now = statistics(1_000_000, 70, 1500);
        let nothing = Statistics::default();
        let options = StatOptions { view: View::Histograms, numbers: Numbers::Exact, ..StatOptions::default() };
        let text = report(&nothing, &now, &options, true);
        assert_eq!(text, "vm1: below  read, memory  read, waited\n2048                  70             -\n");
    }

    #[test]
    fn programs_get_tabs_without_a_header() {
        let options = StatOptions { for_programs: true, numbers: Numbers::Exact, ..StatOptions::default() };
        let text = report(&statistics(0, 0, 1), &statistics(1_000_000, 500, 1000), &options, true);
        assert!(text.starts_with("vm1\t500\t"), "{text}");
        assert_eq!(text.lines().count(), 1);
    }
}
