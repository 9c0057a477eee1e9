//! Decides which guest requests may fail: without a disk fault none, after a fault only those that the error policy
//! allows.
//!
//! The oracle is lenient: once a fault has permitted failures, later ones are permitted too, although the disk may have
//! recovered.

use crate::cache::{ErrorPolicy, Settings};
use crate::units::{Fault, OpKind, Tick};

/// The disk faults so far.
#[derive(Debug, Default)]
pub(super) struct FailureOracle {
    /// Time of the last failed read.
    read_failed: Option<Tick>,
    /// Time of the last failed range operation.
    range_failed: Option<Tick>,
    /// Time of the first failure to store data under the policy `hold`.
    held_since: Option<Tick>,
    /// Storing data has failed under the policy `report`.
    reported: bool,
    /// Storing data has failed under the policy `stop`.
    stopped: bool,
}

/// Guest requests by the operations whose failure makes them fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestClass {
    Read,
    Write,
    /// Zero and discard.
    Range,
    Flush,
}

impl FailureOracle {
    /// Records that a store operation has failed.
    pub fn record_failure(&mut self, kind: OpKind, fault: Fault, settings: &Settings, now: Tick) {
        match kind {
            OpKind::Read => self.read_failed = Some(now),
            // The cache reads the pages that it cannot map: no request fails.
            OpKind::Map => return,
            OpKind::Zero { .. } | OpKind::Discard => self.range_failed = Some(now),
            OpKind::Write | OpKind::Sync | OpKind::Allocate => {}
        }
        // With blocks larger than a sector, a write needs a read of the rest of its block: such a read is subject to
        // the error policy, like a zero that is repeated after a failed Sync.
        let completes_blocks = kind == OpKind::Read && settings.block_sectors > 1;
        if !completes_blocks && matches!(kind, OpKind::Read | OpKind::Discard) {
            return;
        }
        match if fault == Fault::NoSpace { settings.on_full } else { settings.on_error } {
            ErrorPolicy::Report => self.reported = true,
            ErrorPolicy::Hold => self.held_since = self.held_since.or(Some(now)),
            ErrorPolicy::Stop => self.stopped = true,
        }
    }

    /// The daemon was stopped from `before` to `now`: half of the hold time remains of a hold that had not ended.
    pub fn record_sigstop(&mut self, before: Tick, settings: &Settings, now: Tick) {
        if let Some(since) = &mut self.held_since
            && before.since_us(*since) < settings.hold_us
        {
            *since = (*since).max(now.minus_us(settings.hold_us / 2));
        }
    }

    /// Whether the disk has failed an operation that stores data, or that a request waits for.
    pub fn has_failed(&self) -> bool {
        let stored = self.held_since.is_some() || self.reported || self.stopped;
        stored || self.read_failed.is_some() || self.range_failed.is_some()
    }

    /// Whether a request sent at `sent` may fail at `now`.
    pub fn may_fail(&self, class: RequestClass, sent: Tick, settings: &Settings, now: Tick) -> bool {
        let hold_expired = self.held_since.is_some_and(|since| now.since_us(since) >= settings.hold_us);
        let since_sent = |failed: Option<Tick>| failed.is_some_and(|at| at >= sent);
        self.stopped
            || match class {
                RequestClass::Read => since_sent(self.read_failed),
                // A zero without a free zero slot waits for the Sync that frees one, and fails with it.
                RequestClass::Range => since_sent(self.range_failed) || self.reported || hold_expired,
                RequestClass::Write | RequestClass::Flush => self.reported || hold_expired,
            }
    }
}
