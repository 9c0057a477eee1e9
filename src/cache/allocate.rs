//! Space allocation before a write: a write into a hole completes only after the store has allocated the space (genfs:
//! GOP_ALLOC), so that its write-back never fails for lack of space.
//!
//! How much the store allocates:
//!
//! - the pages that the request writes in the region, rounded to 32 KiB, or to 64 KiB if an eighth of the region is
//!   allocated: random writes of 4 KiB thus take at most 16 times their size;
//! - the rest of the region if most of it is allocated;
//! - for a sequential writer, ahead of it, a sixteenth of the contiguous space behind it;
//! - only the pages that the request writes if the store has little space left, or if the guest has trimmed the
//!   neighbouring pages.
//!
//! A bounded table records the pages that are allocated. If it drops an entry, the cache allocates again, which costs
//! little.

use crate::fault_injection::{PlantedBug, planted};
use crate::units::{Fault, OpKind, PageNo, PageSpan, Tick, low_u32};

use super::access::Attempt;
use super::page_ranges::PageRanges;
use super::store_health::Cause;
use super::store_ops::{Outcome, StoreOp};
use super::{FRAMES_PER_REGION, PageCache, REGION_PAGES, REGION_WORDS, bit_of};

/// An empty slot of the table.
const NONE: u32 = u32::MAX;
/// Fewest slots of the table. Region numbers are below 2^40, so their quotients by this fit 32 bits.
const SLOTS_MIN: u32 = 256;
/// Reservations are rounded to this (32 KiB). Rounding saves allocations, and keeps the image in long extents.
const ROUND_PAGES: u64 = 8;
/// They are rounded to this (64 KiB) if at least [`DENSE_PAGES`] of the region are allocated.
const ROUND_PAGES_DENSE: u64 = 16;
const DENSE_PAGES: u64 = REGION_PAGES / 8;
/// The rest of a region is reserved with the next write if this many of its pages are allocated.
const MOST_PAGES: u64 = REGION_PAGES / 4 * 3;
/// A sequential writer gets, ahead of it, this fraction of the space behind it.
const AHEAD_DIVISOR: u64 = 16;
/// How far the cache looks back for that: the reservation ahead is thus at most a region.
const BEHIND_PAGES_MAX: u64 = REGION_PAGES * AHEAD_DIVISOR;
/// After a reservation has failed for lack of space, the cache reserves only the pages being written for this long.
const LOW_SPACE_US: u64 = 1_000_000;

/// Frames of the cache for each range that the guest has trimmed; these take less than 0.01 % of the cache.
const FRAMES_PER_TRIMMED: u32 = 256;
/// Fewest ranges.
const TRIMMED_MIN: u32 = 64;
/// Most ranges.
const TRIMMED_MAX: u32 = 4096;

/// Whether a page is allocated on the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
    Allocated,
    /// The allocation is in flight, or is retried when the pause after a failure is over.
    Pending,
    Refused(Fault),
}

/// An allocation in flight.
#[derive(Clone, Copy, Debug)]
struct PendingAllocation {
    pages: PageSpan,
    /// The pages that the request writes: tried alone if there is no space for all of `pages`.
    written: PageSpan,
    /// Space in `pages` was freed meanwhile: when the allocation ends, they may have holes again.
    stale: bool,
}

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct SpaceAllocations {
    /// A direct-mapped table of regions: a region's number modulo the size selects the slot, which has the quotient, or
    /// [`NONE`].
    regions: Vec<u32>,
    /// By slot: the pages of its region that are allocated.
    pages: Vec<[u64; REGION_WORDS]>,
    /// Pages that the guest has trimmed: their space is not reserved again before the guest writes there. If the set
    /// marks pages that were not trimmed, the only effect is that reservations there are not rounded up.
    trimmed: PageRanges,
    pending: Vec<PendingAllocation>,
    /// Until then, only the pages being written are reserved.
    low_space_until: Tick,
    /// The store cannot allocate ahead of a write.
    unsupported: bool,
    /// The operator was informed of that.
    reported: bool,
}

impl SpaceAllocations {
    /// A table for a cache of `frames` frames.
    pub fn new(frames: u32) -> Self {
        let slots = (frames / FRAMES_PER_REGION).max(SLOTS_MIN) as usize;
        let trimmed_max = (frames / FRAMES_PER_TRIMMED).clamp(TRIMMED_MIN, TRIMMED_MAX);
        Self {
            regions: vec![NONE; slots],
            pages: vec![[0; REGION_WORDS]; slots],
            trimmed: PageRanges::new(trimmed_max as usize),
            pending: Vec::new(),
            low_space_until: Tick::ZERO,
            unsupported: false,
            reported: false,
        }
    }

    /// The slot of a region, and its value if part of the region is allocated.
    fn slot_of(&self, region: u64) -> (usize, u32) {
        let slots = self.regions.len() as u64;
        (low_u32(region % slots) as usize, low_u32(region / slots))
    }

    /// Records that the pages are allocated.
    fn record_allocated(&mut self, pages: PageSpan) {
        self.trimmed.remove(pages);
        for no in pages.iter() {
            let (slot, quotient) = self.slot_of(no.0 / REGION_PAGES);
            if self.regions[slot] != quotient {
                self.regions[slot] = quotient;
                self.pages[slot] = [0; REGION_WORDS];
            }
            let (word, mask) = bit_of(no);
            self.pages[slot][word] |= mask;
        }
    }

    /// The pages of a region that are known to be allocated.
    fn allocated_pages(&self, region: u64) -> [u64; REGION_WORDS] {
        let (slot, quotient) = self.slot_of(region);
        if self.regions[slot] == quotient { self.pages[slot] } else { [0; REGION_WORDS] }
    }

    /// Whether the page is known to be allocated.
    fn is_allocated(&self, no: PageNo) -> bool {
        let (word, mask) = bit_of(no);
        self.allocated_pages(no.0 / REGION_PAGES)[word] & mask != 0
    }

    /// Number of allocated pages that end before `no`, without a gap; at most [`BEHIND_PAGES_MAX`].
    fn allocated_behind(&self, no: PageNo) -> u64 {
        let (mut behind, mut at) = (0, no.0);
        while behind < BEHIND_PAGES_MAX && at > 0 {
            let region = (at - 1) / REGION_PAGES;
            let (start, pages) = (region * REGION_PAGES, self.allocated_pages(region));
            let all = at - start == REGION_PAGES && pages == [u64::MAX; REGION_WORDS];
            let has_space = |no: &u64| {
                let (word, mask) = bit_of(PageNo(*no));
                pages[word] & mask != 0
            };
            let run = if all { REGION_PAGES } else { (start..at).rev().take_while(has_space).count() as u64 };
            behind += run;
            if run < at - start {
                break;
            }
            at = start;
        }
        behind.min(BEHIND_PAGES_MAX)
    }

    /// The pages to reserve for a request that writes `written`, which lies in one region. `region` are the region's
    /// pages, of which `reserved` are allocated.
    fn extent(&self, written: PageSpan, region: PageSpan, reserved: u64, now: Tick) -> PageSpan {
        if now < self.low_space_until {
            return written;
        }
        let round = match reserved {
            MOST_PAGES.. => REGION_PAGES,
            DENSE_PAGES.. => ROUND_PAGES_DENSE,
            _ => ROUND_PAGES,
        };
        let first = written.first.0 / round * round;
        let end = written.end().0.next_multiple_of(round).min(region.end().0);
        let rounded = self.trimmed.extend(written, PageSpan::new(PageNo(first), end - first));
        // Only for a long stream: a short one may end before trimmed pages.
        let ahead = self.allocated_behind(written.first) / AHEAD_DIVISOR / ROUND_PAGES_DENSE * ROUND_PAGES_DENSE;
        let end = rounded.end().0.max((written.end().0 + ahead).min(region.end().0));
        PageSpan::new(rounded.first, end - rounded.first.0)
    }

    /// Space in the span was freed. If the guest has `trimmed` it, it is to stay free.
    pub fn forget(&mut self, pages: PageSpan, trimmed: bool) {
        if trimmed {
            self.trimmed.insert(pages);
        }
        let touched = pages.first.0 / REGION_PAGES..pages.end().0.div_ceil(REGION_PAGES);
        let slots = self.regions.len() as u64;
        for ((slot, quotient), allocated) in (0..).zip(&mut self.regions).zip(&mut self.pages) {
            let region = u64::from(*quotient) * slots + slot;
            if *quotient != NONE && touched.contains(&region) {
                let (first, end) = (region * REGION_PAGES, (region + 1) * REGION_PAGES);
                if pages.first.0 <= first && end <= pages.end().0 {
                    *quotient = NONE;
                    continue;
                }
                for no in (first.max(pages.first.0)..end.min(pages.end().0)).map(PageNo) {
                    let (word, mask) = bit_of(no);
                    allocated[word] &= !mask;
                }
            }
        }
        for allocation in &mut self.pending {
            allocation.stale |= allocation.pages.overlaps(pages);
        }
    }

    /// The pages no longer exist: if they come back, the guest has not trimmed them.
    pub fn forget_trimmed(&mut self, pages: PageSpan) {
        self.trimmed.remove(pages);
    }

    /// Returns true once, if the store cannot allocate ahead of a write: the owner reports it to the operator.
    pub fn take_unsupported(&mut self) -> bool {
        self.unsupported && !std::mem::replace(&mut self.reported, true)
    }

    /// Bytes of memory that the table takes.
    pub fn metadata_bytes(&self) -> usize {
        self.regions.capacity() * size_of::<u32>()
            + self.pages.capacity() * size_of::<[u64; REGION_WORDS]>()
            + self.trimmed.metadata_bytes()
    }
}

impl PageCache {
    /// Whether a page that `request` writes is allocated. If that is not known, starts an allocation. If the allocation
    /// failed, only a resumed request is refused; for any other, the allocation is tried again.
    pub(super) fn space_for(&mut self, no: PageNo, request: PageSpan, attempt: Attempt) -> Space {
        if planted(PlantedBug::WriteSkipsAllocation) {
            return Space::Allocated;
        }
        if !self.settings.allocate || self.allocating.unsupported || self.holes.is_data(no) {
            return Space::Allocated;
        }
        if self.allocating.is_allocated(no) {
            return Space::Allocated;
        }
        if self.allocating.pending.iter().any(|allocation| allocation.pages.contains(no)) {
            return Space::Pending;
        }
        match self.health.space_refused() {
            Some(fault) if attempt == Attempt::Resumed => return Space::Refused(fault),
            _ if self.health.holding() && !self.health.may_retry(self.now) => return Space::Pending,
            _ => {}
        }
        let region = no.0 / REGION_PAGES;
        let first = region * REGION_PAGES;
        let region_pages = PageSpan::new(PageNo(first), REGION_PAGES.min(self.image_pages() - first));
        let written = PageSpan::new(no, request.end().0.min(region_pages.end().0) - no.0);
        let (allocated, data) = (self.allocating.allocated_pages(region), self.holes.data_pages(no));
        let reserved = allocated.iter().zip(data).map(|(one, other)| u64::from((one | other).count_ones())).sum();
        let pages = self.allocating.extent(written, region_pages, reserved, self.now);
        self.submit_allocation(PendingAllocation { pages, written, stale: false });
        Space::Pending
    }

    fn submit_allocation(&mut self, allocation: PendingAllocation) {
        self.allocating.pending.push(allocation);
        self.stats.allocations += 1;
        let span = self.span_of(allocation.pages.first, allocation.pages.count);
        self.submit_op(StoreOp::without_pages(OpKind::Allocate, span));
    }

    /// An allocation has ended.
    pub(super) fn allocate_done(&mut self, op: &StoreOp, outcome: &Outcome) {
        let pages = op.span.pages();
        let index = self.allocating.pending.iter().position(|allocation| allocation.pages == pages);
        let index = index.expect("an allocation that ends is pending");
        let PendingAllocation { written, stale, .. } = self.allocating.pending.swap_remove(index);
        match outcome.fault() {
            Some(Fault::Unsupported) => self.allocating.unsupported = true,
            Some(Fault::NoSpace) if pages != written => {
                self.allocating.low_space_until = self.now.plus_us(LOW_SPACE_US);
                self.submit_allocation(PendingAllocation { pages: written, written, stale });
            }
            Some(fault) => self.store_failed(fault, Cause::Allocate),
            None => {
                self.health.clear_failure(Cause::Allocate);
                if !stale {
                    self.allocating.record_allocated(pages);
                }
            }
        }
    }

    /// Retries the writes that wait for space when the pause after the failure is over.
    pub(super) fn retry_allocations(&mut self) {
        if self.health.take_space_retry(self.now) {
            self.stalled.unblock();
        }
    }
}
