//! How much may be dirty: as much as the store writes in the flush target, so that FLUSH latency is bounded by
//! construction; and how writers are slowed before they meet that limit.

use crate::units::{SECTORS_PER_PAGE, Tick, low_u32};

/// The limit is never below this (16 MiB), unless the cache itself is small.
const LIMIT_PAGES_MIN: u32 = 4096;
/// Length of a bandwidth sample, in time with writes in op.
const SAMPLE_US: u64 = 200_000;
/// Background write-back starts at this share of the limit, in percent, and stops at [`STOP_PERCENT`].
const START_PERCENT: u32 = 40;
/// See [`START_PERCENT`].
const STOP_PERCENT: u32 = 20;
/// A delayed completion waits no longer than this.
const DELAY_US_MAX: u64 = 100_000;

/// The dirty limit and the measurements behind it.
#[derive(Debug)]
pub(super) struct Throttle {
    target_us: u64,
    pages_max: u32,
    limit: u32,
    /// Pages a second, smoothed; 0: not measured yet.
    bandwidth: u64,
    /// Writes have been in op since then.
    busy_since: Option<Tick>,
    busy_us: u64,
    pages: u64,
}

impl Throttle {
    /// => Until a bandwidth has been measured the limit is `pages_max`.
    pub fn new(target_us: u64, pages_max: u32) -> Self {
        Self { target_us, pages_max, limit: pages_max, bandwidth: 0, busy_since: None, busy_us: 0, pages: 0 }
    }

    /// Most pages that may be dirty or on their way to the store.
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

    /// Above this many pages the completions of writes are delayed: the middle between start and limit.
    pub fn setpoint_pages(&self) -> u32 {
        (self.start_pages() + self.limit) / 2
    }

    fn percent(&self, percent: u32) -> u32 {
        low_u32(u64::from(self.limit) * u64::from(percent) / 100)
    }

    /// Writes are sent to the store as fast as it takes them, until none is in op.
    pub fn write_started(&mut self, now: Tick) {
        self.busy_since.get_or_insert(now);
    }

    /// A write of `pages` pages ended, with `left` still in op.
    pub fn write_ended(&mut self, pages: u64, left: u32, now: Tick) {
        if let Some(since) = self.busy_since {
            self.pages += pages;
            self.busy_us += now.since_us(since);
            self.busy_since = (left > 0).then_some(now);
        }
        if self.busy_us >= SAMPLE_US {
            let sample = self.pages * 1_000_000 / self.busy_us;
            // Half of what is new, so that three samples tell a changed disk.
            self.bandwidth = if self.bandwidth == 0 { sample } else { (self.bandwidth + sample) / 2 };
            (self.busy_us, self.pages) = (0, 0);
            let pages = self.bandwidth.saturating_mul(self.target_us) / 1_000_000;
            let pages = u32::try_from(pages).unwrap_or(u32::MAX);
            self.limit = pages.max(LIMIT_PAGES_MIN).min(self.pages_max);
        }
    }

    /// How long the completion of a write of `sectors` is held back with `dirty_or_writeback` pages not clean: nothing below the
    /// setpoint, then rising with the third power to four times what the store needs.
    pub fn delay_us(&self, dirty_or_writeback: u32, sectors: u64) -> u64 {
        let setpoint = self.setpoint_pages();
        if dirty_or_writeback <= setpoint || self.bandwidth == 0 {
            return 0;
        }
        // In 1/1024: a share of the way from the setpoint to the limit.
        let over = u64::from(dirty_or_writeback - setpoint) * 1024 / u64::from((self.limit - setpoint).max(1));
        let over = over.min(1024);
        let cube = over * over / 1024 * over / 1024;
        let service_us = sectors * 1_000_000 / (self.bandwidth * SECTORS_PER_PAGE);
        (service_us * 4 * cube / 1024).min(DELAY_US_MAX)
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
            throttle.write_ended(pages_per_second * SAMPLE_US / 1_000_000, 0, now);
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
    fn idle_time_does_not_count_as_slowness() {
        let mut throttle = Throttle::new(250_000, 1 << 20);
        for second in 0..100 {
            let start = Tick(second * 1_000_000);
            throttle.write_started(start);
            throttle.write_ended(1000, 0, start.plus_us(10_000));
        }
        assert_eq!(throttle.limit_pages(), 25_000);
    }

    #[test]
    fn delays_rise_smoothly_from_nothing_to_the_bound() {
        let throttle = measured(100_000);
        let limit = throttle.limit_pages();
        assert_eq!(throttle.delay_us(limit / 2, 8), 0);
        let delays: Vec<_> = (70..=100).map(|percent| throttle.delay_us(limit / 100 * percent, 256)).collect();
        assert!(delays.is_sorted(), "{delays:?}");
        assert_eq!(*delays.last().unwrap(), 32 * 10 * 4);
        assert_eq!(throttle.delay_us(limit, 1 << 20), DELAY_US_MAX);
    }
}
