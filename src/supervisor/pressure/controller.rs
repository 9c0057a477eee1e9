//! Decides how far the caches shrink under memory pressure. It does no I/O; its only clock is the time of the samples.
//!
//! The caches have levels: at level 0 each has its configured size, at [`LEVELS`] its `size_min`, and in between a part
//! of the difference. Each sample under pressure raises the level by one. After a calm period it falls again step by
//! step, as long as there is memory for the next step. Pressure that returns doubles the calm period, so that caches
//! which cause the pressure themselves do not oscillate.

use std::path::PathBuf;
use std::time::Duration;

/// The level at which the caches have their least sizes.
pub(super) const LEVELS: u32 = 16;

/// Samples that are further apart are not compared: the process was stopped, or the host was suspended.
const GAP_MAX: Duration = Duration::from_secs(5);
/// A sample that follows the last one sooner is ignored.
const GAP_MIN: Duration = Duration::from_millis(200);
/// From this share of the time on, in thousandths, in which tasks wait for memory, there is pressure.
const PRESSURE_PER_MILLE: u128 = 100;
/// Below this share there is none.
const CALM_PER_MILLE: u128 = 10;
/// This many consecutive samples above the threshold begin a period of pressure: one may be a coincidence.
const SAMPLES_TO_BEGIN: u32 = 2;
/// The calm period before the caches grow; at first, and at most.
const CALM_MIN: Duration = Duration::from_secs(10);
const CALM_MAX: Duration = Duration::from_secs(320);
/// Pressure that begins this soon after the last period has returned.
const RETURN_MAX: Duration = Duration::from_secs(300);

/// The indicators of memory pressure at one time.
#[derive(Clone, Debug, Default)]
pub(super) struct Sample {
    /// When, by a monotonic clock.
    pub now: Duration,
    /// The total time for which tasks have waited for memory, by the file that reports it.
    pub stalled: Vec<(PathBuf, Duration)>,
    /// The file of a memory.high that is reached.
    pub reached_limit: Option<PathBuf>,
}

/// What two samples show.
#[derive(Debug, PartialEq, Eq)]
enum Reading {
    /// Pressure, for this reason.
    Pressure(String),
    /// Neither pressure nor calm, or the samples cannot be compared.
    Unclear,
    Calm,
}

/// A change for the log and the events.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PressureChange {
    /// Pressure has begun, for this reason, and the caches begin to shrink.
    Began(String),
    /// The caches have their configured sizes again, this long after the begin.
    Ended(Duration),
}

/// See the module.
#[derive(Debug)]
pub(super) struct PressureController {
    level: u32,
    last: Option<Sample>,
    /// Number of consecutive samples under pressure.
    pressured: u32,
    calm_since: Option<Duration>,
    /// The calm period before the caches grow.
    calm_needed: Duration,
    /// Whether the caches have grown since the last sample under pressure.
    has_grown: bool,
    began: Duration,
    ended: Option<Duration>,
}

impl PressureController {
    pub fn new() -> Self {
        Self {
            level: 0,
            last: None,
            pressured: 0,
            calm_since: None,
            calm_needed: CALM_MIN,
            has_grown: false,
            began: Duration::ZERO,
            ended: None,
        }
    }

    /// The present level: 0 to [`LEVELS`].
    pub fn level(&self) -> u32 {
        self.level
    }

    /// Processes a sample. `has_room` returns whether there is memory for the caches at a lower level; it is called
    /// before they grow.
    pub fn advance(&mut self, sample: Sample, has_room: impl FnOnce(u32) -> bool) -> Option<PressureChange> {
        let now = sample.now;
        let is_too_soon = |last: &Sample| now >= last.now && now - last.now < GAP_MIN;
        if self.last.as_ref().is_some_and(is_too_soon) {
            return None;
        }
        let reading = self.last.as_ref().map_or(Reading::Unclear, |last| judge(last, &sample));
        self.last = Some(sample);
        match reading {
            Reading::Pressure(reason) => self.shrink(now, reason),
            Reading::Unclear => {
                (self.pressured, self.calm_since) = (0, None);
                None
            }
            Reading::Calm => {
                self.pressured = 0;
                let since = *self.calm_since.get_or_insert(now);
                let is_due = self.level > 0 && now.saturating_sub(since) >= self.calm_needed;
                if is_due && has_room(self.level - 1) { self.grow(now) } else { None }
            }
        }
    }

    fn shrink(&mut self, now: Duration, reason: String) -> Option<PressureChange> {
        self.calm_since = None;
        self.pressured = self.pressured.saturating_add(1);
        if self.level == 0 && self.pressured < SAMPLES_TO_BEGIN {
            return None;
        }
        if self.level == 0 && self.ended.is_some_and(|ended| now.saturating_sub(ended) > RETURN_MAX) {
            (self.calm_needed, self.has_grown) = (CALM_MIN, false);
        }
        if std::mem::take(&mut self.has_grown) {
            self.calm_needed = (self.calm_needed * 2).min(CALM_MAX);
        }
        let begins = self.level == 0;
        self.level = (self.level + 1).min(LEVELS);
        if begins {
            self.began = now;
        }
        begins.then_some(PressureChange::Began(reason))
    }

    fn grow(&mut self, now: Duration) -> Option<PressureChange> {
        self.level -= 1;
        self.has_grown = true;
        if self.level > 0 {
            return None;
        }
        self.ended = Some(now);
        Some(PressureChange::Ended(now.saturating_sub(self.began)))
    }
}

/// Compares two samples.
fn judge(last: &Sample, sample: &Sample) -> Reading {
    let Some(elapsed) = sample.now.checked_sub(last.now).filter(|elapsed| *elapsed <= GAP_MAX) else {
        return Reading::Unclear;
    };
    if let Some(limit) = &sample.reached_limit {
        return Reading::Pressure(format!("{} is reached", limit.display()));
    }
    let mut worst: Option<(u128, &PathBuf)> = None;
    for (file, total) in &sample.stalled {
        let before = last.stalled.iter().find(|(other, _)| other == file).map(|(_, before)| *before);
        // A control group that was created again starts at 0.
        let Some(stalled) = before.and_then(|before| total.checked_sub(before)) else { return Reading::Unclear };
        let share = stalled.as_nanos() * 1000 / elapsed.as_nanos().max(1);
        if worst.is_none_or(|(most, _)| share > most) {
            worst = Some((share, file));
        }
    }
    match worst {
        Some((share, file)) if share >= PRESSURE_PER_MILLE => {
            let percent = share.min(1000) / 10;
            Reading::Pressure(format!("tasks wait for memory {percent} % of the time ({})", file.display()))
        }
        Some((share, _)) if share >= CALM_PER_MILLE => Reading::Unclear,
        // Without indicators there is no pressure.
        _ => Reading::Calm,
    }
}

/// The size of a cache at a level, in whole huge pages.
pub(super) fn size_at(level: u32, size_bytes: u64, size_min_bytes: u64) -> u64 {
    const STEP_BYTES: u128 = 2 << 20;
    let span = u128::from(size_bytes.saturating_sub(size_min_bytes));
    let kept = span * u128::from(LEVELS.saturating_sub(level)) / u128::from(LEVELS);
    let bytes = (u128::from(size_min_bytes) + kept).next_multiple_of(STEP_BYTES);
    if level >= LEVELS { size_min_bytes } else { u64::try_from(bytes).unwrap_or(u64::MAX).min(size_bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A host with its clock and the time for which its tasks have waited.
    struct Host {
        controller: PressureController,
        now: Duration,
        total: Duration,
        limit: Option<PathBuf>,
        has_room: bool,
    }

    impl Host {
        fn new() -> Self {
            let controller = PressureController::new();
            let mut host = Self { controller, now: SECOND, total: SECOND, limit: None, has_room: true };
            assert_eq!(host.sample(), None, "there is nothing to compare with");
            host
        }

        fn sample(&mut self) -> Option<PressureChange> {
            let stalled = vec![("/proc/pressure/memory".into(), self.total)];
            let sample = Sample { now: self.now, stalled, reached_limit: self.limit.clone() };
            let (before, has_room) = (self.controller.level(), self.has_room);
            let change = self.controller.advance(sample, |_| has_room);
            assert!(self.controller.level().abs_diff(before) <= 1 && self.controller.level() <= LEVELS);
            change
        }

        /// A second in which tasks wait for this many milliseconds.
        fn second(&mut self, stalled_ms: u64) -> Option<PressureChange> {
            self.now += SECOND;
            self.total += Duration::from_millis(stalled_ms);
            self.sample()
        }

        /// Seconds of calm until the level falls.
        fn calm_until_growth(&mut self) -> u64 {
            let level = self.controller.level();
            (1..10_000).find(|_| self.second(0).is_some() || self.controller.level() < level).expect("it grows")
        }
    }

    #[test]
    fn caches_shrink_one_step_per_sample_down_to_their_minimum_sizes() {
        let mut host = Host::new();
        assert_eq!(host.second(100), None, "one sample may be a coincidence");
        let began = host.second(300).expect("it has begun");
        assert_eq!(
            began,
            PressureChange::Began("tasks wait for memory 30 % of the time (/proc/pressure/memory)".to_owned())
        );
        for level in 2..100 {
            assert_eq!(host.second(900), None);
            assert_eq!(host.controller.level(), LEVELS.min(level));
        }
    }

    #[test]
    fn caches_grow_back_step_by_step_once_pressure_is_gone() {
        let mut host = Host::new();
        (0..4).for_each(|_| drop(host.second(500)));
        assert_eq!(host.controller.level(), 3);
        assert_eq!(host.calm_until_growth(), 11, "10 s of calm");
        assert_eq!((host.second(0), host.controller.level()), (None, 1));
        assert_eq!(host.second(0), Some(PressureChange::Ended(15 * SECOND)));
        assert_eq!((host.second(0), host.controller.level()), (None, 0));
    }

    #[test]
    fn readings_between_pressure_and_calm_change_nothing() {
        let mut host = Host::new();
        (0..100).for_each(|_| assert_eq!(host.second(50), None));
        assert_eq!(host.controller.level(), 0);
        (0..100).for_each(|_| {
            assert_eq!(host.second(120), None, "not two in a row");
            assert_eq!(host.second(50), None);
        });
        (0..3).for_each(|_| drop(host.second(500)));
        (0..100).for_each(|second| drop(host.second(if second % 9 == 0 { 50 } else { 0 })));
        assert_eq!(host.controller.level(), 2, "10 s of calm in a row are needed");
    }

    #[test]
    fn caches_wait_longer_to_grow_when_pressure_returns() {
        let mut host = Host::new();
        (0..3).for_each(|_| drop(host.second(500)));
        host.has_room = false;
        (0..100).for_each(|_| drop(host.second(0)));
        assert_eq!(host.controller.level(), 2);
        host.has_room = true;
        host.second(0);
        assert_eq!(host.controller.level(), 1);
        for calm in [21, 41, 81, 161, 321, 321] {
            host.second(500);
            assert_eq!(host.calm_until_growth(), calm);
        }
        while host.controller.level() > 0 {
            host.second(0);
        }
        (0..400).for_each(|_| drop(host.second(0)));
        (0..2).for_each(|_| drop(host.second(500)));
        assert_eq!(host.calm_until_growth(), 11, "pressure that begins long after the last one is another one");
    }

    #[test]
    fn a_clock_or_a_total_that_jumps_is_ignored() {
        let mut host = Host::new();
        (0..3).for_each(|_| drop(host.second(500)));
        let level = host.controller.level();
        // The process was stopped for an hour in which tasks waited.
        host.now += Duration::from_secs(3600);
        host.total += Duration::from_secs(3000);
        assert_eq!((host.sample(), host.controller.level()), (None, level));
        // The clock goes back, and two samples come at once.
        host.now -= Duration::from_secs(3000);
        assert_eq!((host.sample(), host.controller.level()), (None, level));
        host.total += SECOND;
        assert_eq!((host.sample(), host.controller.level()), (None, level));
        // A control group that was made anew.
        host.total = Duration::ZERO;
        assert_eq!((host.second(0), host.controller.level()), (None, level));
        assert_eq!(host.calm_until_growth(), 11);
    }

    #[test]
    fn a_reached_limit_counts_as_pressure() {
        let mut host = Host::new();
        host.limit = Some("/sys/fs/cgroup/a/memory.high".into());
        assert_eq!(host.second(0), None);
        let began = PressureChange::Began("/sys/fs/cgroup/a/memory.high is reached".to_owned());
        assert_eq!(host.second(0), Some(began));
        let mut controller = host.controller;
        // The files of the indicators are gone.
        let levels = (1..60).map(|second| {
            controller.advance(Sample { now: host.now + second * SECOND, ..Sample::default() }, |_| true);
            controller.level()
        });
        assert_eq!(levels.last(), Some(0));
    }

    #[test]
    fn cache_sizes_fall_linearly_with_the_pressure_level() {
        let (size, least) = (256 << 20, 64 << 20);
        assert_eq!((size_at(0, size, least), size_at(LEVELS, size, least)), (size, least));
        assert_eq!(size_at(8, size, least), 160 << 20);
        for (size, least) in [(256 << 20, 64 << 20), (4 << 20, 4 << 20), ((5 << 20) + 4096, 4 << 20), (8 << 40, 4096)] {
            let sizes: Vec<u64> = (0..=LEVELS).map(|level| size_at(level, size, least)).collect();
            assert!(sizes.is_sorted_by(|one, next| one >= next), "{sizes:?}");
            assert!(sizes.iter().all(|at| (least..=size).contains(at) && at % 4096 == 0), "{sizes:?}");
        }
    }
}
