//! What delays the requests of a disk: the findings of `genblk stat -x` and `genblk top`, in sentences.

use super::interval::{Interval, MEDIAN, P99, percent, to_f64};
use super::table::Numbers;
use crate::control::wire::{CacheStatistics, DeviceState, DeviceStatus};
use crate::counters::latency::Latencies;
use crate::units::counted;

/// Requests that are at least this slow (99th percentile) get a finding.
const SLOW_READ_NS: u64 = 1_000_000;
const SLOW_FLUSH_NS: u64 = 10_000_000;
/// Of 1000 reads or writes, the number that have to wait for a finding.
const WAITED_PER_MILLE: u64 = 10;
/// Below this share of pages in memory, in thousandths, more cache may help.
const HITS_PER_MILLE: u64 = 980;
/// An operation on the image that is at least this old gets a finding; in microseconds.
const SLOW_US: u64 = 1_000_000;
/// The cache lacks free pages while less than this fraction of its pages is free.
const FREE_DIVISOR: u64 = 100;
/// From this share of a worker's time on, in thousandths, the worker is the limit.
const BUSY_PER_MILLE: f64 = 900.0;

/// The findings about a disk, the most important one first; none if nothing delays its requests.
pub(super) fn findings(interval: &Interval<'_>, device: Option<&DeviceStatus>) -> Vec<String> {
    let mut found = Vec::new();
    if let Some(us) = device.and_then(|device| device.oldest_operation_us).filter(|us| *us >= SLOW_US) {
        found.push(format!("its image has not answered for {} s", us / 1_000_000));
    }
    found.extend(device.and_then(|device| frozen(device.state)));
    found.extend(waiting(interval));
    found.extend(limits(interval));
    found.extend(reads(interval));
    found.extend(writes(interval));
    found.extend(flushes(interval));
    found.extend(workers(interval));
    found.extend(device.and_then(memory));
    found
}

/// The findings as one line; says so if there are none.
pub(super) fn line(interval: &Interval<'_>, device: Option<&DeviceStatus>) -> String {
    match findings(interval, device) {
        found if !found.is_empty() => found.join("; "),
        _ if completed(interval) == 0 => "no requests".to_owned(),
        _ => "nothing delays its requests".to_owned(),
    }
}

/// Number of requests that have completed.
fn completed(interval: &Interval<'_>) -> u64 {
    interval.now.requests.iter().map(|requests| interval.requests(&requests.operation).count).sum()
}

fn frozen(state: DeviceState) -> Option<String> {
    let is_frozen = state == DeviceState::Frozen;
    is_frozen.then(|| "it is frozen: requests that change it wait until \"genblk thaw\"".to_owned())
}

/// Requests that wait while none completes.
fn waiting(interval: &Interval<'_>) -> Option<String> {
    let in_flight = interval.now.requests.iter().fold(0, |sum: u64, requests| sum.saturating_add(requests.in_flight));
    let waits = in_flight > 0 && completed(interval) == 0;
    waits.then(|| format!("none of its {} in flight completes", counted(in_flight, "request")))
}

/// A time for a sentence: `142 us`.
fn time(ns: Option<u64>) -> String {
    let short = Numbers::Short.time(ns);
    match short.strip_suffix(['n', 'u', 'm']) {
        Some(number) => format!("{number} {}s", &short[number.len()..]),
        None => short.strip_suffix('s').map_or_else(|| short.clone(), |number| format!("{number} s")),
    }
}

fn p99(latencies: &Latencies) -> String {
    time(latencies.quantile(P99))
}

fn limits(interval: &Interval<'_>) -> Option<String> {
    let since = |now: u64, before: u64| now.saturating_sub(before);
    let limited = since(interval.now.limited, interval.before.limited);
    let limited_us = since(interval.now.limited_us, interval.before.limited_us);
    let mean = limited_us.saturating_mul(1000).checked_div(limited)?;
    Some(format!(
        "a limit held {} requests/s back, for {} on average (limits.* of genblk set)",
        interval.rate(limited),
        time(Some(mean))
    ))
}

fn reads(interval: &Interval<'_>) -> Option<String> {
    let read = interval.requests("read");
    let waited = read.waited.count();
    let is_slow = read.all().quantile(P99).is_some_and(|ns| ns >= SLOW_READ_NS);
    let image = interval.store_latencies("read");
    // Some requests wait for other operations, such as the first map of a region.
    if !is_slow || image.count() == 0 || waited.saturating_mul(1000) < read.count.saturating_mul(WAITED_PER_MILLE) {
        return None;
    }
    let (hits, misses) = (interval.cache(|cache| cache.hit_pages), interval.cache(|cache| cache.miss_pages));
    let misses_often = hits.saturating_mul(1000) < hits.saturating_add(misses).saturating_mul(HITS_PER_MILLE);
    let cache = match interval.cache(|cache| cache.evicted_pages) {
        0 => ", and no page is evicted: more cache does not help",
        _ if misses_often => ", and pages are evicted: more cache may help (cache.size of genblk set)",
        _ => "",
    };
    Some(format!(
        "{} % of reads wait for the image, which reads in {} (p99 {}){cache}",
        percent(waited, read.count),
        time(image.quantile(MEDIAN)),
        p99(&image),
    ))
}

fn writes(interval: &Interval<'_>) -> Vec<String> {
    let mut found = Vec::new();
    let delta = |counter: fn(&CacheStatistics) -> u64| interval.cache(counter);
    let (throttled, stalls) = (delta(|cache| cache.throttled), delta(|cache| cache.stalls));
    let writes = interval.requests("write").count;
    if throttled > 0 && throttled.saturating_mul(1000) >= writes.saturating_mul(WAITED_PER_MILLE) {
        let image = interval.store_latencies("write");
        let (rate, writes) = (interval.rate(throttled), interval.rate(interval.store("write")));
        found.push(format!(
            "{rate} writes/s wait because write-back is behind: the image takes {writes} writes/s, each in {} (p99 {})",
            time(image.quantile(MEDIAN)),
            p99(&image)
        ));
    }
    let cache = &interval.now.cache;
    if stalls > 0 && cache.frames_free < cache.frames / FREE_DIVISOR {
        found.push(format!("{} requests/s wait for a free page of the cache", interval.rate(stalls)));
    }
    found
}

fn flushes(interval: &Interval<'_>) -> Option<String> {
    let flush = interval.requests("flush").all();
    flush.quantile(P99).filter(|ns| *ns >= SLOW_FLUSH_NS)?;
    let [write, sync] = ["write", "sync"].map(|operation| p99(&interval.store_latencies(operation)));
    Some(format!("a FLUSH takes {} (p99): the image writes in {write} and syncs in {sync}", p99(&flush)))
}

fn workers(interval: &Interval<'_>) -> Option<String> {
    let workers = interval.now.workers.len().max(1);
    #[allow(clippy::cast_precision_loss, reason = "a device has at most 8 workers")]
    let per_mille = to_f64(interval.busy_ns()) / interval.seconds / 1e6 / workers as f64;
    let is_busy = interval.seconds > 0.0 && per_mille >= BUSY_PER_MILLE;
    is_busy.then(|| format!("its workers are busy for {:.0} % of the time (key workers)", per_mille / 10.0))
}

fn memory(device: &DeviceStatus) -> Option<String> {
    let wanted = device.cache_wanted_bytes.filter(|wanted| *wanted < device.cache_bytes)?;
    let [wanted, size] = [wanted, device.cache_bytes].map(|bytes| Numbers::Short.bytes(bytes));
    Some(format!("memory pressure: its cache is reduced to {wanted} of {size} for now"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::wire::{DeviceStatistics, Latency, RequestStatistics, StoreStatistics, WorkerStatistics};
    use crate::counters::latency::bucket_of;

    const MS: u64 = 1_000_000;

    fn latency(ns: u64, count: u64) -> Latency {
        let mut latencies = Latencies { sum_ns: ns * count, max_ns: ns, ..Latencies::default() };
        latencies.counts[bucket_of(ns)] = count;
        Latency::from(&latencies)
    }

    fn requests(operation: &str, from_memory: (u64, u64), waited: (u64, u64)) -> RequestStatistics {
        RequestStatistics {
            operation: operation.to_owned(),
            requests: from_memory.1 + waited.1,
            from_memory: latency(from_memory.0, from_memory.1),
            waited: latency(waited.0, waited.1),
            ..RequestStatistics::default()
        }
    }

    fn store(operation: &str, ns: u64, count: u64) -> StoreStatistics {
        StoreStatistics {
            operation: operation.to_owned(),
            operations: count,
            latency: latency(ns, count),
            ..StoreStatistics::default()
        }
    }

    fn told(now: &DeviceStatistics) -> String {
        let before = DeviceStatistics::default();
        line(&Interval { before: &before, now, seconds: 10.0, numbers: Numbers::Short }, None)
    }

    #[test]
    fn a_disk_that_is_fast_or_idle_has_no_findings() {
        assert_eq!(told(&DeviceStatistics::default()), "no requests");
        let requests = vec![requests("read", (1000, 1000), (100_000, 500)), requests("flush", (0, 0), (MS, 9))];
        assert_eq!(told(&DeviceStatistics { requests, ..Default::default() }), "nothing delays its requests");
    }

    #[test]
    fn a_disk_whose_requests_all_wait_is_not_idle() {
        let mut writes = requests("write", (0, 0), (0, 0));
        writes.in_flight = 3;
        let now = DeviceStatistics { requests: vec![writes], ..Default::default() };
        assert_eq!(told(&now), "none of its 3 requests in flight completes");
        assert!(frozen(DeviceState::Frozen).is_some() && frozen(DeviceState::Serving).is_none());
    }

    #[test]
    fn a_diagnosis_distinguishes_a_slow_image_from_a_small_cache() {
        let cache =
            |evicted_pages| CacheStatistics { hit_pages: 900, miss_pages: 100, evicted_pages, ..Default::default() };
        let of = |evicted_pages| DeviceStatistics {
            requests: vec![requests("read", (1000, 900), (20 * MS, 100))],
            stores: vec![store("read", 18 * MS, 100)],
            cache: cache(evicted_pages),
            ..Default::default()
        };
        let text = told(&of(50));
        assert!(text.starts_with("10.0 % of reads wait for the image, which reads in 1"), "{text}");
        assert!(
            text.contains(" ms (p99 ") && text.ends_with("more cache may help (cache.size of genblk set)"),
            "{text}"
        );
        assert!(told(&of(0)).ends_with("no page is evicted: more cache does not help"));
    }

    #[test]
    fn a_diagnosis_names_rate_limits_write_back_flushes_and_workers() {
        let now = DeviceStatistics {
            requests: vec![requests("write", (1000, 900), (20 * MS, 100)), requests("flush", (0, 0), (50 * MS, 10))],
            stores: vec![store("write", 8 * MS, 100), store("sync", 30 * MS, 10)],
            cache: CacheStatistics { throttled: 70, stalls: 30, frames: 4096, ..Default::default() },
            workers: vec![WorkerStatistics { busy_ns: 9_900 * MS, ..Default::default() }],
            limited: 40,
            limited_us: 80_000,
            ..Default::default()
        };
        let text = told(&now);
        for part in [
            "a limit held 4 requests/s back, for 2.0 ms on average",
            "7 writes/s wait because write-back is behind: the image takes 10 writes/s, each in ",
            "3 requests/s wait for a free page",
            "a FLUSH takes ",
            "its workers are busy for 99 % of the time",
        ] {
            assert!(text.contains(part), "{part:?} is not in {text:?}");
        }
    }
}
