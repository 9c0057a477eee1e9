//! A store whose writes fail: which requests wait, which fail, when writes are retried, and when the store is healthy
//! again.
//!
//! Under every policy the pages stay dirty in their frames. The policy decides whether requests that need the store
//! fail or wait meanwhile. Reads of pages in memory always continue.

use crate::fault_injection::{PlantedBug, planted};
use crate::units::{Fault, Tick};

use super::{ErrorPolicy, Notice, PageCache, Ticket};

/// Pause after the first failed write; it doubles with every further failure.
const BACKOFF_US_MIN: u64 = 100_000;
/// Longest pause after a failed write.
const BACKOFF_US_MAX: u64 = 5_000_000;
/// A turn this much later than its deadline means that the process was stopped (SIGSTOP, cgroup freezer), not that the
/// host is busy.
const STOPPED_US_MIN: u64 = 1_000_000;

/// Whether the store's writes succeed, for the operator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// They succeed.
    #[default]
    Healthy,
    /// They fail, and requests that need the store fail.
    Reporting(Fault),
    /// They fail, and requests that need the store wait.
    Holding(Fault),
    /// They failed, and the store gets no more operations until [`PageCache::resume`].
    Stopped(Fault),
}

/// An event to report to the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthEvent {
    /// The store's health has changed.
    Health(Health),
    /// The store can't reserve space: a full disk makes write-back fail, not the guest's write.
    NoReservations,
}

/// The failed operation, by how it recovers; of several failures the last one in this list counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cause {
    /// The allocation of space for a write that has not completed: only a successful allocation clears it.
    Allocate,
    /// A write: the next successful write clears it, or a Sync.
    Write,
    /// A Sync, or a zero that it should have made durable: only a successful Sync clears it.
    Sync,
}

/// A failure that has not been cleared.
#[derive(Clone, Copy, Debug)]
struct StoreFailure {
    cause: Cause,
    since: Tick,
    retry_at: Tick,
    backoff_us: u64,
    /// The requests that wait for space have been resumed since `retry_at`.
    resumed_waiters: bool,
}

impl StoreFailure {
    fn lacks_space(&self) -> bool {
        self.cause == Cause::Allocate
    }
}

/// The health of a store, and the failure behind it.
#[derive(Debug, Default)]
pub(super) struct StoreHealth {
    failure: Option<StoreFailure>,
    /// Also healthy after the operator resumed the store, until the next write.
    current: Health,
    /// The health that was last reported to the operator.
    last_reported: Health,
    /// The operator resumed the store: the result is reported even if the health is unchanged.
    resumed: bool,
}

impl StoreHealth {
    /// The fault with which requests that need more space fail now; `None` while the store is healthy, or while they
    /// wait.
    pub fn space_refused(&self) -> Option<Fault> {
        match self.current {
            Health::Reporting(fault) | Health::Stopped(fault) => Some(fault),
            Health::Healthy | Health::Holding(_) => None,
        }
    }

    /// The fault with which all requests that need the store fail now. A full store still accepts writes to allocated
    /// pages.
    pub fn refused(&self) -> Option<Fault> {
        self.space_refused().filter(|_| self.stopped().is_some() || !self.lacks_space())
    }

    /// Whether the only failure is that of space allocations.
    fn lacks_space(&self) -> bool {
        self.failure.as_ref().is_some_and(StoreFailure::lacks_space)
    }

    /// Whether requests that need the store wait.
    pub fn holding(&self) -> bool {
        matches!(self.current, Health::Holding(_))
    }

    /// The fault for which the store gets no more operations.
    pub fn stopped(&self) -> Option<Fault> {
        match self.current {
            Health::Stopped(fault) => Some(fault),
            _ => None,
        }
    }

    /// An operation of this kind has succeeded, and no page remains whose write failed.
    pub fn clear_failure(&mut self, succeeded: Cause) {
        let clears = self.failure.is_some_and(|StoreFailure { cause, .. }| match cause {
            Cause::Sync => succeeded == Cause::Sync,
            Cause::Write => succeeded != Cause::Allocate,
            // A successful write of other pages frees no space for the requests that wait for it: they stay held.
            Cause::Allocate => succeeded == Cause::Allocate,
        });
        if clears && self.stopped().is_none() {
            self.failure = None;
            self.current = Health::Healthy;
        }
    }

    /// Whether a Sync waits for the end of the pause. It does not if requests are held only for lack of space.
    pub fn holds_syncs(&self) -> bool {
        self.holding() && !self.lacks_space()
    }

    /// Whether writes are held for lack of space.
    pub fn waits_for_space(&self) -> bool {
        self.holding() && self.lacks_space()
    }

    /// Ends the pause: failed operations may be retried now.
    pub fn retry_now(&mut self, now: Tick) {
        if let Some(failure) = &mut self.failure {
            failure.retry_at = now;
            failure.resumed_waiters = false;
        }
    }

    /// Whether requests that wait for space are to be resumed: once after each pause. While their allocations are in
    /// flight they would only stall again, turn after turn.
    pub fn take_space_retry(&mut self, now: Tick) -> bool {
        let is_due = self.waits_for_space() && self.may_retry(now);
        if planted(PlantedBug::SpaceIsRetriedEveryTurn) {
            return is_due;
        }
        is_due && self.failure.as_mut().is_some_and(|failure| !std::mem::replace(&mut failure.resumed_waiters, true))
    }

    /// Whether failed operations may be retried now.
    pub fn may_retry(&self, now: Tick) -> bool {
        self.stopped().is_none() && self.failure.is_none_or(|failure| failure.retry_at <= now)
    }

    /// When failed operations are retried.
    pub fn retry_at(&self) -> Option<Tick> {
        self.failure.map(|failure| failure.retry_at).filter(|_| self.stopped().is_none())
    }
}

impl PageCache {
    /// Sets the time to `now`.
    ///
    /// => Time in which the process was stopped does not count as time in which requests were held. Failed operations
    ///    are retried immediately, and at least half of the hold time remains for that.
    pub(super) fn advance_clock(&mut self, now: Tick) {
        let hold_us = self.hold_us();
        // Also after a resume by the operator: if the next attempt fails, the hold continues.
        let may_hold = matches!(self.health.current, Health::Holding(_) | Health::Healthy);
        if may_hold
            && !planted(PlantedBug::StopUsesUpHold)
            && let Some(failure) = &mut self.health.failure
        {
            let hold_ends = failure.since.plus_us(hold_us);
            let due = if failure.retry_at > self.now { failure.retry_at.min(hold_ends) } else { hold_ends };
            let late_us = now.since_us(due.max(self.now));
            if late_us >= STOPPED_US_MIN {
                let half_held = now.minus_us(hold_us / 2);
                failure.since = failure.since.plus_us(late_us).max(half_held);
                failure.retry_at = failure.retry_at.min(now);
            }
        }
        self.now = self.now.max(now);
    }

    /// A write, a Sync or an allocation failed: sets the pause before the next attempt, and the health according to the
    /// policy.
    pub(super) fn store_failed(&mut self, fault: Fault, cause: Cause) {
        let now = self.now;
        // A lack of space that is older than the longest pause is a new failure: space may have been free meanwhile.
        let is_recent =
            |failure: &StoreFailure| !failure.lacks_space() || now.since_us(failure.retry_at) <= BACKOFF_US_MAX;
        let earlier = self.health.failure.filter(is_recent);
        let (since, backoff_us) = match earlier {
            // Several writes of one attempt fail together, which counts as one failure.
            Some(StoreFailure { since, retry_at, backoff_us, .. }) if now < retry_at => (since, backoff_us),
            Some(StoreFailure { since, backoff_us, .. }) => (since, (backoff_us * 2).min(BACKOFF_US_MAX)),
            None => (now, BACKOFF_US_MIN),
        };
        let worst = earlier.map_or(cause, |failure| failure.cause.max(cause));
        let retry_at = now.plus_us(backoff_us);
        self.health.failure = Some(StoreFailure { cause: worst, since, retry_at, backoff_us, resumed_waiters: false });
        let policy = if fault == Fault::NoSpace { self.settings.on_full } else { self.settings.on_error };
        let health = match policy {
            _ if self.health.stopped().is_some() => return,
            ErrorPolicy::Hold if now.since_us(since) < self.hold_us() => Health::Holding(fault),
            ErrorPolicy::Hold | ErrorPolicy::Report => Health::Reporting(fault),
            ErrorPolicy::Stop => Health::Stopped(fault),
        };
        self.health.current = health;
        // The Sync should have made durable the data of every waiting FLUSH, or part of it.
        if cause == Cause::Sync && matches!(health, Health::Reporting(_)) {
            self.fail_all_flushes(fault);
        }
        if policy == ErrorPolicy::Stop {
            self.fail_all_flushes(fault);
            self.fail_waiting_ranges(fault);
            self.stalled.unblock();
        }
    }

    /// A write or Sync has succeeded: the store is healthy if no page remains whose write failed.
    pub(super) fn store_succeeded(&mut self, cause: Cause) {
        if self.pages.dirty().failed_pages() == 0 {
            self.health.clear_failure(cause);
        }
    }

    /// How long requests wait for a failing store.
    fn hold_us(&self) -> u64 {
        if planted(PlantedBug::HoldNeverEnds) {
            u64::MAX / 2
        } else if planted(PlantedBug::HoldFailsAtOnce) {
            0
        } else {
            self.settings.hold_us
        }
    }

    /// Ends the hold if it has lasted long enough: waiting requests fail from now on.
    pub(super) fn end_hold(&mut self) {
        if let Health::Holding(fault) = self.health.current
            && self.hold_ends().is_some_and(|end| end <= self.now)
        {
            self.health.current = Health::Reporting(fault);
            if self.health.refused().is_some() {
                self.fail_all_flushes(fault);
            }
            // Stalled requests fail when they are retried.
            self.stalled.unblock();
        }
    }

    /// When the requests that wait for the store will fail.
    pub(super) fn hold_ends(&self) -> Option<Tick> {
        self.health.failure.filter(|_| self.health.holding()).map(|failure| failure.since.plus_us(self.hold_us()))
    }

    /// The operator resumed the store: retries the failed operations immediately.
    pub fn resume(&mut self) {
        self.health.resumed = self.health.current != Health::Healthy;
        self.health.current = Health::Healthy;
        self.health.retry_now(self.now);
        self.stalled.unblock();
    }

    /// Whether the store's writes succeed.
    pub fn health(&self) -> Health {
        self.health.current
    }

    /// Takes the next event that has not been reported to the operator.
    pub fn take_health_event(&mut self) -> Option<HealthEvent> {
        if self.allocating.take_unsupported() {
            return Some(HealthEvent::NoReservations);
        }
        let health = self.health.current;
        // Resumed, and no operation has been tried since.
        let undecided = health == Health::Healthy && self.health.failure.is_some();
        let changed = self.health.last_reported != health;
        if undecided || !changed && !self.health.resumed {
            return None;
        }
        self.health.resumed = false;
        self.health.last_reported = health;
        Some(HealthEvent::Health(health))
    }

    /// Fails a request that would change the store while the store is stopped; returns whether it did.
    pub(super) fn refuse_while_stopped(&mut self, ticket: Ticket) -> bool {
        let stopped = self.health.stopped();
        self.notices.extend(stopped.map(|fault| Notice::Done(ticket, Err(fault))));
        stopped.is_some()
    }
}
