//! WRITE_ZEROES and DISCARD: operations on a range, without moving data.
//!
//! A range operation locks its pages: it starts when nothing in the range is busy, and requests that touch the range
//! wait until it ends. The pages stay as they are meanwhile, so that a failure loses nothing; at the end those inside
//! the range go, and those that the range cuts have the part inside zeroed. A discard takes whole pages only, and promises
//! nothing; a zero is remembered until it is durable (`zeroed.rs`).

use crate::units::{Fault, OpKind, PageId, PageNo, PageSpan, SECTORS_PER_PAGE, SectorMask, SectorSpan, Unmap};

use super::pages::FAILED;
use super::pending_zeroes::ZeroSlot;
use super::stalled::StallReason;
use super::store_health::Cause;
use super::store_ops::{Outcome, StoreOp};
use super::{Notice, PageCache, Ticket};

/// Range operations that guests may ask for at a time; more wait with the stalled requests.
const RANGES_MAX: usize = 64;

#[derive(Debug)]
struct Range {
    /// Whose it is; `None`: a zero that is done again after a failed Sync.
    ticket: Option<Ticket>,
    span: SectorSpan,
    kind: OpKind,
    started: bool,
    /// Where a zero is noted, or will be.
    zero_slot: Option<ZeroSlot>,
}

/// The range operations that are under way or wait for their pages.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    list: Vec<Range>,
}

impl Ranges {
    /// Whether a range operation keeps write-back off the page.
    pub fn block(&self, no: PageNo) -> bool {
        !self.list.is_empty() && self.list.iter().any(|range| range.span.pages().contains(no))
    }

    /// Range operations that guests wait for.
    fn asked(&self) -> usize {
        self.list.iter().filter(|range| range.ticket.is_some()).count()
    }

    /// Whether a zero has to be done again before a Sync means anything.
    pub fn redoing(&self) -> bool {
        self.list.iter().any(|range| range.ticket.is_none())
    }

    /// How many have a zero_slot among the zeroed.
    pub fn placed(&self) -> usize {
        self.list.iter().filter(|range| range.zero_slot.is_some()).count()
    }
}

impl PageCache {
    /// Makes the span read as zeros; [`Notice::Done`] tells the end. False: not admitted, [`Notice::Resume`] comes.
    pub fn zero(&mut self, ticket: Ticket, span: SectorSpan, unmap: Unmap) -> bool {
        self.start_or_stall(ticket, span, OpKind::Zero { unmap })
    }

    /// Gives the span's contents up; otherwise as [`PageCache::zero`].
    pub fn discard(&mut self, ticket: Ticket, span: SectorSpan) -> bool {
        // Whole pages only: the image's cut last page counts as whole.
        let start = span.start.next_multiple_of(SECTORS_PER_PAGE);
        let end = if span.end() == self.settings.image_sectors {
            span.end()
        } else {
            span.end() / SECTORS_PER_PAGE * SECTORS_PER_PAGE
        };
        if start >= end {
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
        if self.ranges.asked() >= RANGES_MAX {
            self.stalled.push(ticket, StallReason::StoreOp);
            return false;
        }
        self.ranges.list.push(Range { ticket: Some(ticket), span, kind, started: false, zero_slot: None });
        true
    }

    /// A zero of which no Sync is known to have been good is done again.
    pub(super) fn zero_again(&mut self, span: SectorSpan, unmap: Unmap, zero_slot: ZeroSlot) {
        // Its space may have been reserved since for pages that wait to be written.
        let unmap = if self.settings.allocate { Unmap::Forbidden } else { unmap };
        let kind = OpKind::Zero { unmap };
        self.ranges.list.push(Range { ticket: None, span, kind, started: false, zero_slot: Some(zero_slot) });
    }

    /// The store is left alone: range operations that have not begun fail.
    pub(super) fn fail_waiting_ranges(&mut self, fault: Fault) {
        self.fail_ranges(fault, |_| true);
    }

    /// Fails those range operations of guests that have not begun, and of which `which` says so.
    fn fail_ranges(&mut self, fault: Fault, which: impl Fn(OpKind) -> bool) {
        let notices = &mut self.notices;
        self.ranges.list.retain(|range| {
            let waiting = range.ticket.filter(|_| !range.started && which(range.kind));
            notices.extend(waiting.map(|ticket| Notice::Done(ticket, Err(fault))));
            waiting.is_none()
        });
    }

    /// Starts the range operations whose pages nobody holds, in order where they overlap.
    pub(super) fn start_ranges(&mut self) {
        if self.pending_zeroes.is_full()
            && let Some(fault) = self.health.reported()
        {
            // Nobody knows when a good Sync makes room.
            self.fail_ranges(fault, |kind| matches!(kind, OpKind::Zero { .. }));
        }
        for index in 0..self.ranges.list.len() {
            let Range { ticket, span, kind, started, zero_slot } = self.ranges.list[index];
            let pages = span.pages();
            if started
                || self.waits(&self.ranges.list[index])
                || self.has_to_follow(index)
                || self.resident(pages).iter().any(|&id| self.pages[id].busy())
            {
                continue;
            }
            if ticket.is_none() {
                self.redirty_unsynced(pages.iter());
            }
            if zero_slot.is_none() && matches!(kind, OpKind::Zero { .. }) {
                self.ranges.list[index].zero_slot = self.pending_zeroes.take();
            }
            self.ranges.list[index].started = true;
            self.stats.range_operations += 1;
            self.store_ops.submit(StoreOp::without_pages(kind, span));
        }
        if self.pending_zeroes.is_crowded() {
            self.flushing.want_sync();
        }
    }

    /// Whether a range operation can't start for want of something that no range operation brings: a zero that is to be
    /// done again waits until the store may be tried, and another until there is a zero_slot to note it.
    fn waits(&self, range: &Range) -> bool {
        let wants = match range.ticket {
            None => !self.health.may_retry(self.now),
            Some(_) => matches!(range.kind, OpKind::Zero { .. }) && self.pending_zeroes.is_full(),
        };
        !range.started && wants
    }

    /// Whether a range operation keeps a guest's request off the page. One that waits for the store or for a Sync does not:
    /// nobody knows for how long. What is written before a zero is done again is written again after it.
    pub(super) fn is_range_locked(&self, no: PageNo) -> bool {
        let mut ranges = self.ranges.list.iter();
        ranges.any(|range| range.span.pages().contains(no) && !self.waits(range))
    }

    /// Whether a range operation overlaps one that is under way, or an earlier one that can go first.
    fn has_to_follow(&self, index: usize) -> bool {
        let pages = self.ranges.list[index].span.pages();
        self.ranges.list.iter().enumerate().any(|(at, other)| {
            let first = other.started || at < index && !self.waits(other);
            at != index && first && other.span.pages().overlaps(pages)
        })
    }

    /// A range operation has ended.
    pub(super) fn range_done(&mut self, op: &StoreOp, outcome: &Outcome) {
        let span = op.span;
        let index = self.ranges.list.iter().position(|range| range.started && range.span == span);
        let range = self.ranges.list.remove(index.expect("a range operation is known until it ends"));
        self.forget_holes(span);
        let result = outcome.fault().map_or(Ok(()), Err);
        if result.is_ok() {
            self.flushing.write_done_unsynced();
        }
        if let (Ok(()), OpKind::Zero { unmap }, Some(zero_slot)) = (result, op.kind, range.zero_slot) {
            self.zero_done(span, unmap, zero_slot);
        }
        let Some(ticket) = range.ticket else {
            if let Err(fault) = result {
                self.store_failed(fault, Cause::Sync);
                self.ranges.list.push(Range { started: false, ..range });
            }
            return;
        };
        if let (Err(_), Some(zero_slot)) = (result, range.zero_slot) {
            self.pending_zeroes.give_back(zero_slot);
        }
        for id in self.resident(span.pages()) {
            if result.is_ok() {
                self.zero_inside(id, self.sectors_inside(id, span));
            } else {
                self.distrust_store(id);
            }
        }
        if result.is_ok() {
            self.store_succeeded(Cause::Write);
        }
        self.notices.push(Notice::Done(ticket, result));
    }

    /// The part of a page inside the range is gone: the page goes, or that part of it becomes zeros, as on the store.
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

    /// What the store holds of the page is not known any more: what only we are sure to have is written again, the rest is
    /// read again when it is asked for.
    fn distrust_store(&mut self, id: PageId) {
        if self.pages[id].is_unsynced() || !self.pages[id].dirty.is_empty() {
            self.make_dirty_again(id);
        } else {
            self.remove_page(id);
        }
    }

    /// Which sectors of the page lie in the span; a page of which nothing lies outside is whole, even if the image
    /// ends in it.
    fn sectors_inside(&self, id: PageId, span: SectorSpan) -> SectorMask {
        let no = self.pages[id].no();
        let page_start = no.0 * SECTORS_PER_PAGE;
        let first = span.start.saturating_sub(page_start).min(SECTORS_PER_PAGE) as u8;
        let end = span.end().saturating_sub(page_start).min(SECTORS_PER_PAGE) as u8;
        let inside = SectorMask::run(first, end.saturating_sub(first));
        if inside.or(self.pages.beyond_image(no)) == SectorMask::ALL { SectorMask::ALL } else { inside }
    }

    /// The pages of a span that are in memory: by number or by table, whichever is the shorter walk.
    fn resident(&self, span: PageSpan) -> Vec<PageId> {
        if span.count <= u64::from(self.pages.len()) {
            span.iter().filter_map(|no| self.pages.find(no)).collect()
        } else {
            self.pages.iter().filter(|(_, page)| span.contains(page.no())).map(|(id, _)| id).collect()
        }
    }
}
