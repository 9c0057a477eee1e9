//! The dirty limit, and the delay of writes as they approach it.
//!
//! The limit is the amount that the store can write within the flush target, which bounds the latency of a FLUSH.
//! Writers are slowed smoothly before they reach the limit (Linux: balance_dirty_pages).
//!
//! A store is limited in bytes per second and in operations per second, and the cost of the dirty pages depends on the
//! number of operations that they need: 64 contiguous MiB need 64 operations, 64 MiB of scattered pages need 16 384. So
//! the cache measures both rates, and expresses the cost of an operation in pages, so that one limit in pages covers
//! both.

use crate::units::{SECTORS_PER_PAGE, Tick, low_u32};

/// The limit is never below this (256 KiB), unless the cache itself is small: room for a few requests of any usual
/// size.
const LIMIT_PAGES_MIN: u32 = 64;
/// The limit is never below this many operations.
const LIMIT_OPERATIONS_MIN: u64 = 8;
/// The assumed speed of a store until it has been measured: 8 MiB/s. It also limits the first FLUSH of a slow disk; a
/// fast disk is measured within milliseconds.
const FIRST_PAGES_PER_SECOND: u64 = 2048;
/// See [`FIRST_PAGES_PER_SECOND`].
const FIRST_OPERATIONS_PER_SECOND: u64 = 256;
/// Length of a sample of the store's speed, counting only time with writes in flight.
const SAMPLE_US: u64 = 200_000;
/// An incomplete sample counts as at least this long: a burst into a disk's own cache, or at the start of a period of a
/// throttled disk, must not set the speed.
const PART_US_MIN: u64 = 50_000;
/// An incomplete sample counts immediately if it exceeds the known speed by this factor.
const PART_FACTOR: u64 = 2;
/// Background write-back starts at this share of the limit, in percent, and stops at [`STOP_PERCENT`].
const START_PERCENT: u32 = 40;
/// See [`START_PERCENT`].
const STOP_PERCENT: u32 = 20;
/// At the limit, a write is delayed by this factor of the time that the store needs for it: four concurrent writers are
/// then no faster than the store.
const DELAY_FACTOR_MAX: u64 = 4;
/// Longest delay of a write's completion.
const DELAY_US_MAX: u64 = 100_000;
/// The value 1 in the fixed-point numbers of [`Throttle::delay_us`].
const ONE: u64 = 1024;
const US_PER_SECOND: u64 = 1_000_000;

/// The amount that the store writes in a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Speed {
    pages: u64,
    operations: u64,
}

/// Time with writes in flight, and the amount written in it.
#[derive(Clone, Copy, Debug, Default)]
struct WriteSample {
    us: u64,
    pages: u64,
    operations: u64,
}

impl WriteSample {
    /// The speed, if the sample counts as at least `us_min` long.
    fn speed(&self, us_min: u64) -> Speed {
        let us = self.us.max(us_min).max(1);
        let per_second = |count: u64| count.saturating_mul(US_PER_SECOND) / us;
        Speed { pages: per_second(self.pages), operations: per_second(self.operations) }
    }
}

/// The dirty limit, and the speed of the store, from which it is computed.
#[derive(Debug)]
pub(super) struct Throttle {
    target_us: u64,
    pages_max: u32,
    limit: u32,
    /// The cost of an operation, in pages.
    operation_pages: u32,
    speed: Speed,
    /// The speed includes a complete sample.
    measured: bool,
    /// When writes were last known to be in flight, if they still are.
    busy_since: Option<Tick>,
    sample: WriteSample,
}

impl Throttle {
    /// A throttle for a store of unknown speed.
    pub fn new(target_us: u64, pages_max: u32) -> Self {
        let speed = Speed { pages: FIRST_PAGES_PER_SECOND, operations: FIRST_OPERATIONS_PER_SECOND };
        let (busy_since, sample) = (None, WriteSample::default());
        let mut throttle =
            Self { target_us, pages_max, limit: 0, operation_pages: 1, speed, measured: false, busy_since, sample };
        throttle.set_limit();
        throttle
    }

    /// Sets another flush target and another upper bound.
    pub fn reconfigure(&mut self, target_us: u64, pages_max: u32) {
        (self.target_us, self.pages_max) = (target_us, pages_max);
        self.set_limit();
    }

    /// The previous daemon left this many dirty pages: writes need not wait until they are written, because it may have
    /// measured the store's speed.
    pub fn restored(&mut self, dirty_pages: u32) {
        if dirty_pages > 0 {
            self.limit = self.limit.max(dirty_pages.saturating_mul(2)).min(self.pages_max);
            self.operation_pages = 1;
        }
    }

    /// Most pages that may be dirty or under write-back, in the unit of [`Throttle::cost`].
    pub fn limit_pages(&self) -> u32 {
        self.limit
    }

    /// The cost of writing these pages in this many operations, in pages.
    pub fn cost(&self, pages: u32, operations: u32) -> u32 {
        pages.max(operations.saturating_mul(self.operation_pages))
    }

    /// Background write-back starts above this cost.
    pub fn start_threshold_pages(&self) -> u32 {
        self.percent(START_PERCENT)
    }

    /// Background write-back stops below this cost.
    pub fn stop_pages(&self) -> u32 {
        self.percent(STOP_PERCENT)
    }

    /// Above this cost the completions of writes are delayed: halfway from start to limit, like Linux's freerun
    /// ceiling, so that background write-back reaches full speed first.
    pub fn setpoint_pages(&self) -> u32 {
        (self.start_threshold_pages() + self.limit) / 2
    }

    fn percent(&self, percent: u32) -> u32 {
        low_u32(u64::from(self.limit) * u64::from(percent) / 100)
    }

    /// A write is submitted at the store's full depth: from now until no write is in flight, the rate of writes
    /// measures the store's speed.
    pub fn write_started(&mut self, now: Tick) {
        self.busy_since.get_or_insert(now);
    }

    /// A write of `pages` pages ended, with `left` writes still in flight.
    pub fn write_ended(&mut self, pages: u64, left: u32, now: Tick) {
        let Some(since) = self.busy_since else { return };
        self.sample.pages += pages;
        self.sample.operations += 1;
        self.sample.us += now.since_us(since);
        self.busy_since = (left > 0).then_some(now);
        if self.sample.us >= SAMPLE_US {
            self.apply_sample(self.sample.speed(SAMPLE_US));
            self.sample = WriteSample::default();
        } else {
            self.apply_partial_sample(self.sample.speed(PART_US_MIN));
        }
    }

    /// Includes a complete sample in the speed. Its rates are lower bounds of the store's capacity. If it is slower
    /// than the known speed, the rate that it used most was the bottleneck, and is lowered.
    fn apply_sample(&mut self, seen: Speed) {
        let Speed { pages, operations } = self.speed;
        // After three samples, seven eighths of a change are included.
        let mean = |known: u64, seen: u64| u64::midpoint(known, seen).max(1);
        self.speed = if !self.measured {
            Speed { pages: seen.pages.max(1), operations: seen.operations.max(1) }
        } else if seen.pages >= pages || seen.operations >= operations {
            let (pages, operations) =
                (pages.max(mean(pages, seen.pages)), mean(operations, seen.operations).max(operations));
            Speed { pages, operations }
        } else if u128::from(seen.pages) * u128::from(operations) >= u128::from(seen.operations) * u128::from(pages) {
            Speed { pages: mean(pages, seen.pages), operations }
        } else {
            Speed { pages, operations: mean(operations, seen.operations) }
        };
        self.measured = true;
        self.set_limit();
    }

    /// Includes an incomplete sample, if it shows that the store is much faster than known. The limit would otherwise
    /// keep a fast store slow for the length of a sample.
    fn apply_partial_sample(&mut self, seen: Speed) {
        let Speed { pages, operations } = self.speed;
        if seen.pages > pages * PART_FACTOR || seen.operations > operations * PART_FACTOR {
            self.speed = Speed { pages: pages.max(seen.pages), operations: operations.max(seen.operations) };
            self.set_limit();
        }
    }

    fn set_limit(&mut self) {
        let in_target = |per_second: u64| per_second.saturating_mul(self.target_us) / US_PER_SECOND;
        let pages = u32::try_from(in_target(self.speed.pages)).unwrap_or(u32::MAX);
        let operations = in_target(self.speed.operations).max(LIMIT_OPERATIONS_MIN);
        self.limit = pages.max(LIMIT_PAGES_MIN).min(self.pages_max);
        self.operation_pages = low_u32(u64::from(self.limit) / operations).max(1);
    }

    /// Microseconds by which to delay the completion of a write of `sectors` while these `pages`, at this `cost`, are
    /// dirty or under write-back. 0 up to the setpoint; from there to the limit it rises with the third power to
    /// [`DELAY_FACTOR_MAX`] times the time that the store needs for the write.
    pub fn delay_us(&self, pages: u32, cost: u32, sectors: u64) -> u64 {
        let setpoint = self.setpoint_pages();
        if cost <= setpoint || !self.measured {
            return 0;
        }
        // The position between the setpoint and the limit, in fixed point.
        let over = u64::from(cost - setpoint) * ONE / u64::from((self.limit - setpoint).max(1));
        let over = over.min(ONE);
        let cube = over * over / ONE * over / ONE;
        // The write costs what the dirty pages cost on average.
        let cost_per_page = u64::from(cost) * ONE / u64::from(pages.max(1));
        let service_us = sectors * US_PER_SECOND / (self.speed.pages * SECTORS_PER_PAGE) * cost_per_page / ONE;
        (service_us * DELAY_FACTOR_MAX * cube / ONE).min(DELAY_US_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES_MAX: u32 = 1 << 20;

    /// A throttle after one second of writes to a store of this speed.
    fn after_second(mut throttle: Throttle, pages: u64, operations: u64) -> Throttle {
        let mut now = Tick::ZERO;
        for _ in 0..operations {
            throttle.write_started(now);
            now = now.plus_us(US_PER_SECOND / operations);
            throttle.write_ended(pages / operations, 0, now);
        }
        throttle
    }

    fn measured(pages_per_second: u64) -> Throttle {
        after_second(Throttle::new(250_000, PAGES_MAX), pages_per_second, 500)
    }

    #[test]
    fn the_dirty_limit_is_the_bandwidth_times_the_flush_target() {
        assert_eq!(measured(100_000).limit_pages(), 25_000);
        // 5 MiB/s.
        let slow = after_second(Throttle::new(250_000, PAGES_MAX), 1280, 80);
        assert_eq!(slow.limit_pages(), 320);
        let slower = after_second(Throttle::new(250_000, PAGES_MAX), 100, 10);
        assert_eq!(slower.limit_pages(), LIMIT_PAGES_MIN);
        assert_eq!(Throttle::new(250_000, 500).limit_pages(), 500, "a small cache has a lower limit");
    }

    #[test]
    fn an_operation_costs_the_pages_that_the_store_could_write_meanwhile() {
        // 200 operations of 1 MiB in a second.
        let disk = after_second(Throttle::new(250_000, PAGES_MAX), 200 * 256, 200);
        assert_eq!(disk.limit_pages(), 50 * 256);
        assert_eq!(disk.cost(50 * 256, 50), disk.limit_pages(), "contiguous pages");
        assert_eq!(disk.cost(50, 50), disk.limit_pages(), "scattered");
        assert_eq!(disk.cost(3, 2), 2 * 256);
    }

    #[test]
    fn scattered_writes_do_not_lower_the_measured_speed_of_sequential_writes() {
        let disk = after_second(Throttle::new(250_000, PAGES_MAX), 200 * 256, 200);
        let disk = after_second(disk, 200, 200);
        assert_eq!((disk.limit_pages(), disk.cost(50, 50)), (50 * 256, 50 * 256));
        // The disk has become slower: half as many operations per second.
        let disk = after_second(disk, 100, 100);
        assert!((25..28).contains(&(disk.limit_pages() / disk.cost(1, 1))), "{disk:?}");
    }

    #[test]
    fn a_fast_store_is_measured_before_a_sample_is_complete() {
        let mut throttle = Throttle::new(250_000, PAGES_MAX);
        assert_eq!(throttle.limit_pages(), 512);
        let mut now = Tick::ZERO;
        // 500 000 pages a second, in clusters.
        while now < Tick::from_us(20_000) {
            let pages = throttle.limit_pages().min(256);
            throttle.write_started(now);
            now = now.plus_us(u64::from(pages) * 2);
            throttle.write_ended(pages.into(), 0, now);
        }
        assert!(throttle.limit_pages() > 30_000, "{throttle:?}");
    }

    #[test]
    fn the_first_burst_of_a_fast_store_stays_below_the_start_threshold() {
        let mut throttle = Throttle::new(250_000, PAGES_MAX);
        for cluster in 0..4 {
            let now = Tick::from_us(cluster * 1000);
            throttle.write_started(now);
            throttle.write_ended(256, 0, now.plus_us(1000));
        }
        assert!(throttle.start_threshold_pages() > 4 * 256, "{throttle:?}");
    }

    #[test]
    fn a_burst_of_a_throttled_disk_does_not_raise_the_limit() {
        let mut throttle = Throttle::new(250_000, PAGES_MAX);
        // 5 MiB/s in periods of 100 ms.
        for period in 0..20 {
            let now = Tick::from_us(period * 100_000);
            throttle.write_started(now);
            throttle.write_ended(128, 1, now);
            let first = period < 2;
            assert!(throttle.limit_pages() <= if first { 512 } else { 640 }, "period {period}: {throttle:?}");
        }
    }

    #[test]
    fn idle_time_does_not_lower_the_bandwidth() {
        let mut throttle = Throttle::new(250_000, PAGES_MAX);
        for second in 0..100 {
            let start = Tick::from_us(second * US_PER_SECOND);
            throttle.write_started(start);
            throttle.write_ended(1000, 0, start.plus_us(10_000));
        }
        assert_eq!(throttle.limit_pages(), 25_000);
    }

    #[test]
    fn write_delays_rise_monotonically_from_zero_to_their_bound() {
        let throttle = measured(100_000);
        let limit = throttle.limit_pages();
        let delay_us = |cost: u32, sectors| throttle.delay_us(cost, cost, sectors);
        assert_eq!(delay_us(limit / 2, 8), 0);
        let delays: Vec<_> = (70..=100).map(|percent| delay_us(limit / 100 * percent, 256)).collect();
        assert!(delays.is_sorted(), "{delays:?}");
        // 32 pages at 10 us each.
        assert_eq!(*delays.last().unwrap(), 32 * 10 * DELAY_FACTOR_MAX);
        assert_eq!(delay_us(limit, 1 << 20), DELAY_US_MAX);
        assert_eq!(throttle.delay_us(limit / 10, limit, 256), 32 * 10 * 10 * DELAY_FACTOR_MAX, "scattered pages");
    }
}
