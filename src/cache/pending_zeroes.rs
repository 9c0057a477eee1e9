//! Ranges that a WRITE_ZEROES has zeroed and that no successful Sync covers: they read as zeros, whatever the store
//! contains.
//!
//! No frame holds such zeros. So the cache records the ranges in a bounded number of slots, both in its own tables and
//! in the memory that outlives the daemon (`FrameMemory::note_zero`):
//!
//! - A zero takes a slot, and is recorded, before it starts: if the daemon dies, it is unknown whether the store
//!   executed it. The next daemon zeroes the range again.
//! - Once it has succeeded, sectors of the range that are not in memory read as zeros without the store
//!   (`getpages.rs`): the store may lose the zeros until a Sync covers them.
//! - A successful Sync frees the slot. After a failed one, the range is zeroed again from the same slot.
//! - If all slots are taken, a zero waits for the next Sync.
//!
//! A repeated zero skips the dirty sectors of its range (`ranges.rs`), also if the next daemon repeats it. Those are
//! all the sectors that were written since the zero: a page in a recorded range that was written after the zero is
//! dirty in the ledger for as long as the range is recorded, because a Sync frees the slot before it makes the page
//! clean.

use crate::fault_injection::{PlantedBug, planted};
use crate::units::{PageNo, SectorMask, SectorSpan, Unmap};

use super::PageCache;

/// Index of a slot.
pub(super) type ZeroSlot = usize;

/// A zero that has succeeded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Zero {
    pub span: SectorSpan,
    pub unmap: Unmap,
}

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct PendingZeroes {
    /// By slot: the ranges that read as zeros.
    zeroes: Vec<Option<Zero>>,
    free: Vec<ZeroSlot>,
    /// The slots of zeros that the Sync in flight covers, and those of zeros that completed later; the lists swap their
    /// roles as those of the pages do (`flush.rs`).
    unsynced: [Vec<ZeroSlot>; 2],
    /// Number of ranges in `zeroes`.
    count: usize,
}

impl PendingZeroes {
    /// A table with this many free slots.
    pub fn new(slots: usize) -> Self {
        assert!(slots > 0, "a zero needs a slot");
        Self { zeroes: vec![None; slots], free: (0..slots).rev().collect(), unsynced: Default::default(), count: 0 }
    }

    /// Whether a zero has to wait for a slot.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Whether a recorded zero reaches past the sector before `sector`.
    pub fn reach_beyond(&self, sector: u64) -> bool {
        self.zeroes.iter().flatten().any(|zero| zero.span.end() > sector)
    }

    /// Whether no slot is taken.
    pub fn is_empty(&self) -> bool {
        self.free.len() == self.zeroes.len()
    }

    /// Takes a free slot.
    pub fn take_slot(&mut self) -> Option<ZeroSlot> {
        self.free.pop()
    }

    /// Whether enough slots are taken that a Sync should free some.
    pub fn is_crowded(&self) -> bool {
        self.free.len() <= self.zeroes.len() / 2
    }

    /// Number of slots taken for zeros that are in flight or waiting to be repeated.
    pub fn reserved(&self) -> usize {
        self.zeroes.len() - self.free.len() - self.unsynced[0].len() - self.unsynced[1].len()
    }

    /// The sectors of a page that read as zeros.
    fn sectors(&self, no: PageNo) -> SectorMask {
        let zeroes = self.zeroes.iter().flatten();
        zeroes.map(|zero| zero.span.sectors_in(no)).fold(SectorMask::NONE, SectorMask::or)
    }

    /// Moves the slots of one list to another.
    pub fn join_lists(&mut self, from: usize, to: usize) {
        let slots = std::mem::take(&mut self.unsynced[from]);
        self.unsynced[to].extend(slots);
    }

    fn set(&mut self, slot: ZeroSlot, zero: Zero) {
        self.count += usize::from(self.zeroes[slot].replace(zero).is_none());
    }

    fn release(&mut self, slot: ZeroSlot) {
        self.count -= usize::from(self.zeroes[slot].take().is_some());
        self.free.push(slot);
    }
}

impl PageCache {
    /// The sectors of a page that read as zeros unless they are in memory.
    pub(super) fn zeroed_sectors(&self, no: PageNo) -> SectorMask {
        if self.pending_zeroes.count == 0 || planted(PlantedBug::ZeroesAreReadFromStore) {
            return SectorMask::NONE;
        }
        self.pending_zeroes.sectors(no)
    }

    /// A zero has succeeded on the store, and no Sync covers it.
    ///
    /// => Called before the pages in the range are dropped.
    pub(super) fn zero_done(&mut self, slot: ZeroSlot, zero: Zero) {
        if planted(PlantedBug::ZeroIsNotedLate) {
            self.note_zero(slot, zero.span);
        }
        self.pending_zeroes.set(slot, zero);
        self.pending_zeroes.unsynced[self.flushing.fresh()].push(slot);
    }

    /// Like [`PageCache::zero_done`], but operations that were in flight with the zero are in doubt: it is repeated.
    pub(super) fn zero_in_doubt(&mut self, slot: ZeroSlot, zero: Zero) {
        self.pending_zeroes.set(slot, zero);
        self.redo_zero(zero.span, zero.unmap, slot);
    }

    /// Records a zero in the memory that outlives the daemon.
    pub(super) fn note_zero(&mut self, slot: ZeroSlot, span: SectorSpan) {
        if !planted(PlantedBug::ZeroNotPublished) {
            self.pages.note_zero(slot, Some(span));
        }
    }

    /// A zero has failed, or is durable.
    pub(super) fn forget_zero(&mut self, slot: ZeroSlot) {
        self.pages.note_zero(slot, None);
        self.pending_zeroes.release(slot);
    }

    /// A successful Sync covers the zeros of a list.
    pub(super) fn zeroes_synced(&mut self, list: usize) {
        for slot in std::mem::take(&mut self.pending_zeroes.unsynced[list]) {
            self.forget_zero(slot);
        }
    }

    /// The store may have lost the zeros of a list.
    pub(super) fn redo_zeroes(&mut self, list: usize) {
        for slot in std::mem::take(&mut self.pending_zeroes.unsynced[list]) {
            let Zero { span, unmap } = self.pending_zeroes.zeroes[slot].expect("an unsynced zero has a range");
            self.redo_zero(span, unmap, slot);
        }
    }

    /// Restores the zeros that the previous daemon recorded. Clean pages in them may be older than the zero.
    pub(super) fn restore_zeroes(&mut self, noted: impl IntoIterator<Item = (ZeroSlot, SectorSpan)>) {
        for (slot, span) in noted {
            self.pending_zeroes.free.retain(|&free| free != slot);
            self.pending_zeroes.set(slot, Zero { span, unmap: Unmap::Forbidden });
            self.forget_clean(span);
            self.redo_zero(span, Unmap::Forbidden, slot);
            self.flushing.request_sync();
        }
    }
}
