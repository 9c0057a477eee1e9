//! FLUSH: writes all earlier guest writes to the store, and has the store make them durable.
//!
//! A flush closes the current epoch. It waits until no page of that epoch or an older one is dirty or under write-back,
//! and then for a Sync that was submitted after the last such write had ended (I8). There is one Sync at a time, and it
//! serves all waiting flushes (group commit). If nothing was written since the last successful Sync, a flush completes
//! immediately.
//!
//! A failed write fails the flushes of its epoch, and its pages stay dirty. A failed Sync is not retried as if nothing
//! had happened. The device may have been reset, or the kernel may have dropped the pages, so every write since the
//! last successful Sync is in doubt: those that the Sync was to cover, those that completed later, and those in flight.
//! All of them become dirty again and are written again (pages that no Sync covers are not evicted). A failed write may
//! also be the sign of a reset, and puts the same writes in doubt. Before it is retried, a Sync makes the others
//! durable: otherwise a page that fails forever would put them in doubt forever.
//!
//! If the server of a remote store was restarted, the next Sync fails with [`Fault::Lost`]. The same writes are then in
//! doubt, but the store works again: they are written again, and no request fails.
//!
//! A device that resets fails a write and loses what it had not made durable; a Sync that follows succeeds, and may be
//! reaped before the write that failed. A FLUSH does not wait for that failure: it would have to wait for every write
//! in flight. But the pages that the Sync covers stay in doubt, and in memory, until each write, zero and discard that
//! was in flight when the Sync ended has ended too. If one of them reports a reset, the pages are written again. Until
//! then a power cut could lose data that the FLUSH reported as durable.

use std::collections::VecDeque;

use crate::fault_injection::{PlantedBug, planted};
use crate::units::{Epoch, Fault, OpKind, PageId, SectorSpan};

use super::pages::UNSYNCED;
use super::store_health::Cause;
use super::store_ops::{Outcome, StoreOp};
use super::{Notice, PageCache, Ticket};

/// A Sync is due when more than one in this many frames hold pages that no Sync covers, because those cannot be
/// evicted.
const UNSYNCED_DIVISOR: u32 = 8;

/// A waiting flush.
#[derive(Clone, Copy, Debug)]
struct Flush {
    ticket: Ticket,
    /// The last epoch that it includes.
    up_to: Epoch,
    /// Set once everything up to that epoch is written: the value that [`FlushState::synced`] must reach.
    needs: Option<u64>,
}

/// The waiting flushes, and the data that is written but not yet durable.
#[derive(Debug)]
pub(super) struct FlushState {
    queue: VecDeque<Flush>,
    /// Writes, zeros and discards that have succeeded.
    written: u64,
    /// How many of them the last successful Sync covers.
    synced: u64,
    /// How many of them the Sync in flight covers.
    syncing: Option<u64>,
    /// Operations that were in flight when the last Sync succeeded and have not ended. Any of them may report a reset
    /// that the Sync did not; the pages of the Sync stay in doubt until this is 0. `None`: no page is in doubt.
    confirming: Option<usize>,
    /// Number of successful Syncs. An operation that was submitted before the last one may report a reset that preceded
    /// that Sync.
    successes: u64,
    /// Pages written since the last successful Sync. While a Sync is in flight or in doubt, one list has the pages that
    /// it covers; the other one, list `fresh`, has those that were written later.
    unsynced: [Vec<PageId>; 2],
    fresh: usize,
    /// A Sync should be submitted although no flush waits for it.
    sync_requested: bool,
    /// A write has failed since the last successful Sync.
    must_sync_before_retry: bool,
    /// How often all unsynced pages were put in doubt. An operation that was submitted before the last time is in doubt
    /// too.
    doubts: u32,
    /// See `witness.rs`.
    witness: Option<PageId>,
}

impl Default for FlushState {
    /// => The first flush of a cache submits a Sync: the image may hold writes of the previous daemon, or of another
    ///    process, that no Sync covers and that the guest can read.
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            written: 1,
            synced: 0,
            syncing: None,
            confirming: None,
            successes: 0,
            unsynced: Default::default(),
            fresh: 0,
            sync_requested: false,
            must_sync_before_retry: false,
            doubts: 0,
            witness: None,
        }
    }
}

impl FlushState {
    /// The last epoch whose write-back a flush still waits for.
    pub fn unwritten_up_to(&self) -> Option<Epoch> {
        self.queue.back().filter(|flush| flush.needs.is_none()).map(|flush| flush.up_to)
    }

    /// Whether no flush waits.
    pub fn no_flush_waits(&self) -> bool {
        self.queue.is_empty()
    }

    /// Requests a Sync: pages can't be evicted before it, or have been unsynced for long.
    pub fn request_sync(&mut self) {
        self.sync_requested = true;
    }

    /// Whether a Sync is to be submitted although no flush waits.
    pub fn sync_is_due(&self) -> bool {
        self.sync_requested && self.written > self.synced
    }

    /// Whether a Sync is to be submitted, for a flush or without one.
    pub fn needs_sync(&self) -> bool {
        self.sync_is_due() || self.queue.front().is_some_and(|flush| flush.needs.is_some())
    }

    /// Whether the pages that the last Sync covers are still in doubt.
    pub fn is_confirming(&self) -> bool {
        self.confirming.is_some()
    }

    /// Whether a successful Sync covers everything that was written.
    pub fn nothing_unsynced(&self) -> bool {
        self.written == self.synced
    }

    /// Counts a write, zero or discard that has succeeded.
    pub fn note_unsynced_write(&mut self) {
        self.written += 1;
    }

    /// The list for pages whose write has just ended.
    pub fn fresh(&self) -> usize {
        self.fresh
    }

    /// A write has failed: a Sync must cover the successful writes before it is retried.
    pub fn sync_before_retry(&mut self) {
        self.must_sync_before_retry = true;
    }

    /// Whether a failed write may be retried: another failure would put few writes in doubt.
    pub fn may_retry(&self) -> bool {
        !self.must_sync_before_retry || self.nothing_unsynced()
    }

    /// Whether some data that this cache has written is not durable.
    pub fn has_unsynced(&self) -> bool {
        // The initial 1 in `written` stands for the earlier contents of the image.
        self.written > self.synced.max(1)
    }

    /// See [`PageCache::is_in_doubt`].
    pub fn doubts(&self) -> u32 {
        self.doubts
    }

    /// Number of successful Syncs; see [`StoreOp::syncs`].
    pub fn successes(&self) -> u64 {
        self.successes
    }

    /// See `witness.rs`.
    pub fn take_witness(&mut self) -> Option<PageId> {
        self.witness.take()
    }

    /// Bytes of memory that the lists take.
    pub fn metadata_bytes(&self) -> usize {
        (self.unsynced[0].capacity() + self.unsynced[1].capacity()) * size_of::<PageId>()
    }
}

impl PageCache {
    /// Makes all earlier writes durable; a [`Notice::Done`] reports the end.
    pub fn flush(&mut self, ticket: Ticket) {
        self.stats.flushes += 1;
        // The guest needs the result now: retry the writes that failed before.
        self.health.retry_now(self.now);
        if self.refuse_while_stopped(ticket) {
            return;
        }
        self.eager.flushed();
        let up_to = self.pages.close_epoch();
        self.flushing.queue.push_back(Flush { ticket, up_to, needs: None });
    }

    /// Completes the flushes whose conditions are met, and submits the Sync that others wait for.
    pub(super) fn advance_flushes(&mut self) {
        let redoing = self.ranges.is_redoing_zeroes();
        let oldest = self.pages.dirty().oldest();
        let FlushState { queue, written, .. } = &mut self.flushing;
        for flush in queue.iter_mut().filter(|flush| flush.needs.is_none()) {
            if redoing || oldest.is_some_and(|oldest| oldest.at_or_before(flush.up_to)) {
                break;
            }
            flush.needs = Some(*written);
        }
        while let Some(flush) = self.flushing.queue.front()
            && flush.needs.is_some_and(|needs| needs <= self.flushing.synced)
        {
            let ticket = flush.ticket;
            self.flushing.queue.pop_front();
            self.end_flush(ticket, Ok(()));
        }
        let a_flush_waits = self.flushing.queue.front().is_some_and(|flush| flush.needs.is_some());
        // A flush does not wait for the pause after a failure to end, unless the store's health holds it like all other
        // requests.
        let asked = a_flush_waits && !self.health.holds_syncs();
        let due = self.flushing.needs_sync() && self.health.may_retry(self.now);
        if self.flushing.syncing.is_none() && !redoing && (asked || due) && !self.must_confirm_first() {
            self.submit_sync();
        }
    }

    /// Whether so many pages of the last Sync are in doubt that the next Sync must wait until they are confirmed.
    fn must_confirm_first(&self) -> bool {
        let FlushState { confirming, fresh, unsynced, .. } = &self.flushing;
        confirming.is_some() && unsynced[fresh ^ 1].len() >= (self.pages.frames().total() / UNSYNCED_DIVISOR) as usize
    }

    fn submit_sync(&mut self) {
        self.carry_over_unconfirmed();
        let flushing = &mut self.flushing;
        flushing.syncing = Some(flushing.written);
        flushing.fresh ^= 1;
        flushing.sync_requested = false;
        debug_assert!(flushing.unsynced[flushing.fresh].is_empty(), "the end of the last Sync takes its list");
        self.stats.syncs += 1;
        self.submit_op(StoreOp::without_pages(OpKind::Sync, SectorSpan::new(0, 0)));
    }

    /// The next Sync covers the pages that the last one has left in doubt, like those written since.
    fn carry_over_unconfirmed(&mut self) {
        if self.flushing.confirming.take().is_none() {
            return;
        }
        let (fresh, old) = (self.flushing.fresh, self.flushing.fresh ^ 1);
        for id in std::mem::take(&mut self.flushing.unsynced[old]) {
            // The slot may be free meanwhile, or have another page.
            if self.pages[id].is(UNSYNCED[old]) {
                if !self.pages[id].is(UNSYNCED[fresh]) {
                    self.flushing.unsynced[fresh].push(id);
                }
                self.pages.change(id, |page| {
                    page.set(UNSYNCED[fresh]);
                    page.clear(UNSYNCED[old]);
                });
            }
        }
        self.pending_zeroes.join_lists(old, fresh);
        self.changed_ranges.join_lists(old);
    }

    /// The Sync has ended.
    pub(super) fn sync_done(&mut self, outcome: &Outcome) {
        let covered = self.flushing.syncing.take().expect("a Sync was in flight");
        match outcome.fault() {
            None => {
                self.flushing.synced = covered;
                self.flushing.must_sync_before_retry = false;
                self.store_succeeded(Cause::Sync);
                self.flushing.successes += 1;
                self.flushing.confirming = Some(self.store_ops.iter().filter(|op| op.may_report_reset()).count());
                self.confirm_sync();
            }
            Some(fault) => {
                if fault != Fault::Lost || !planted(PlantedBug::LostIsNotDoubted) {
                    self.doubt_unsynced(self.flushing.successes);
                }
                self.sync_failed(fault);
            }
        }
    }

    /// An operation has ended and is handled: the confirmation of the last Sync may have waited for it.
    pub(super) fn op_ended(&mut self, op: &StoreOp) {
        let was_in_flight = op.may_report_reset() && op.syncs < self.flushing.successes;
        if let Some(ops) = self.flushing.confirming.as_mut().filter(|_| was_in_flight) {
            *ops -= 1;
            self.confirm_sync();
        }
    }

    /// Confirms the pages of the last Sync, once no operation in flight could report a reset before it.
    fn confirm_sync(&mut self) {
        if self.flushing.confirming != Some(0) && !planted(PlantedBug::SyncCountsAtOnce) {
            return;
        }
        self.flushing.confirming = None;
        let old = self.flushing.fresh ^ 1;
        // Before the pages: a page that was written after its range had been zeroed must not be clean while the range
        // is still recorded, or the next daemon would zero it.
        self.zeroes_synced(old);
        self.changes_synced(old);
        let synced = std::mem::take(&mut self.flushing.unsynced[old]);
        for &id in &synced {
            // The slot may be free meanwhile, or have another page.
            if self.pages[id].is(UNSYNCED[old]) {
                self.page_synced(id, old);
            }
        }
        self.flushing.witness = self.choose_witness(&synced);
    }

    /// A Sync covers the page. A page that a range operation is changing on the store must not become clean.
    fn page_synced(&mut self, id: PageId, old: usize) {
        let no = self.pages[id].no();
        let (changing, beyond) = (self.ranges.changing(no), self.pages.beyond_image(no));
        let is_empty = self.pages.change(id, |page| {
            page.clear(UNSYNCED[old]);
            if !page.is_unsynced() {
                page.valid = page.valid.without(changing.without(page.dirty));
            }
            page.dirty.is_empty() && page.valid.without(beyond).is_empty()
        });
        if is_empty {
            self.remove_page(id);
        }
    }

    /// Everything that no successful Sync covers may be lost: it is written or zeroed again. Operations in flight are
    /// in doubt when they complete ([`PageCache::is_in_doubt`]).
    ///
    /// => `syncs`: how many Syncs had succeeded when the failed operation was submitted. If fewer than now, the pages
    ///    that the last Sync covers may be lost too.
    pub(super) fn doubt_unsynced(&mut self, syncs: u64) {
        let flushing = &mut self.flushing;
        flushing.doubts = flushing.doubts.wrapping_add(1);
        let is_confirmed = flushing.confirming.is_some() && syncs == flushing.successes;
        if !is_confirmed {
            flushing.confirming = None;
        }
        let (fresh, old) = (flushing.fresh, flushing.fresh ^ 1);
        let lists = match () {
            () if planted(PlantedBug::SyncDoubtsTooLittle) => vec![old],
            () if is_confirmed => vec![fresh],
            () => vec![old, fresh],
        };
        for list in lists {
            let flag = UNSYNCED[list];
            for id in std::mem::take(&mut self.flushing.unsynced[list]) {
                // The page may have been removed, and its slot reused.
                if self.pages[id].is(flag) {
                    self.make_dirty_again(id);
                    self.pages.change(id, |page| page.clear(flag));
                }
            }
            self.redo_zeroes(list);
            self.doubt_changed_ranges(list);
        }
        if !is_confirmed {
            self.changed_ranges.join_lists(old);
        }
        // Waiting flushes wait for the rewrite and for another Sync.
        for flush in &mut self.flushing.queue {
            flush.needs = None;
        }
    }

    /// Whether everything unsynced was put in doubt while this operation, which has succeeded, was in flight.
    pub(super) fn is_in_doubt(&self, op: &StoreOp) -> bool {
        op.doubts != self.flushing.doubts && !planted(PlantedBug::InFlightIsTrusted)
    }

    /// A Sync has failed: requests another one, and reports the failure to the store's health.
    ///
    /// => [`Fault::Lost`]: the store works again. The lost data is written again immediately, and no request fails.
    fn sync_failed(&mut self, fault: Fault) {
        self.stats.sync_errors += 1;
        if fault != Fault::Lost {
            self.store_failed(fault, Cause::Sync);
        }
        self.flushing.sync_requested = true;
    }

    /// Makes all of a page dirty again, because the store may lack it. It gets an epoch that every waiting flush
    /// includes.
    pub(super) fn make_dirty_again(&mut self, id: PageId) {
        let epoch = self.epoch_for_rewriting();
        self.forget_unread(id);
        let beyond = self.pages.beyond_image(self.pages[id].no());
        self.pages.change(id, |page| {
            if page.dirty.is_empty() || epoch.at_or_before(page.epoch) {
                page.epoch = epoch;
            }
            page.dirty = page.valid.without(beyond);
        });
    }

    /// Gives a dirty page an epoch that every waiting flush includes.
    pub(super) fn include_in_flushes(&mut self, id: PageId) {
        let epoch = self.epoch_for_rewriting();
        if epoch.at_or_before(self.pages[id].epoch) {
            self.pages.change(id, |page| page.epoch = epoch);
        }
    }

    /// An epoch that every waiting flush includes.
    pub(super) fn epoch_for_rewriting(&self) -> Epoch {
        self.flushing.queue.front().map_or(self.pages.dirty().current(), |flush| flush.up_to)
    }

    /// The epoch of a page whose write-back failed: its own. If it has failed for so long that the comparison of epochs
    /// would soon wrap, it gets a newer epoch, so that later flushes still include it.
    pub(super) fn epoch_after_failure(&self, epoch: Epoch) -> Epoch {
        if epoch.is_about_to_wrap(self.pages.dirty().current()) { self.epoch_for_rewriting() } else { epoch }
    }

    /// Fails the flushes that include a write of `epoch`.
    pub(super) fn fail_flushes(&mut self, epoch: Epoch, fault: Fault) {
        let mut failed = Vec::new();
        self.flushing.queue.retain(|flush| {
            let fails = epoch.at_or_before(flush.up_to);
            if fails {
                failed.push(flush.ticket);
            }
            !fails
        });
        failed.into_iter().for_each(|ticket| self.end_flush(ticket, Err(fault)));
    }

    /// Reports the end of a flush. For the flush of a freeze, that is when the cache is frozen.
    fn end_flush(&mut self, ticket: Ticket, result: Result<(), Fault>) {
        if self.freeze.is_freeze_flush(ticket) {
            self.freeze_flushed(result);
        } else {
            self.notices.push(Notice::Done(ticket, result));
        }
    }

    /// Removes a waiting flush without a notice.
    pub(super) fn withdraw_flush(&mut self, ticket: Ticket) {
        self.flushing.queue.retain(|flush| flush.ticket != ticket);
    }

    /// Fails all waiting flushes.
    pub(super) fn fail_all_flushes(&mut self, fault: Fault) {
        while let Some(flush) = self.flushing.queue.pop_front() {
            self.end_flush(flush.ticket, Err(fault));
        }
    }

    /// The page was written to the store: it may not be evicted before a successful Sync covers it.
    pub(super) fn mark_unsynced(&mut self, id: PageId) {
        let fresh = self.flushing.fresh;
        if !self.pages[id].is(UNSYNCED[fresh]) {
            self.pages.change(id, |page| page.set(UNSYNCED[fresh]));
            let list = &mut self.flushing.unsynced[fresh];
            list.push(id);
            if list.len() >= (self.pages.frames().total() / UNSYNCED_DIVISOR) as usize {
                self.flushing.request_sync();
            }
        }
    }
}
