//! Ranges that were zeroed on the store and that no successful Sync covers yet: they must read as zeros even if the
//! store loses the operation.
//!
//! No frame holds such zeros, so the ranges themselves are noted in memory that outlives the daemon
//! (`FrameMemory::note_zero`), in the slots of a bounded table:
//!
//! 1. A zero of a guest takes its slot before it starts. If all slots are taken, it waits for the next Sync.
//! 2. When the store has zeroed the range, it is noted: before the guest's request completes, and before the pages in
//!    it are removed.
//! 3. When a successful Sync covers it, the slot is cleared and free. If the Sync fails or the daemon dies, the range
//!    is zeroed again and keeps its slot.
//!
//! The next daemon zeroes the noted ranges before it writes dirty pages. That is the right order: a page that was
//! written into a noted range is dirty as long as the range is noted, because a Sync clears the slot before it marks
//! the page clean.

use crate::units::{SectorSpan, Unmap};

use super::{PageCache, PlantedBug};

/// A slot of the table.
pub(super) type ZeroSlot = usize;

/// A range that the store has zeroed and no successful Sync covers.
#[derive(Clone, Copy, Debug)]
struct UnsyncedZero {
    span: SectorSpan,
    unmap: Unmap,
    slot: ZeroSlot,
}

/// See the module.
#[derive(Debug)]
pub(super) struct PendingZeroes {
    slots: usize,
    free: Vec<ZeroSlot>,
    /// As for pages: while a Sync is under way, one list has the ranges that it covers and the other the later ones.
    unsynced: [Vec<UnsyncedZero>; 2],
}

impl PendingZeroes {
    /// A table of free slots.
    pub fn new(slots: usize) -> Self {
        assert!(slots > 0, "a zero needs a slot");
        Self { slots, free: (0..slots).rev().collect(), unsynced: Default::default() }
    }

    /// Whether a zero has to wait for a slot.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Takes a free slot.
    pub fn take_slot(&mut self) -> Option<ZeroSlot> {
        self.free.pop()
    }

    /// Whether half of the slots are taken: then a Sync should free some.
    pub fn is_crowded(&self) -> bool {
        self.free.len() <= self.slots / 2
    }

    /// Frees a slot in which nothing is noted.
    pub fn free_slot(&mut self, slot: ZeroSlot) {
        self.free.push(slot);
    }

    /// Number of slots taken for ranges that the store has not zeroed yet, or is to zero again.
    pub fn reserved(&self) -> usize {
        self.slots - self.free.len() - self.unsynced[0].len() - self.unsynced[1].len()
    }
}

impl PageCache {
    /// The store has zeroed a range: notes it.
    ///
    /// => Call it before the pages in the range are removed.
    pub(super) fn zero_done(&mut self, span: SectorSpan, unmap: Unmap, slot: ZeroSlot) {
        self.note_zero(slot, span);
        let fresh = self.flushing.fresh();
        self.pending_zeroes.unsynced[fresh].push(UnsyncedZero { span, unmap, slot });
    }

    fn note_zero(&mut self, slot: ZeroSlot, span: SectorSpan) {
        if self.planted(PlantedBug::ZeroNotPublished) {
            return;
        }
        self.pages.note_zero(slot, Some(span));
    }

    /// A successful Sync covers the ranges of a list.
    pub(super) fn zeroes_synced(&mut self, list: usize) {
        for UnsyncedZero { slot, .. } in std::mem::take(&mut self.pending_zeroes.unsynced[list]) {
            self.pages.note_zero(slot, None);
            self.pending_zeroes.free_slot(slot);
        }
    }

    /// The Sync that should have covered the ranges of a list failed: zeroes them again.
    pub(super) fn redo_zeroes(&mut self, list: usize) {
        for UnsyncedZero { span, unmap, slot } in std::mem::take(&mut self.pending_zeroes.unsynced[list]) {
            self.redo_zero(span, unmap, slot);
        }
    }

    /// Zeroes again the ranges that the last daemon noted, by their slots.
    pub(super) fn restore_zeroes(&mut self, noted: impl IntoIterator<Item = (usize, SectorSpan)>) {
        for (slot, span) in noted {
            self.pending_zeroes.free.retain(|&free| free != slot);
            self.redo_zero(span, Unmap::Forbidden, slot);
            self.flushing.want_sync();
        }
    }
}
