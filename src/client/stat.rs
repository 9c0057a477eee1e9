//! `genblk stat`: the activity of devices, as rates and latencies of an interval.

use std::io::{self, Write};
use std::thread;
use std::time::Duration;

use super::interval::{Interval, MEDIAN, P99, P999, RequestInterval, percent, to_f64};
pub use super::table::Numbers;
use super::table::TextTable;
use super::{ControlClient, diagnosis, visible};
use crate::control::wire::{
    CacheStatistics, Description, DeviceStatistics, DeviceStatus, Devices, ListParameters, SizeCounts, Statistics,
    StatisticsParameters,
};
use crate::counters::latency::{Latencies, bound_of};
use crate::counters::sizes::{SIZE_BUCKETS, Sizes, least_size_of};
use crate::error::{Error, ErrorKind, Result};
use crate::units::PAGE_BYTES;

/// The kinds of report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum View {
    /// A line for each device.
    #[default]
    Overview,
    /// Latencies: a line for each kind of request.
    Latencies,
    /// Histograms of the latencies of requests.
    Histograms,
    /// Histograms of the sizes of requests and of operations on the image.
    Sizes,
    /// The caches.
    Cache,
    /// What delays requests.
    Causes,
}

/// Options of `genblk stat`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatOptions {
    /// One device; `None`: all.
    pub device: Option<String>,
    /// The kind of report.
    pub view: View,
    /// Time between two reports; `None`: one report.
    pub interval: Option<Duration>,
    /// Number of reports; `None`: no limit, if there is an interval.
    pub count: Option<u64>,
    /// Whether to separate columns by tabs and omit the header.
    pub for_programs: bool,
    /// Bytes and nanoseconds.
    pub numbers: Numbers,
    /// Whether to print the time before each report.
    pub with_time: bool,
    /// Whether to omit the first report, which covers the time since the daemon started.
    pub without_first: bool,
    /// Whether to print the replies unchanged.
    pub as_json: bool,
}

/// Prints reports to standard output.
///
/// # Errors
/// The errors of [`ControlClient::call`]; [`ErrorKind::System`] if standard output cannot be written to, except for a
/// closed pipe.
pub fn stat(client: &mut ControlClient, options: &StatOptions) -> Result<()> {
    let parameters = StatisticsParameters { device: options.device.clone(), interval_ms: None };
    let list = ListParameters { device: options.device.clone() };
    let since_us = client.call::<Description>("Describe", &serde_json::json!({}))?.since_us;
    let mut before = Statistics { time_us: since_us, devices: Vec::new() };
    let mut reports = options.count.unwrap_or(if options.interval.is_some() { u64::MAX } else { 1 });
    let mut is_first = true;
    while reports > 0 {
        let raw = client.call_raw("Statistics", &parameters)?;
        let now: Statistics = serde_json::from_value(raw.clone())
            .map_err(|e| Error::io(ErrorKind::Control, "an unsupported reply to Statistics", e.into()))?;
        let states = match options.view {
            View::Causes if !options.as_json => client.call::<Devices>("List", &list)?.devices,
            _ => Vec::new(),
        };
        let shown = !(options.without_first && is_first);
        let text = match options.as_json {
            true => format!("{raw}\n"),
            false => report(&before, &now, options, is_first) + &causes(&before, &now, &states),
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
pub(super) fn print(text: &str) -> Result<bool> {
    let mut output = io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Error::io(ErrorKind::System, "cannot write to standard output", e)),
    }
}

fn report(before: &Statistics, now: &Statistics, options: &StatOptions, is_first: bool) -> String {
    let times = [before.time_us, now.time_us];
    let intervals = Interval::of_all(&before.devices, &now.devices, times, options.numbers);
    let with_header = !options.for_programs && (is_first || now.devices.len() > 1 || options.view != View::Overview);
    let render = |table: &TextTable| table.render(with_header, options.for_programs);
    let body = match options.view {
        View::Overview => render(&overview(&intervals)),
        View::Latencies => render(&latencies(&intervals)),
        View::Cache => render(&cache(&intervals)),
        View::Causes => render(&delays(&intervals)),
        View::Histograms => intervals.iter().map(|interval| render(&histogram(interval))).collect(),
        View::Sizes => intervals.iter().map(|interval| render(&sizes(interval))).collect(),
    };
    match options.with_time {
        true => format!("{}\n{body}", now.time_us / 1_000_000),
        false => body,
    }
}

fn overview(intervals: &[Interval<'_>]) -> TextTable {
    let [read_bytes, written_bytes] = match intervals.first().map(|interval| interval.numbers) {
        Some(Numbers::Exact) => ["rB/s", "wB/s"],
        _ => ["rMiB/s", "wMiB/s"],
    };
    let header = [
        "disk",
        "r/s",
        read_bytes,
        "hit%",
        "r50",
        "r99",
        "w/s",
        written_bytes,
        "w50",
        "w99",
        "f/s",
        "f99",
        "dirty",
        "rd/s",
        "wr/s",
        "busy%",
    ];
    let mut table = TextTable::new(&header, 1);
    for interval in intervals {
        let [read, write, flush] = ["read", "write", "flush"].map(|operation| interval.requests(operation));
        let time = |latencies: &Latencies, share| interval.numbers.time(latencies.quantile(share));
        let (reads, writes, flushes) = (read.all(), write.all(), flush.all());
        table.row(vec![
            interval.now.name.clone(),
            interval.rate(read.count),
            interval.byte_rate(read.bytes),
            interval.hit_percent(),
            time(&reads, MEDIAN),
            time(&reads, P99),
            interval.rate(write.count),
            interval.byte_rate(write.bytes),
            time(&writes, MEDIAN),
            time(&writes, P99),
            interval.rate(flush.count),
            time(&flushes, P99),
            interval.numbers.bytes(interval.now.cache.dirty_pages.saturating_mul(PAGE_BYTES)),
            interval.rate(interval.store("read")),
            interval.rate(interval.store("write")),
            interval.busy_percent(),
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
        "limited",
    ];
    let mut table = TextTable::new(&header, 1);
    for interval in intervals {
        let delta = |counter: fn(&CacheStatistics) -> u64| interval.cache(counter);
        let lookups = delta(CacheStatistics::lookup_pages);
        let pages = |pages: u64| interval.numbers.bytes(pages.saturating_mul(PAGE_BYTES));
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
            interval.now.limited.saturating_sub(interval.before.limited).to_string(),
        ]);
    }
    table
}

/// Where the time of requests goes.
fn delays(intervals: &[Interval<'_>]) -> TextTable {
    let header = [
        "disk", "hit%", "r99", "w99", "f99", "evict/s", "imgr99", "imgw99", "sync99", "free", "behind", "limited",
        "busy%",
    ];
    let mut table = TextTable::new(&header, 1);
    for interval in intervals {
        let time = |latencies: &Latencies| interval.numbers.time(latencies.quantile(P99));
        let [read, write, flush] =
            ["read", "write", "flush"].map(|operation| time(&interval.requests(operation).all()));
        let [image_read, image_write, sync] =
            ["read", "write", "sync"].map(|operation| time(&interval.store_latencies(operation)));
        let rate = |counter: fn(&CacheStatistics) -> u64| interval.rate(interval.cache(counter));
        table.row(vec![
            interval.now.name.clone(),
            interval.hit_percent(),
            read,
            write,
            flush,
            rate(|cache| cache.evicted_pages),
            image_read,
            image_write,
            sync,
            rate(|cache| cache.stalls),
            rate(|cache| cache.throttled),
            interval.rate(interval.now.limited.saturating_sub(interval.before.limited)),
            interval.busy_percent(),
        ]);
    }
    table
}

/// A line for each of these devices: what delays its requests.
fn causes(before: &Statistics, now: &Statistics, states: &[DeviceStatus]) -> String {
    let times = [before.time_us, now.time_us];
    let intervals = Interval::of_all(&before.devices, &now.devices, times, Numbers::Short);
    let line = |device: &DeviceStatus| match (&device.why, intervals.iter().find(|one| one.now.name == device.name)) {
        (Some(why), _) => format!("{}: {}: {}\n", device.name, device.state.word(), visible(why)),
        (None, Some(interval)) => format!("{}: {}\n", device.name, diagnosis::line(interval, Some(device))),
        (None, None) => format!("{}: {}\n", device.name, device.state.word()),
    };
    states.iter().map(line).collect()
}

/// Requests by latency, in powers of two.
pub(super) fn histogram(interval: &Interval<'_>) -> TextTable {
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
                .fold(0, |sum: u64, (_, count)| sum.saturating_add(*count))
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

/// Requests and operations on the image by size, in powers of two.
fn sizes(interval: &Interval<'_>) -> TextTable {
    let requests = |statistics: &DeviceStatistics, operation: &str| {
        let found = statistics.requests.iter().find(|requests| requests.operation == operation);
        found.map(|requests| requests.sizes.clone()).unwrap_or_default()
    };
    let stores = |statistics: &DeviceStatistics, operation: &str| {
        let found = statistics.stores.iter().find(|store| store.operation == operation);
        found.map(|store| store.sizes.clone()).unwrap_or_default()
    };
    let since = |now: SizeCounts, before: SizeCounts| {
        let mut sizes = Sizes::from(&now);
        let before = Sizes::from(&before);
        sizes.iter_mut().zip(before).for_each(|(count, before)| *count = count.saturating_sub(before));
        sizes
    };
    let mut columns = Vec::new();
    for operation in ["read", "write", "discard", "write_zeroes"] {
        let of = |statistics| requests(statistics, operation);
        columns.push((operation.replace('_', " "), since(of(interval.now), of(interval.before))));
    }
    for operation in ["read", "write"] {
        let of = |statistics| stores(statistics, operation);
        columns.push((format!("image {operation}"), since(of(interval.now), of(interval.before))));
    }
    let names: Vec<&str> = columns.iter().map(|(name, _)| name.as_str()).collect();
    let title = format!("{}: from", interval.now.name);
    let mut table = TextTable::new(&[&[title.as_str()], &names[..]].concat(), 1);
    for bucket in 0..SIZE_BUCKETS {
        let counts: Vec<u64> = columns.iter().map(|(_, sizes)| sizes[bucket]).collect();
        if counts.iter().any(|count| *count > 0) {
            let least = interval.numbers.bytes(least_size_of(bucket));
            let shown = |count: &u64| if *count == 0 { "-".to_owned() } else { interval.numbers.count(to_f64(*count)) };
            table.row([vec![least], counts.iter().map(shown).collect()].concat());
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::wire::{Latency, RequestStatistics, StoreStatistics, WorkerStatistics};
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
    fn a_report_shows_the_rates_of_its_interval_and_dashes_for_idle_columns() {
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
    fn the_printed_histogram_counts_each_request_once() {
        let now = statistics(1_000_000, 70, 1500);
        let nothing = Statistics::default();
        let options = StatOptions { view: View::Histograms, numbers: Numbers::Exact, ..StatOptions::default() };
        let text = report(&nothing, &now, &options, true);
        assert_eq!(text, "vm1: below  read, memory  read, waited\n2048                  70             -\n");
    }

    #[test]
    fn sizes_and_busy_time_cover_only_the_interval() {
        let sample = |time_us, count: u64| {
            let mut sizes = Sizes::default();
            (sizes[3], sizes[SIZE_BUCKETS - 1]) = (count, count / 10);
            let mut statistics = statistics(time_us, count, 1000);
            let device = &mut statistics.devices[0];
            device.requests[0].sizes = SizeCounts::from(&sizes);
            let store = StoreStatistics { operation: "write".to_owned(), ..StoreStatistics::default() };
            device.stores.push(StoreStatistics { sizes: SizeCounts::from(&sizes), ..store });
            device.workers = vec![WorkerStatistics { busy_ns: count * 1_000_000, ..Default::default() }; 2];
            statistics
        };
        let (before, now) = (sample(0, 100), sample(1_000_000, 300));
        let options = StatOptions { view: View::Sizes, ..StatOptions::default() };
        let expected = "\
vm1: from  read  write  discard  write zeroes  image read  image write
4.0K        200      -        -             -           -          200
16.0M        20      -        -             -           -           20
";
        assert_eq!(report(&before, &now, &options, true), expected);
        let text = report(&before, &now, &StatOptions::default(), false);
        assert!(text.ends_with("  40\n"), "twice 200 ms in a second: {text}");
        let exact = StatOptions { numbers: Numbers::Exact, ..StatOptions::default() };
        let text = report(&before, &now, &exact, true);
        assert!(text.contains("rB/s") && text.contains(" 819200 "), "{text}");
    }

    #[test]
    fn pages_of_holes_do_not_count_as_misses() {
        let mut now = statistics(1_000_000, 60, 1000);
        (now.devices[0].cache.hole_pages, now.devices[0].cache.miss_pages) = (20, 20);
        let options = StatOptions { view: View::Cache, for_programs: true, ..StatOptions::default() };
        let text = report(&Statistics::default(), &now, &options, true);
        assert!(text.starts_with("vm1\t100\t75.0\t20.0\t"), "{text}");
    }

    #[test]
    fn machine_readable_output_has_tabs_and_no_header() {
        let options = StatOptions { for_programs: true, numbers: Numbers::Exact, ..StatOptions::default() };
        let text = report(&statistics(0, 0, 1), &statistics(1_000_000, 500, 1000), &options, true);
        assert!(text.starts_with("vm1\t500\t"), "{text}");
        assert_eq!(text.lines().count(), 1);
    }
}
