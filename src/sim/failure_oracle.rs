//! What a request may fail of: without a fault of the disk nothing fails, and with one only what the policy gives up.
//!
//! It errs on the side of the cache: a failure stays a reason for all that fails later, although it may have healed.

use crate::cache::{ErrorPolicy, Settings};
use crate::units::{Fault, OpKind, Tick};

/// The disk's faults so far.
#[derive(Debug, Default)]
pub(super) struct FailureOracle {
    /// When a read last failed ...
    reads: Option<Tick>,
    /// ... and a range operation.
    ranges: Option<Tick>,
    /// When what is written could first not be stored, and the policy was to wait ...
    held: Option<Tick>,
    /// ... and whether it could not and the policy was another.
    reported: bool,
    stopped: bool,
}

/// What a request that fails had asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Read,
    Write,
    Range,
    Flush,
}

impl FailureOracle {
    /// An operation has failed.
    pub fn failed(&mut self, kind: OpKind, fault: Fault, settings: &Settings, now: Tick) {
        match kind {
            OpKind::Read => self.reads = Some(now),
            // What is not mapped is read; that fails no request.
            OpKind::Map => return,
            OpKind::Zero { .. } | OpKind::Discard => self.ranges = Some(now),
            OpKind::Write | OpKind::Sync | OpKind::Allocate => {}
        }
        // A zero that is done again after a failed Sync answers to the policy, as the Sync does, and so does a read of what a
        // page lacks that can't be written without it.
        let fills = kind == OpKind::Read && settings.block_sectors > 1;
        if !fills && matches!(kind, OpKind::Read | OpKind::Discard) {
            return;
        }
        match if fault == Fault::NoSpace { settings.on_full } else { settings.on_error } {
            ErrorPolicy::Report => self.reported = true,
            ErrorPolicy::Hold => self.held = self.held.or(Some(now)),
            ErrorPolicy::Stop => self.stopped = true,
        }
    }

    /// Whether a request sent at `sent` may fail now.
    pub fn may_fail(&self, asked: Asked, sent: Tick, settings: &Settings, now: Tick) -> bool {
        let waited_out = self.held.is_some_and(|since| now.since_us(since) >= settings.hold_us);
        let since = |failed: Option<Tick>| failed.is_some_and(|at| at >= sent);
        self.stopped
            || match asked {
                Asked::Read => since(self.reads),
                // A zero that finds no place to be noted fails if the Sync that would free one does.
                Asked::Range => since(self.ranges) || self.reported || waited_out,
                Asked::Write | Asked::Flush => self.reported || waited_out,
            }
    }
}
