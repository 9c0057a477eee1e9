//! The conditions that a simulated world must satisfy: progress, the age limit, and the state after a power cut.

use crate::cache::{Attempt, Health};
use crate::units::{SECTORS_PER_PAGE, SectorSpan, Tick};

use super::{Guest, GuestOp, World};

/// The longest pause before the cache retries a failed disk.
const RETRY_PAUSE_US_MAX: u64 = 5_000_000;
/// Steps of the liveness phase after which a request that is still in flight counts as stuck.
const LIVENESS_STEPS_MAX: u64 = 200_000;
/// Consecutive turns at one time, due but without progress, after which a worker counts as spinning. Fewer are
/// legitimate: a background sweep that makes room for delayed writes passes all dirty groups twice, in 64 turns each.
const IDLE_TURNS_MAX: u32 = 200;
/// The write-back of all dirty data at the age limit, and the Sync after it, take at most as long as this many
/// operations.
const AGE_SLACK: u64 = 100;

impl World {
    /// After a Sync, the disk durably holds what the frame of the Sync's witness holds.
    pub(super) fn check_witness(&mut self) {
        let Some((no, frame)) = self.cache.take_witness().filter(|_| !self.memory.has_crashed()) else { return };
        let first = (no.0 * SECTORS_PER_PAGE - self.base) as usize;
        for sector in 0..SECTORS_PER_PAGE as usize {
            let (cached, durable) = (self.memory.get(frame, sector), self.disk.durable(first + sector));
            assert_eq!(cached, durable, "sector {sector} of {no:?}, the witness, is not on the disk");
        }
        self.counts.witnesses += 1;
    }

    pub(super) fn complete_all_requests(&mut self) {
        let mut steps_left = LIVENESS_STEPS_MAX;
        while !self.requests.is_empty() {
            self.run_step(Guest::Waiting);
            steps_left -= 1;
            let stuck = self.requests.len();
            assert!(steps_left > 0, "liveness: {stuck} requests never complete: {:?}", self.cache.stats());
        }
    }

    /// The guest pauses for longer than the age limit: then all data that it has written must be durable, without a
    /// FLUSH. Not checked in worlds whose disk fails or restarts, or whose daemon crashed: there it may take longer.
    pub(super) fn check_age_limit(&mut self) {
        let may_be_late = self.scenario.daemon_crashes || self.scenario.freezes || self.scenario.restarts;
        if self.failures.has_failed() || may_be_late || self.prng.percent(50) {
            return;
        }
        self.complete_all_requests();
        let (stopped, limit_us) =
            (self.step + 1, self.settings.dirty_age_us + AGE_SLACK * self.scenario.latency_us_max);
        let end_us = self.now_us + limit_us;
        while self.now_us < end_us && self.has_work_before(end_us) {
            self.run_step(Guest::Waiting);
        }
        self.now_us = self.now_us.max(end_us);
        if !self.failures.has_failed() {
            self.oracle.complete_age(stopped);
            self.check_power_cut();
        }
    }

    /// Whether an operation or a deadline of the cache comes before `end_us`.
    pub(super) fn has_work_before(&self, end_us: u64) -> bool {
        !self.operations.is_empty() || self.cache.next_deadline().is_some_and(|at| at < Tick::from_us(end_us))
    }

    /// Whether the cache requests a turn now.
    pub(super) fn is_turn_due(&self) -> bool {
        self.cache.next_deadline().is_some_and(|at| at <= Tick::from_us(self.now_us))
    }

    /// Takes turns like a worker that sleeps only if nothing is due: each of the first few must make progress, unless
    /// none is due any more.
    pub(super) fn take_immediate_turns(&mut self) {
        let mut idle_turns = 0;
        while !self.memory.has_crashed() && (!self.resumable.is_empty() || self.is_turn_due()) {
            let before = self.progress;
            for ticket in std::mem::take(&mut self.resumable) {
                self.admit(ticket, Attempt::Resumed);
            }
            self.end_turn();
            idle_turns = if self.progress == before { idle_turns + 1 } else { 0 };
            assert!(
                idle_turns < IDLE_TURNS_MAX,
                "liveness: a worker spins at {} us without serving {:?}",
                self.now_us,
                self.requests
            );
        }
    }

    /// A request in flight waits for an operation, for a copy, or for the cache's next deadline. A deadline counts if
    /// it is due, or if the disk is failing and the deadline ends the pause before the next attempt.
    /// [`World::take_immediate_turns`] checks that a due deadline makes progress.
    pub(super) fn assert_progress_possible(&self) {
        let by_guest = !self.copies.is_empty() || !self.resumable.is_empty() || !self.pending_completions.is_empty();
        let is_active = !self.operations.is_empty() || by_guest;
        let (deadline, due) = (self.cache.next_deadline(), self.is_turn_due());
        let latest_retry = self.now_us + RETRY_PAUSE_US_MAX;
        let retries =
            self.cache.health() != Health::Healthy && deadline.is_some_and(|at| at <= Tick::from_us(latest_retry));
        let thaws = self.cache.is_frozen();
        let progresses = is_active || due || retries || thaws || self.requests.is_empty();
        assert!(progresses, "liveness: no operation and no deadline will serve {:?}", self.requests);
        // Timers are for pauses after a failure, and for writes that wait in memory. A FLUSH on a healthy disk must not
        // wait for one.
        let flushes = self.requests.values().any(|request| request.op == GuestOp::Flush);
        let waits_for_timer = flushes && !is_active && !due && !thaws && !self.failures.has_failed();
        assert!(!waits_for_timer, "a FLUSH waits until {deadline:?}, now {}: {:?}", self.now_us, self.requests);
    }

    /// Checks a state that may remain on the disk after a power cut now, and returns it. The world itself continues
    /// unchanged.
    pub(super) fn check_power_cut(&mut self) -> Vec<u32> {
        let Self { disk, prng, .. } = self;
        let versions: Vec<u32> = (0..disk.sectors()).map(|sector| disk.after_power_cut(sector, prng)).collect();
        if self.reset.is_some() {
            return versions;
        }
        for (sector, &left) in versions.iter().enumerate() {
            assert!(
                self.oracle.may_survive(sector, left),
                "after a power cut sector {sector} (page {}) holds version {left}: {:?}",
                sector / 8,
                self.oracle.knowledge(sector, 1)
            );
        }
        versions
    }

    /// Prints an event if it touches the traced sector.
    pub(super) fn trace(&self, span: SectorSpan, event: impl FnOnce() -> String) {
        if self.traced_sector.is_some_and(|sector| span.count == 0 || (span.start..span.end()).contains(&sector)) {
            println!("step {} at {} us: {}", self.step, self.now_us, event());
        }
    }
}
