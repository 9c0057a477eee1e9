//! A store that fails to take writes: what waits, what fails, when it is tried again, and when it is well.
//!
//! The pages stay dirty, whatever the policy: we still hold the bytes. What differs is what becomes of the requests that
//! need the store meanwhile. Reads of what is in memory go on in every case.

use crate::units::{Fault, Tick};

use super::{ErrorPolicy, Notice, PageCache, PlantedBug, Ticket};

/// Pause after a failed write: from this, doubling ...
const BACKOFF_US_MIN: u64 = 100_000;
/// ... to this.
const BACKOFF_US_MAX: u64 = 5_000_000;

/// How the store takes our writes, for the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// As it should.
    Healthy,
    /// It fails, and requests that need it fail.
    Reporting(Fault),
    /// It fails, and requests that need it wait.
    Holding(Fault),
    /// It failed, and is left alone until somebody says [`PageCache::resume`].
    Stopped(Fault),
}

/// What the operator is to hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthEvent {
    /// The store's condition has changed.
    Health(Health),
    /// The store can't reserve space: a full disk is met when pages are written back.
    NoReservations,
}

/// What failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// A write: the next one that ends well heals it.
    Write,
    /// A Sync, or a zero that it was to make durable: only a good Sync heals it.
    Sync,
    /// Space for a write that has not completed.
    Allocate,
}

/// A failure that has not healed.
#[derive(Clone, Copy, Debug)]
struct Failure {
    cause: Cause,
    since: Tick,
    retry_at: Tick,
    backoff_us: u64,
}

impl Failure {
    fn is_of_space(&self) -> bool {
        self.cause == Cause::Allocate
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct StoreHealth {
    failure: Option<Failure>,
    condition: Option<Health>,
    /// The condition that the operator was last last_reported of.
    last_reported: Option<Health>,
    /// The operator resumed it, and what comes of that is to be last_reported even if it is the same again.
    resumed: bool,
}

impl StoreHealth {
    fn health(&self) -> Health {
        self.condition.unwrap_or(Health::Healthy)
    }

    /// The fault by which requests fail now that need more space; none while it is well, or while they wait.
    pub fn space_refused(&self) -> Option<Fault> {
        match self.health() {
            Health::Reporting(fault) | Health::Stopped(fault) => Some(fault),
            Health::Healthy | Health::Holding(_) => None,
        }
    }

    /// The same of all that need the store. A full store takes what has its space.
    pub fn reported(&self) -> Option<Fault> {
        self.space_refused().filter(|_| self.stopped().is_some() || !self.wants_space())
    }

    /// Whether all that fails is to get more space.
    fn wants_space(&self) -> bool {
        self.failure.as_ref().is_some_and(Failure::is_of_space)
    }

    /// Whether requests that need the store wait.
    pub fn holding(&self) -> bool {
        matches!(self.health(), Health::Holding(_))
    }

    /// The fault for which the store is left alone.
    pub fn stopped(&self) -> Option<Fault> {
        match self.health() {
            Health::Stopped(fault) => Some(fault),
            _ => None,
        }
    }

    /// What fails for this cause has gone well, and nothing of it is left that had failed.
    pub fn clear_failure(&mut self, well: Cause) {
        let heals = self.failure.is_some_and(|Failure { cause, .. }| match cause {
            Cause::Sync => well == Cause::Sync,
            Cause::Write => well != Cause::Allocate,
            // That others are written gives no space to those who are held for it: their time goes on.
            Cause::Allocate => well == Cause::Allocate,
        });
        if heals && self.stopped().is_none() {
            self.failure = None;
            self.condition = None;
        }
    }

    /// Whether a Sync waits for the end of the pause: who is held for want of space is nothing to it.
    pub fn holds_syncs(&self) -> bool {
        self.holding() && !self.wants_space()
    }

    /// Whether writes are held for want of space.
    pub fn waits_for_space(&self) -> bool {
        self.holding() && self.wants_space()
    }

    /// A FLUSH asks again what the store says, whatever the pause.
    pub fn retry_now(&mut self, now: Tick) {
        if let Some(failure) = &mut self.failure {
            failure.retry_at = now;
        }
    }

    /// Whether what failed may be tried now.
    pub fn may_retry(&self, now: Tick) -> bool {
        self.stopped().is_none() && self.failure.is_none_or(|failure| failure.retry_at <= now)
    }

    /// When what failed is tried again.
    pub fn retry_at(&self) -> Option<Tick> {
        self.failure.map(|failure| failure.retry_at).filter(|_| self.stopped().is_none())
    }
}

impl PageCache {
    /// A write of ours failed, or a Sync: wait before the next try, and decide what becomes of the requests that need it.
    pub(super) fn store_failed(&mut self, fault: Fault, cause: Cause) {
        let now = self.now;
        // If nobody has asked for space for so long, it may have been there meanwhile.
        let goes_on = |failure: &Failure| !failure.is_of_space() || now.since_us(failure.retry_at) <= BACKOFF_US_MAX;
        let earlier = self.health.failure.filter(goes_on);
        let (since, backoff_us) = match earlier {
            // Several writes of one try fail together: that is one failure.
            Some(Failure { since, retry_at, backoff_us, .. }) if now < retry_at => (since, backoff_us),
            Some(Failure { since, backoff_us, .. }) => (since, (backoff_us * 2).min(BACKOFF_US_MAX)),
            None => (now, BACKOFF_US_MIN),
        };
        // The gravest of several counts.
        let earlier = earlier.map_or(cause, |failure| failure.cause);
        let grave = [Cause::Sync, Cause::Write].into_iter().find(|&grave| cause == grave || earlier == grave);
        let gravest = grave.unwrap_or(Cause::Allocate);
        self.health.failure = Some(Failure { cause: gravest, since, retry_at: now.plus_us(backoff_us), backoff_us });
        let policy = if fault == Fault::NoSpace { self.settings.on_full } else { self.settings.on_error };
        let condition = match policy {
            _ if self.health.stopped().is_some() => return,
            ErrorPolicy::Hold if now.since_us(since) < self.hold_us() => Health::Holding(fault),
            ErrorPolicy::Hold | ErrorPolicy::Report => Health::Reporting(fault),
            ErrorPolicy::Stop => Health::Stopped(fault),
        };
        self.health.condition = Some(condition);
        // A Sync covers what every FLUSH that waits has to see durable, or some of it.
        if cause == Cause::Sync && matches!(condition, Health::Reporting(_)) {
            self.fail_all_flushes(fault);
        }
        if policy == ErrorPolicy::Stop {
            self.fail_all_flushes(fault);
            self.fail_waiting_ranges(fault);
            self.stalled.unblock();
        }
    }

    /// The store has done what had failed for this cause; once no page is left that had, it is well.
    pub(super) fn store_succeeded(&mut self, cause: Cause) {
        if self.pages.dirty().failed_pages() == 0 {
            self.health.clear_failure(cause);
        }
    }

    /// How long requests wait for a store.
    fn hold_us(&self) -> u64 {
        if self.planted(PlantedBug::HoldNeverEnds) {
            u64::MAX / 2
        } else if self.planted(PlantedBug::HoldReports) {
            0
        } else {
            self.settings.hold_us
        }
    }

    /// Requests have waited for the store long enough.
    pub(super) fn end_hold(&mut self) {
        if let Health::Holding(fault) = self.health.health()
            && self.hold_ends().is_some_and(|end| end <= self.now)
        {
            self.health.condition = Some(Health::Reporting(fault));
            if self.health.reported().is_some() {
                self.fail_all_flushes(fault);
            }
            // What has stalled finds out when it resumes.
            self.stalled.unblock();
        }
    }

    /// When the requests that wait for the store are to fail.
    pub(super) fn hold_ends(&self) -> Option<Tick> {
        self.health.failure.filter(|_| self.health.holding()).map(|failure| failure.since.plus_us(self.hold_us()))
    }

    /// The operator says that the store is well again: what failed is tried at once.
    pub fn resume(&mut self) {
        self.health.resumed = self.health.health() != Health::Healthy;
        self.health.condition = None;
        self.health.retry_now(self.now);
        self.stalled.unblock();
    }

    /// How the store takes our writes.
    pub fn health(&self) -> Health {
        self.health.health()
    }

    /// What the operator has not been last_reported yet.
    pub fn take_health_event(&mut self) -> Option<HealthEvent> {
        if self.allocating.take_unsupported() {
            return Some(HealthEvent::NoReservations);
        }
        let condition = self.health.health();
        // Resumed, and not tried yet.
        let undecided = condition == Health::Healthy && self.health.failure.is_some();
        let changed = self.health.last_reported.unwrap_or(Health::Healthy) != condition;
        if undecided || !changed && !self.health.resumed {
            return None;
        }
        self.health.resumed = false;
        self.health.last_reported = Some(condition);
        Some(HealthEvent::Health(condition))
    }

    /// A request that would change the store is refused while it is left alone: says so, and returns true.
    pub(super) fn refuse_while_stopped(&mut self, ticket: Ticket) -> bool {
        let stopped = self.health.stopped();
        self.notices.extend(stopped.map(|fault| Notice::Done(ticket, Err(fault))));
        stopped.is_some()
    }
}
