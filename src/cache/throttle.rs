//! The dirty limit, and the delay of writers that approach it.
//!
//! The limit is what the store writes in the flush target: that bounds the latency of a FLUSH. Writers are slowed
//! smoothly before they reach the limit (Linux: balance_dirty_pages).

use crate::units::{SECTORS_PER_PAGE, Tick, low_u32};

/// The limit is never below this (16 MiB), unless the cache itself is small: a slow store must not make every write
/// wait.
const LIMIT_PAGES_MIN: u32 = 4096;
/// Length of a bandwidth sample, counting only time with writes in flight.
const SAMPLE_US: u64 = 200_000;
/// Background write-back starts at this share of the limit, in percent, and stops at [`STOP_PERCENT`].
const START_PERCENT: u32 = 40;
/// See [`START_PERCENT`].
const STOP_PERCENT: u32 = 20;
/// At the limit, a write is delayed by this factor of the time that the store needs for it: four writers at once are
/// then no faster than the store.
const DELAY_FACTOR_MAX: u64 = 4;
/// Longest delay of a write's completion.
const DELAY_US_MAX: u64 = 100_000;
/// One in the fixed-point numbers of [`Throttle::delay_us`].
const ONE: u64 = 1024;
const US_PER_SECOND: u64 = 1_000_000;

/// The dirty limit, and the bandwidth of the store, from which it is computed.
#[derive(Debug)]
pub(super) struct Throttle {
    target_us: u64,
    pages_max: u32,
    limit: u32,
    /// Pages per second, smoothed; 0: not measured yet.
    bandwidth: u64,
    /// When writes were last seen to be in flight, if they still are.
    busy_since: Option<Tick>,
    /// The current sample: time with writes in flight, and the pages that they wrote.
    sample_us: u64,
    sample_pages: u64,
}

impl Throttle {
    /// => Until a bandwidth has been measured the limit is `pages_max`.
    pub fn new(target_us: u64, pages_max: u32) -> Self {
        Self { target_us, pages_max, limit: pages_max, bandwidth: 0, busy_since: None, sample_us: 0, sample_pages: 0 }
    }

    /// Most pages that may be dirty or under write-back.
    pub fn limit_pages(&self) -> u32 {
        self.limit
    }

    /// Background write-back starts above this many pages.
    pub fn start_pages(&self) -> u32 {
        self.percent(START_PERCENT)
    }

    /// Background write-back stops below this many pages.
    pub fn stop_pages(&self) -> u32 {
        self.percent(STOP_PERCENT)
    }

    /// Above this many pages the completions of writes are delayed: halfway from start to limit, as Linux's freerun
    /// ceiling, so that background write-back reaches full speed first.
    pub fn setpoint_pages(&self) -> u32 {
        (self.start_pages() + self.limit) / 2
    }

    fn percent(&self, percent: u32) -> u32 {
        low_u32(u64::from(self.limit) * u64::from(percent) / 100)
    }

    /// A write is submitted at the store's full depth: from now on, until no write is in flight, the rate of writes
    /// measures the store's bandwidth.
    pub fn write_started(&mut self, now: Tick) {
        self.busy_since.get_or_insert(now);
    }

    /// A write of `pages` pages ended, with `left` writes still in flight.
    pub fn write_ended(&mut self, pages: u64, left: u32, now: Tick) {
        if let Some(since) = self.busy_since {
            self.sample_pages += pages;
            self.sample_us += now.since_us(since);
            self.busy_since = (left > 0).then_some(now);
        }
        if self.sample_us >= SAMPLE_US {
            let sample = self.sample_pages * US_PER_SECOND / self.sample_us;
            // Moving average: after three samples seven eighths of a change are in.
            self.bandwidth = if self.bandwidth == 0 { sample } else { (self.bandwidth + sample) / 2 };
            (self.sample_us, self.sample_pages) = (0, 0);
            let pages = self.bandwidth.saturating_mul(self.target_us) / US_PER_SECOND;
            let pages = u32::try_from(pages).unwrap_or(u32::MAX);
            self.limit = pages.max(LIMIT_PAGES_MIN).min(self.pages_max);
        }
    }

    /// Microseconds by which to delay the completion of a write of `sectors` while `dirty_or_writeback` pages are dirty
    /// or under write-back. 0 up to the setpoint; from there to the limit it rises with the third power to
    /// [`DELAY_FACTOR_MAX`] times what the store needs for the write.
    pub fn delay_us(&self, dirty_or_writeback: u32, sectors: u64) -> u64 {
        let setpoint = self.setpoint_pages();
        if dirty_or_writeback <= setpoint || self.bandwidth == 0 {
            return 0;
        }
        // How far it is from the setpoint to the limit, in fixed point.
        let over = u64::from(dirty_or_writeback - setpoint) * ONE / u64::from((self.limit - setpoint).max(1));
        let over = over.min(ONE);
        let cube = over * over / ONE * over / ONE;
        let service_us = sectors * US_PER_SECOND / (self.bandwidth * SECTORS_PER_PAGE);
        (service_us * DELAY_FACTOR_MAX * cube / ONE).min(DELAY_US_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(pages_per_second: u64) -> Throttle {
        let mut throttle = Throttle::new(250_000, 1 << 20);
        let mut now = Tick(0);
        for _ in 0..16 {
            throttle.write_started(now);
            now = now.plus_us(SAMPLE_US);
            throttle.write_ended(pages_per_second * SAMPLE_US / US_PER_SECOND, 0, now);
        }
        throttle
    }

    #[test]
    fn the_limit_is_what_the_store_writes_in_the_flush_target() {
        assert_eq!(measured(100_000).limit_pages(), 25_000);
        assert_eq!(measured(100).limit_pages(), LIMIT_PAGES_MIN);
        assert_eq!(Throttle::new(250_000, 500).limit_pages(), 500);
    }

    #[test]
    fn idle_time_does_not_lower_the_bandwidth() {
        let mut throttle = Throttle::new(250_000, 1 << 20);
        for second in 0..100 {
            let start = Tick(second * US_PER_SECOND);
            throttle.write_started(start);
            throttle.write_ended(1000, 0, start.plus_us(10_000));
        }
        assert_eq!(throttle.limit_pages(), 25_000);
    }

    #[test]
    fn delays_rise_monotonically_from_zero_to_their_bound() {
        let throttle = measured(100_000);
        let limit = throttle.limit_pages();
        assert_eq!(throttle.delay_us(limit / 2, 8), 0);
        let delays: Vec<_> = (70..=100).map(|percent| throttle.delay_us(limit / 100 * percent, 256)).collect();
        assert!(delays.is_sorted(), "{delays:?}");
        // 32 pages at 10 us each.
        assert_eq!(*delays.last().unwrap(), 32 * 10 * DELAY_FACTOR_MAX);
        assert_eq!(throttle.delay_us(limit, 1 << 20), DELAY_US_MAX);
    }
}
