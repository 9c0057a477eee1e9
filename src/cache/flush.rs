//! FLUSH: everything written before it is on the store, and the store has been last_reported to make it durable.
//!
//! A flush closes the current epoch, waits until nothing of that epoch or an older one is dirty or being written, and
//! then for a Sync that was submitted after the last such write ended. One Sync is in op at a time and serves all
//! flushes that wait (group commit). A flush with nothing written since the last good Sync completes at once.
//!
//! Failures: a write that fails fails the flushes of its epoch, and its pages stay dirty. A Sync that fails is never
//! taken for retryable: everything written since the last good Sync is in doubt, becomes dirty again, and is written
//! again (we still hold the bytes, because such pages are not evicted).

use std::collections::VecDeque;

use crate::units::{Epoch, Fault, OpKind, PageId, PageNo, SectorSpan};

use super::pages::{Flags, UNSYNCED};
use super::store_health::Cause;
use super::store_ops::{Outcome, StoreOp};
use super::{Notice, PageCache, Ticket};

/// A flush that waits.
#[derive(Clone, Copy, Debug)]
struct Flush {
    ticket: Ticket,
    upto: Epoch,
    /// Once everything up to `upto` is written: how many writes a Sync must cover.
    needs: Option<u64>,
}

/// The flushes that wait, and what is written but not yet durable.
#[derive(Debug, Default)]
pub(super) struct Flushing {
    queue: VecDeque<Flush>,
    /// Writes (and zeros, and discards) that have ended well.
    written: u64,
    /// How many of those a good Sync covers.
    stable: u64,
    /// The Sync in op covers this many.
    syncing: Option<u64>,
    /// Pages written since the last good Sync. While a Sync is in op, what it covers is in the one list and what
    /// came later in the other; `fresh` says which is the other.
    unsynced: [Vec<PageId>; 2],
    fresh: usize,
    /// A Sync is wanted although no flush waits.
    wanted: bool,
}

impl Flushing {
    /// The last epoch that a flush waits to see written.
    pub fn unwritten_upto(&self) -> Option<Epoch> {
        self.queue.back().filter(|flush| flush.needs.is_none()).map(|flush| flush.upto)
    }

    /// Whether no flush waits.
    pub fn none_waits(&self) -> bool {
        self.queue.is_empty()
    }

    /// Pages can't be evicted for want of a Sync, or have been unstable for long.
    pub fn want_sync(&mut self) {
        self.wanted = true;
    }

    /// Whether a Sync is to be sent although no flush waits.
    pub fn sync_is_due(&self) -> bool {
        self.wanted && self.written > self.stable
    }

    /// Whether a Sync is to be sent, for a flush or for itself.
    pub fn sync_is_awaited(&self) -> bool {
        self.sync_is_due() || self.queue.front().is_some_and(|flush| flush.needs.is_some())
    }

    /// Whether a good Sync covers everything that was written.
    pub fn nothing_unsynced(&self) -> bool {
        self.written == self.stable
    }

    /// A write, zero or discard has ended well.
    pub fn write_done_unsynced(&mut self) {
        self.written += 1;
    }

    /// The list for what lands now.
    pub fn fresh(&self) -> usize {
        self.fresh
    }

    /// Bytes of memory the lists take.
    pub fn metadata_bytes(&self) -> usize {
        (self.unsynced[0].capacity() + self.unsynced[1].capacity()) * size_of::<PageId>()
    }
}

impl PageCache {
    /// Asks for everything written so far to be made durable; [`Notice::Done`] tells the end.
    pub fn flush(&mut self, ticket: Ticket) {
        self.stats.flushes += 1;
        // A flush is a question to the store: what failed before is tried again now.
        self.health.retry_now(self.now);
        if self.refuse_while_stopped(ticket) {
            return;
        }
        self.eager.flushed();
        let upto = self.pages.close_epoch();
        self.flushing.queue.push_back(Flush { ticket, upto, needs: None });
    }

    /// Completes flushes whose turn has come, and sends the Sync they wait for.
    pub(super) fn advance_flushes(&mut self) {
        let redoing = self.ranges.redoing();
        let oldest = self.pages.dirty().oldest();
        let Flushing { queue, written, stable, .. } = &mut self.flushing;
        for flush in queue.iter_mut().filter(|flush| flush.needs.is_none()) {
            if redoing || oldest.is_some_and(|oldest| oldest.at_or_before(flush.upto)) {
                break;
            }
            flush.needs = Some(*written);
        }
        while let Some(flush) = queue.front()
            && flush.needs.is_some_and(|needs| needs <= *stable)
        {
            self.notices.push(Notice::Done(flush.ticket, Ok(())));
            queue.pop_front();
        }
        let waited_for = queue.front().is_some_and(|flush| flush.needs.is_some());
        // A flush that asks gets its answer now; one that is held waits for the pause to end, like everything else.
        let asked = waited_for && !self.health.holds_syncs();
        let due = self.flushing.sync_is_awaited() && self.health.may_retry(self.now);
        if self.flushing.syncing.is_none() && !redoing && (asked || due) {
            self.submit_sync();
        }
    }

    fn submit_sync(&mut self) {
        let flushing = &mut self.flushing;
        flushing.syncing = Some(flushing.written);
        flushing.fresh ^= 1;
        flushing.wanted = false;
        debug_assert!(flushing.unsynced[flushing.fresh].is_empty(), "the last Sync has taken its list");
        self.stats.syncs += 1;
        self.store_ops.submit(StoreOp::without_pages(OpKind::Sync, SectorSpan::new(0, 0)));
    }

    /// The Sync in op has ended.
    pub(super) fn sync_done(&mut self, outcome: &Outcome) {
        let covered = self.flushing.syncing.take().expect("a Sync was in op");
        let old = self.flushing.fresh ^ 1;
        let pages = std::mem::take(&mut self.flushing.unsynced[old]);
        match outcome.fault() {
            None => {
                self.flushing.stable = covered;
                self.store_succeeded(Cause::Sync);
                // Before the pages: one that was written after its range had been zeroed must not be clean while a
                // successor would zero the range.
                self.zeroes_synced(old);
                for id in pages {
                    // Its page may have gone since, and another come.
                    if self.pages[id].is(UNSYNCED[old]) {
                        self.pages.change(id, |page| page.clear(UNSYNCED[old]));
                    }
                }
            }
            Some(fault) => {
                self.rewrite(&pages, UNSYNCED[old]);
                self.redo_zeroes(old);
                self.sync_failed(fault);
            }
        }
    }

    /// The pages that a failed Sync was to make durable are in doubt: they are dirty again.
    fn rewrite(&mut self, pages: &[PageId], flag: Flags) {
        for &id in pages {
            if self.pages[id].is(flag) {
                self.make_dirty_again(id);
                self.pages.change(id, |page| page.clear(flag));
            }
        }
    }

    /// The flushes that still wait, wait for the rewriting and for another Sync.
    fn sync_failed(&mut self, fault: Fault) {
        self.stats.sync_errors += 1;
        self.store_failed(fault, Cause::Sync);
        self.flushing.wanted = true;
        for flush in &mut self.flushing.queue {
            flush.needs = None;
        }
    }

    /// What the page holds may not be on the store after all. It gets an epoch that every waiting flush includes.
    pub(super) fn make_dirty_again(&mut self, id: PageId) {
        let epoch = self.flushing.queue.front().map_or(self.pages.dirty().current(), |flush| flush.upto);
        let beyond = self.pages.beyond_image(self.pages[id].no());
        self.pages.change(id, |page| {
            if page.dirty.is_empty() || epoch.at_or_before(page.epoch) {
                page.epoch = epoch;
            }
            page.dirty = page.valid.without(beyond);
        });
    }

    /// A write of `epoch` failed: so do the flushes that include it.
    pub(super) fn fail_flushes(&mut self, epoch: Epoch, fault: Fault) {
        let notices = &mut self.notices;
        self.flushing.queue.retain(|flush| {
            let fails = epoch.at_or_before(flush.upto);
            if fails {
                notices.push(Notice::Done(flush.ticket, Err(fault)));
            }
            !fails
        });
    }

    /// Nothing that waits will come.
    pub(super) fn fail_all_flushes(&mut self, fault: Fault) {
        let failed = self.flushing.queue.drain(..).map(|flush| Notice::Done(flush.ticket, Err(fault)));
        self.notices.extend(failed);
    }

    /// The page was written: it may not be evicted before a good Sync.
    pub(super) fn mark_unsynced(&mut self, id: PageId) {
        let fresh = self.flushing.fresh;
        if !self.pages[id].is(UNSYNCED[fresh]) {
            self.pages.change(id, |page| page.set(UNSYNCED[fresh]));
            let list = &mut self.flushing.unsynced[fresh];
            list.push(id);
            if list.len() >= self.pages.frames().total() as usize / 8 {
                self.flushing.want_sync();
            }
        }
    }

    /// Pages in a range that is zeroed again, and that were written after it had been zeroed, are written again.
    pub(super) fn redirty_unsynced(&mut self, pages: impl Iterator<Item = PageNo>) {
        for no in pages {
            if let Some(id) = self.pages.find(no)
                && self.pages[id].is_unsynced()
            {
                self.make_dirty_again(id);
            }
        }
    }
}
