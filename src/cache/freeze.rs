//! A freeze lets another program copy the image: all completed writes are durable on the store, and the store does not
//! change until the thaw.
//!
//! A freeze begins like a FLUSH. From then on no write, discard or zero is admitted: they stall, as they do while the
//! cache is full. The FLUSH is repeated until nothing is dirty, under write-back or unsynced; then the cache is frozen.
//! While it is frozen, it starts no operation that changes the store. A write that a guest began before the freeze may
//! complete after it: its pages stay dirty until the thaw, and a FLUSH that covers them waits until then.
//!
//! A freeze has a deadline, counted from its start: the guest's writes wait no longer than that, even if the requester
//! has ended.

use crate::units::{Fault, Tick};

use super::{Notice, PageCache, Ticket};

/// See the documentation of the module.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum FreezeState {
    #[default]
    Off,
    /// Dirty pages are being written. `flushing`: the flush with the ticket is in the queue.
    Draining { ticket: Ticket, until: Tick, holds_reads: bool, flushing: bool },
    /// The store does not change.
    On { until: Tick, holds_reads: bool },
}

impl FreezeState {
    /// Whether writes, discards and zeroes wait.
    pub fn holds_writes(self) -> bool {
        self != Self::Off
    }

    /// Whether reads wait.
    pub fn holds_reads(self) -> bool {
        matches!(self, Self::Draining { holds_reads: true, .. } | Self::On { holds_reads: true, .. })
    }

    /// Whether the store must not change.
    pub fn is_on(self) -> bool {
        matches!(self, Self::On { .. })
    }

    /// When the freeze ends without a thaw.
    pub fn until(self) -> Option<Tick> {
        match self {
            Self::Off => None,
            Self::Draining { until, .. } | Self::On { until, .. } => Some(until),
        }
    }

    /// Whether the flush with this ticket belongs to the freeze.
    pub fn is_freeze_flush(self, flush: Ticket) -> bool {
        matches!(self, Self::Draining { ticket, flushing: true, .. } if ticket == flush)
    }
}

impl PageCache {
    /// Freezes the cache until [`PageCache::thaw`], but at most until `until`; a [`Notice::Done`] reports that it is
    /// frozen, or the fault. `holds_reads`: reads wait too.
    pub fn freeze(&mut self, ticket: Ticket, until: Tick, holds_reads: bool) {
        if self.freeze.holds_writes() {
            self.notices.push(Notice::Done(ticket, Err(Fault::Invalid)));
            return;
        }
        if self.refuse_while_stopped(ticket) {
            return;
        }
        self.freeze = FreezeState::Draining { ticket, until, holds_reads, flushing: true };
        self.flush(ticket);
    }

    /// Ends a freeze. Returns whether the cache was frozen.
    pub fn thaw(&mut self) -> bool {
        let freeze = std::mem::take(&mut self.freeze);
        if let FreezeState::Draining { ticket, flushing, .. } = freeze {
            if flushing {
                self.withdraw_flush(ticket);
            }
            self.notices.push(Notice::Done(ticket, Err(Fault::TimedOut)));
        }
        if freeze.holds_writes() {
            self.stalled.unblock();
            self.writeback.reset_progress();
        }
        matches!(freeze, FreezeState::On { .. })
    }

    /// Whether the store does not change.
    pub fn is_frozen(&self) -> bool {
        matches!(self.freeze, FreezeState::On { .. })
    }

    /// The flush of a freeze has ended.
    pub(super) fn freeze_flushed(&mut self, result: Result<(), Fault>) {
        let FreezeState::Draining { ticket, flushing, .. } = &mut self.freeze else { return };
        *flushing = false;
        if result.is_err() {
            self.notices.push(Notice::Done(*ticket, result));
            self.freeze = FreezeState::Off;
            self.stalled.unblock();
        }
    }

    /// Whether no operation changes the store, and everything is durable.
    fn is_drained(&self) -> bool {
        self.is_durable() && self.store_ops.changes() == 0 && self.ranges.is_empty()
    }

    /// Freezes a cache with nothing left to write, flushes any other, and ends a freeze whose deadline has passed.
    pub(super) fn advance_freeze(&mut self) {
        if self.freeze.until().is_some_and(|until| until <= self.now) {
            self.thaw();
        }
        let FreezeState::Draining { ticket, until, holds_reads, flushing: false } = self.freeze else { return };
        if self.is_drained() {
            self.freeze = FreezeState::On { until, holds_reads };
            self.notices.push(Notice::Done(ticket, Ok(())));
        } else if let Some(fault) = self.health.stopped() {
            self.freeze_flushed(Err(fault));
        } else if self.pages.dirty().oldest().is_some() || !self.flushing.nothing_unsynced() {
            self.freeze = FreezeState::Draining { ticket, until, holds_reads, flushing: true };
            self.flush(ticket);
            // No request or completion needs to follow.
            self.writeback.request_turn();
        }
    }
}
