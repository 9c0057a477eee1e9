//! WRITE_ZEROES and DISCARD: operations on a range, without data.
//!
//! A range operation locks its pages: it starts when no page in the range is busy, and requests that touch the range
//! wait until it ends. The pages stay unchanged meanwhile, so that a failure loses nothing. At the end the pages inside
//! the range are removed, and in a page at its border the part inside is zeroed. A discard affects whole pages only,
//! whose contents are undefined afterwards. A zero stays recorded until it is durable (`pending_zeroes.rs`).
//!
//! A zero that is repeated, because a Sync has failed or the daemon has died, skips the sectors of its range that were
//! written since: they may be durable, and covered by a completed FLUSH. It zeroes the pieces between those sectors one
//! after another.

use crate::fault_injection::{PlantedBug, planted};
use crate::units::{Fault, OpKind, PageId, PageNo, PageSpan, SECTORS_PER_PAGE, SectorMask, SectorSpan, Unmap};

use super::pages::FAILED;
use super::pending_zeroes::{Zero, ZeroSlot};
use super::stalled::StallReason;
use super::store_health::Cause;
use super::store_ops::{Outcome, StoreOp};
use super::{Notice, PageCache, REGION_PAGES, Ticket};

/// Most range operations of guests at a time; further ones stall.
const RANGES_MAX: usize = 64;
/// Limit on the pages of all range operations of guests in progress together: 128 MiB. A single operation may exceed it
/// if it runs alone. Rings stop only when the operations in progress have ended, and the store may have to write all of
/// these zeros. And when an operation starts and when it ends, the cache looks up each page of the page table's blocks
/// that have pages in memory, which takes about 3 ms for this many.
const RANGE_PAGES_MAX: u64 = 1 << 15;

#[derive(Debug)]
struct Range {
    /// The guest's request; `None`: a zero that is repeated after a failed Sync, or by the next daemon.
    ticket: Option<Ticket>,
    span: SectorSpan,
    kind: OpKind,
    started: bool,
    /// The slot in which a zero is recorded, or will be.
    zero_slot: Option<ZeroSlot>,
    /// The range of the store operation. For a repeated zero: the next piece.
    piece: SectorSpan,
    /// Of a repeated zero: the sectors before this one are done.
    repeated_to: u64,
    /// Of a repeated zero: how often everything had been put in doubt when it started. If that happens again, it starts
    /// over.
    doubts: u32,
}

impl Range {
    fn new(ticket: Option<Ticket>, span: SectorSpan, kind: OpKind, zero_slot: Option<ZeroSlot>) -> Self {
        Self { ticket, span, kind, started: false, zero_slot, piece: span, repeated_to: span.start, doubts: 0 }
    }

    /// If this is a zero: the zero, and its slot once it has started.
    fn zero(&self) -> Option<(ZeroSlot, Zero)> {
        match self.kind {
            OpKind::Zero { unmap } => self.zero_slot.map(|slot| (slot, Zero { span: self.span, unmap })),
            _ => None,
        }
    }
}

/// The range operations in flight, and those that wait for their pages.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    list: Vec<Range>,
}

impl Ranges {
    /// Whether a range operation includes the page: then write-back and readahead skip it.
    pub fn contain(&self, no: PageNo) -> bool {
        !self.list.is_empty() && self.list.iter().any(|range| range.span.pages().contains(no))
    }

    /// The range operations that guests wait for: their number, and the sum of their pages.
    fn of_guests(&self) -> (usize, u64) {
        let of_guests = self.list.iter().filter(|range| range.ticket.is_some());
        of_guests.fold((0, 0), |(ranges, pages), range| (ranges + 1, pages + range.span.pages().count))
    }

    /// Whether a zero is to be repeated: until then a Sync makes nothing durable.
    pub fn is_redoing_zeroes(&self) -> bool {
        self.list.iter().any(|range| range.ticket.is_none())
    }

    /// The sectors of a page that the store may be changing for a guest.
    pub fn changing(&self, no: PageNo) -> SectorMask {
        let started = self.list.iter().filter(|range| range.started && range.ticket.is_some());
        started.fold(SectorMask::NONE, |mask, range| mask.or(range.span.sectors_in(no)))
    }

    /// What the store may be discarding.
    pub fn discarding(&self) -> impl Iterator<Item = PageSpan> {
        let started = self.list.iter().filter(|range| range.started && range.kind == OpKind::Discard);
        started.map(|range| range.span.pages())
    }

    /// Whether one touches a sector at or after `sector`.
    pub fn reach_beyond(&self, sector: u64) -> bool {
        self.list.iter().any(|range| range.span.end() > sector)
    }

    /// Whether none is in flight or waits.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Number of range operations that hold a slot for their zero, for the check of the invariants.
    pub fn with_zero_slot(&self) -> usize {
        self.list.iter().filter(|range| range.zero_slot.is_some()).count()
    }
}

impl PageCache {
    /// Makes the span read as zeros; a [`Notice::Done`] reports the end. False: it stalls until a [`Notice::Resume`].
    pub fn zero(&mut self, ticket: Ticket, span: SectorSpan, unmap: Unmap) -> bool {
        let unmap = if self.settings.unmap { unmap } else { Unmap::Forbidden };
        self.start_or_stall(ticket, span, OpKind::Zero { unmap })
    }

    /// Drops the contents of the span; otherwise like [`PageCache::zero`].
    pub fn discard(&mut self, ticket: Ticket, span: SectorSpan) -> bool {
        // Whole pages only. If the image ends within its last page, that page counts as whole.
        let start = span.start.next_multiple_of(SECTORS_PER_PAGE);
        let end = if span.end() == self.settings.image_sectors {
            span.end()
        } else {
            span.end() / SECTORS_PER_PAGE * SECTORS_PER_PAGE
        };
        if start >= end || !self.settings.unmap {
            self.notices.push(Notice::Done(ticket, Ok(())));
            return true;
        }
        self.start_or_stall(ticket, SectorSpan::new(start, end - start), OpKind::Discard)
    }

    fn start_or_stall(&mut self, ticket: Ticket, span: SectorSpan, kind: OpKind) -> bool {
        self.writeback.note_guest_io(self.now);
        if self.refuse_while_stopped(ticket) {
            return true;
        }
        let (ranges, pages) = self.ranges.of_guests();
        if self.freeze.holds_writes()
            || ranges >= RANGES_MAX
            || ranges > 0 && pages + span.pages().count > RANGE_PAGES_MAX
        {
            self.stalled.push(ticket, StallReason::StoreOp);
            return false;
        }
        self.ranges.list.push(Range::new(Some(ticket), span, kind, None));
        true
    }

    /// Repeats a zero that may not be durable.
    pub(super) fn redo_zero(&mut self, span: SectorSpan, unmap: Unmap, zero_slot: ZeroSlot) {
        // Its space may since have been reserved, for pages that are dirty now.
        let keeps_space = self.settings.allocate || !self.settings.unmap;
        let unmap = if keeps_space { Unmap::Forbidden } else { unmap };
        let kind = OpKind::Zero { unmap };
        self.ranges.list.push(Range::new(None, span, kind, Some(zero_slot)));
    }

    /// The next piece of a repeated zero, from sector `from` up to the next sector that was written since. Empty at the
    /// end of the zero; `None` while a page before the end of the piece is busy. Later writes replace the zero: waiting
    /// flushes wait until they are written, again if necessary.
    ///
    /// => A page that was written since is dirty, or no Sync covers it (`pending_zeroes.rs`). So it is in memory.
    fn piece_to_repeat(&mut self, span: SectorSpan, from: u64) -> Option<SectorSpan> {
        const WINDOW_SECTORS: u64 = REGION_PAGES * SECTORS_PER_PAGE;
        let (mut start, mut at) = (from, from);
        while at < span.end() {
            let until = (at / WINDOW_SECTORS * WINDOW_SECTORS + WINDOW_SECTORS).min(span.end());
            let mut ids = self.pages.within(SectorSpan::new(at, until - at).pages());
            ids.sort_unstable_by_key(|&id| self.pages[id].no());
            for id in ids {
                let page = &self.pages[id];
                let (no, mut written) = (page.no(), page.dirty);
                if page.busy() {
                    return None;
                }
                if page.is_unsynced() {
                    // Some of its sectors may be zeros of this range, which are skipped too.
                    self.make_dirty_again(id);
                    written = self.pages[id].dirty;
                } else if !written.is_empty() {
                    self.include_in_flushes(id);
                }
                while let Some((first, count)) = written.first_run() {
                    written = written.without(SectorMask::run(first, count));
                    let run = SectorSpan::new(no.0 * SECTORS_PER_PAGE + u64::from(first), count.into());
                    if run.start > start {
                        return Some(SectorSpan::new(start, run.start.min(span.end()) - start));
                    }
                    start = start.max(run.end()).min(span.end());
                }
            }
            at = until;
        }
        Some(SectorSpan::new(start, span.end() - start))
    }

    /// The store is stopped: range operations that have not started fail.
    pub(super) fn fail_waiting_ranges(&mut self, fault: Fault) {
        self.fail_ranges(fault, |_| true);
    }

    /// Fails the range operations of guests that have not started and whose kind `which` selects.
    fn fail_ranges(&mut self, fault: Fault, which: impl Fn(OpKind) -> bool) {
        let notices = &mut self.notices;
        self.ranges.list.retain(|range| {
            let waiting = range.ticket.filter(|_| !range.started && which(range.kind));
            notices.extend(waiting.map(|ticket| Notice::Done(ticket, Err(fault))));
            waiting.is_none()
        });
    }

    /// Starts the range operations that have no busy page, in order where they overlap.
    pub(super) fn start_ranges(&mut self) {
        if self.pending_zeroes.is_full()
            && let Some(fault) = self.health.refused()
        {
            // Only a successful Sync frees a slot, and the next one may be far off.
            self.fail_ranges(fault, |kind| matches!(kind, OpKind::Zero { .. }));
        }
        self.advance_repeated_zeroes();
        for index in 0..self.ranges.list.len() {
            let Range { ticket, span, kind, started, zero_slot, piece, .. } = self.ranges.list[index];
            if started
                || self.must_wait(&self.ranges.list[index])
                || self.must_wait_for_earlier(index)
                || self.pages.within(piece.pages()).iter().any(|&id| self.pages[id].busy())
            {
                continue;
            }
            if zero_slot.is_none() && matches!(kind, OpKind::Zero { .. }) {
                let slot = self.pending_zeroes.take_slot().expect("a zero without a slot waits");
                self.ranges.list[index].zero_slot = Some(slot);
                if !planted(PlantedBug::ZeroIsNotedLate) {
                    self.note_zero(slot, span);
                }
            }
            if ticket.is_some() && !planted(PlantedBug::ZeroIsNotedLate) {
                self.forget_clean(span);
            }
            if kind == OpKind::Discard {
                self.note_change(span.pages());
            }
            self.ranges.list[index].started = true;
            self.stats.range_operations += 1;
            self.submit_op(StoreOp::without_pages(kind, piece));
        }
        if self.pending_zeroes.is_crowded() {
            self.flushing.request_sync();
        }
    }

    /// Finds the next piece of each zero that is to be repeated. A zero without another piece is done.
    fn advance_repeated_zeroes(&mut self) {
        for index in (0..self.ranges.list.len()).rev() {
            let range = &self.ranges.list[index];
            if range.ticket.is_some() || range.started || self.must_wait(range) {
                continue;
            }
            let doubts = self.flushing.doubts();
            let from = if range.doubts == doubts { range.repeated_to } else { range.span.start };
            let span = range.span;
            let Some(piece) = self.piece_to_repeat(span, from) else {
                // Includes the busy page.
                self.ranges.list[index].piece = span;
                continue;
            };
            let range = &mut self.ranges.list[index];
            (range.piece, range.repeated_to, range.doubts) = (piece, from, doubts);
            if piece.count == 0 {
                let (slot, zero) = self.ranges.list.remove(index).zero().expect("only zeros are repeated");
                self.flushing.note_unsynced_write();
                self.zero_done(slot, zero);
            }
        }
    }

    /// Whether a range operation waits for anything other than its pages and other range operations: a repeated zero
    /// for the end of the pause after the failure, a guest's zero for a free slot.
    fn must_wait(&self, range: &Range) -> bool {
        let lacks = match range.ticket {
            None => !self.health.may_retry(self.now),
            Some(_) => matches!(range.kind, OpKind::Zero { .. }) && self.pending_zeroes.is_full(),
        };
        !range.started && lacks
    }

    /// Whether guests' requests must wait for a range operation on the page. They do not wait for one that itself waits
    /// for the store or for a Sync, which may take long. Data that is written before a zero is repeated is written
    /// again after it.
    pub(super) fn is_range_locked(&self, no: PageNo) -> bool {
        let mut ranges = self.ranges.list.iter();
        ranges.any(|range| range.span.pages().contains(no) && !self.must_wait(range))
    }

    /// Whether a range operation overlaps one that is in flight, or an earlier one that can start first.
    fn must_wait_for_earlier(&self, index: usize) -> bool {
        let pages = self.ranges.list[index].span.pages();
        self.ranges.list.iter().enumerate().any(|(at, other)| {
            let first = other.started || at < index && !self.must_wait(other);
            at != index && first && other.span.pages().overlaps(pages)
        })
    }

    /// A range operation has ended.
    pub(super) fn range_done(&mut self, op: &StoreOp, outcome: &Outcome) {
        let span = op.span;
        let index = self.ranges.list.iter().position(|range| range.started && range.piece == span);
        let index = index.expect("a range operation is listed until it ends");
        self.forget_holes(span, op.kind);
        let result = outcome.fault().map_or(Ok(()), Err);
        if let Err(fault) = result
            && fault.may_be_a_reset()
            && !planted(PlantedBug::FailedWriteDoubtsNothing)
        {
            self.doubt_unsynced(op.syncs);
        }
        match op.kind {
            OpKind::Zero { .. } if result.is_ok() => self.flushing.note_unsynced_write(),
            _ => self.note_changed_range(span),
        }
        let Some(ticket) = self.ranges.list[index].ticket else {
            let repeated = &mut self.ranges.list[index];
            repeated.started = false;
            match result {
                Ok(()) => repeated.repeated_to = span.end(),
                Err(fault) => self.store_failed(fault, Cause::Sync),
            }
            return;
        };
        let range = self.ranges.list.remove(index);
        if let (Ok(()), Some((slot, zero))) = (result, range.zero()) {
            if self.is_in_doubt(op) { self.zero_in_doubt(slot, zero) } else { self.zero_done(slot, zero) }
        }
        for id in self.pages.within(span.pages()) {
            if result.is_ok() {
                self.zero_inside(id, self.sectors_inside(id, span));
            } else {
                self.redirty_or_remove(id);
            }
        }
        if let (Err(_), Some(slot)) = (result, range.zero_slot) {
            // Only now: no clean sector remains in the range that the store may lack.
            self.forget_zero(slot);
        }
        if result.is_ok() {
            self.store_succeeded(Cause::Write);
        }
        self.notices.push(Notice::Done(ticket, result));
    }

    /// Drops the clean sectors of a range that is about to change on the store: if the daemon dies meanwhile, the next
    /// daemon must not treat them as the store's contents.
    pub(super) fn forget_clean(&mut self, span: SectorSpan) {
        for id in self.pages.within(span.pages()) {
            let page = &self.pages[id];
            if page.busy() || page.is_unsynced() {
                continue;
            }
            let clean = self.sectors_inside(id, span).without(page.dirty).without(self.pages.beyond_image(page.no()));
            if page.dirty.is_empty() && page.valid.without(clean).without(self.pages.beyond_image(page.no())).is_empty()
            {
                self.remove_page(id);
            } else {
                self.pages.change(id, |page| page.valid = page.valid.without(clean));
            }
        }
    }

    /// Removes a page inside the range. In a page at the border, zeroes the part inside, as the store did.
    fn zero_inside(&mut self, id: PageId, inside: SectorMask) {
        if inside == SectorMask::ALL {
            self.remove_page(id);
            return;
        }
        self.pages.zero_sectors(id, inside);
        self.pages.change(id, |page| {
            page.dirty = page.dirty.without(inside);
            page.valid = page.valid.or(inside);
            if page.dirty.is_empty() {
                page.clear(FAILED);
            }
        });
    }

    /// After a failed range operation the store's contents of the page are unknown: a page that is not durable is
    /// written again, any other is read again on the next request for it.
    fn redirty_or_remove(&mut self, id: PageId) {
        if self.pages[id].is_unsynced() || !self.pages[id].dirty.is_empty() {
            self.make_dirty_again(id);
        } else {
            self.remove_page(id);
        }
    }

    /// The sectors of the page that lie in the span; all of them if none lies outside, even if the image ends within
    /// the page.
    fn sectors_inside(&self, id: PageId, span: SectorSpan) -> SectorMask {
        let no = self.pages[id].no();
        let inside = span.sectors_in(no);
        if inside.or(self.pages.beyond_image(no)) == SectorMask::ALL { SectorMask::ALL } else { inside }
    }
}
