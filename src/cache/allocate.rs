//! Space before the write: a write into a hole completes only after the store has allocated the space (genfs:
//! GOP_ALLOC), so that its write-back never fails for lack of space.
//!
//! The store allocates a region of 1 MiB at a time, ahead of the writer. A bounded table remembers the regions that
//! have their space. If it forgets one, the cache asks the store again, which costs little.

use crate::fault_injection::{PlantedBug, planted};
use crate::units::{Fault, OpKind, PageNo, SectorSpan, low_u32};

use super::store_health::Cause;
use super::store_ops::{Outcome, StoreOp};
use super::{FRAMES_PER_REGION, PageCache, REGION_PAGES};

/// An empty slot of the table.
const NONE: u32 = u32::MAX;
/// Fewest slots of the table. Region numbers are below 2^40, so their quotients by this fit 32 bits.
const SLOTS_MIN: u32 = 256;

/// Whether a page has its space on the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
    Allocated,
    /// The allocation is in flight, or is retried when the pause after a failure is over.
    Pending,
    Refused(Fault),
}

/// An allocation in flight.
#[derive(Debug)]
struct PendingAllocation {
    region: u64,
    /// Space of the region was freed meanwhile: when the allocation ends, the region may have holes again.
    stale: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Allocating {
    /// Regions that have their space, in a direct-mapped table: the slot is the remainder of the region's number, and
    /// holds the quotient, or [`NONE`].
    allocated: Vec<u32>,
    pending: Vec<PendingAllocation>,
    /// The store cannot allocate ahead of a write.
    unsupported: bool,
    /// That was reported to the operator.
    reported: bool,
}

impl Allocating {
    /// For a cache of `frames` frames.
    pub fn new(frames: u32) -> Self {
        let slots = (frames / FRAMES_PER_REGION).max(SLOTS_MIN) as usize;
        Self { allocated: vec![NONE; slots], pending: Vec::new(), unsupported: false, reported: false }
    }

    /// The slot of a region, and what it holds if the region has its space.
    fn slot_of(&self, region: u64) -> (usize, u32) {
        let slots = self.allocated.len() as u64;
        (low_u32(region % slots) as usize, low_u32(region / slots))
    }

    /// Remembers that the region has its space.
    fn remember(&mut self, region: u64) {
        let (slot, quotient) = self.slot_of(region);
        self.allocated[slot] = quotient;
    }

    /// Whether the region is known to have its space.
    fn is_allocated(&self, region: u64) -> bool {
        let (slot, quotient) = self.slot_of(region);
        self.allocated[slot] == quotient
    }

    /// Space in the span was freed.
    pub fn forget(&mut self, span: SectorSpan) {
        let pages = span.pages();
        let touched = pages.first.0 / REGION_PAGES..pages.end().0.div_ceil(REGION_PAGES);
        let slots = self.allocated.len() as u64;
        for (slot, quotient) in (0..).zip(&mut self.allocated) {
            if *quotient != NONE && touched.contains(&(u64::from(*quotient) * slots + slot)) {
                *quotient = NONE;
            }
        }
        for allocation in &mut self.pending {
            allocation.stale |= touched.contains(&allocation.region);
        }
    }

    /// Whether to report to the operator now, once, that the store cannot allocate ahead of a write.
    pub fn take_unsupported(&mut self) -> bool {
        self.unsupported && !std::mem::replace(&mut self.reported, true)
    }

    /// Bytes of memory that the table takes.
    pub fn metadata_bytes(&self) -> usize {
        self.allocated.capacity() * size_of::<u32>()
    }
}

impl PageCache {
    /// Whether a page that is to be written has its space; if that is not known, asks the store for it. If the
    /// allocation failed, only a request that `resumed` is refused; for any other, the store is asked again.
    pub(super) fn space_for(&mut self, no: PageNo, resumed: bool) -> Space {
        if planted(PlantedBug::WriteSkipsAllocation) {
            return Space::Allocated;
        }
        if !self.settings.allocate || self.allocating.unsupported || self.holes.is_data(no) {
            return Space::Allocated;
        }
        let region = no.0 / REGION_PAGES;
        if self.allocating.is_allocated(region) {
            return Space::Allocated;
        }
        if self.allocating.pending.iter().any(|allocation| allocation.region == region) {
            return Space::Pending;
        }
        match self.health.space_refused() {
            Some(fault) if resumed => return Space::Refused(fault),
            _ if self.health.holding() && !self.health.may_retry(self.now) => return Space::Pending,
            _ => {}
        }
        self.allocating.pending.push(PendingAllocation { region, stale: false });
        self.stats.allocations += 1;
        let span = self.span_of(PageNo(region * REGION_PAGES), REGION_PAGES);
        self.submit_op(StoreOp::without_pages(OpKind::Allocate, span));
        Space::Pending
    }

    /// An allocation has ended.
    pub(super) fn allocate_done(&mut self, op: &StoreOp, outcome: &Outcome) {
        let region = op.first_page().0 / REGION_PAGES;
        let index = self.allocating.pending.iter().position(|allocation| allocation.region == region);
        let index = index.expect("an allocation that ends is pending");
        let PendingAllocation { stale, .. } = self.allocating.pending.swap_remove(index);
        match outcome.fault() {
            Some(Fault::Unsupported) => self.allocating.unsupported = true,
            Some(fault) => self.store_failed(fault, Cause::Allocate),
            None => {
                self.health.clear_failure(Cause::Allocate);
                if !stale {
                    self.allocating.remember(region);
                }
            }
        }
    }

    /// Writes that wait for space are retried when the pause after the failure is over.
    pub(super) fn retry_allocations(&mut self) {
        if self.health.take_space_retry(self.now) {
            self.stalled.unblock();
        }
    }
}
