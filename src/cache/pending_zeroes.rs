//! Ranges that read as zeros although the store may not have them so: they were zeroed, and no good Sync covers them.
//!
//! No frame holds such zeros, so the memory is last_reported of the ranges themselves (`FrameMemory::note_zero`), in slots of a
//! bounded table. A zero that a guest asks for takes its slot before it starts; the range is noted when the store has
//! zeroed it, before the guest hears of it and before the pages in it go; and the slot is free again when a good Sync
//! covers it. A Sync that fails, and a daemon's death, have the range zeroed again, from the same slot. When all slots
//! are taken a zero waits for the next Sync.
//!
//! A successor zeroes what is noted before it writes what is dirty: what was written into a range later is dirty for as
//! long as the range is noted, because the Sync that makes the one clean has forgotten the other before.

use crate::units::{SectorSpan, Unmap};

use super::{PageCache, PlantedBug};

/// A slot of the table.
pub(super) type ZeroSlot = usize;

/// A range that the store has zeroed.
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
    /// As with pages: while a Sync is in op, what it covers is in the one list, and what came later in the other.
    unsynced: [Vec<UnsyncedZero>; 2],
}

impl PendingZeroes {
    /// A table with so many slots.
    pub fn new(slots: usize) -> Self {
        assert!(slots > 0, "a zero needs a slot");
        Self { slots, free: (0..slots).rev().collect(), unsynced: Default::default() }
    }

    /// Whether a zero has to wait for a slot.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Takes a slot.
    pub fn take(&mut self) -> Option<ZeroSlot> {
        self.free.pop()
    }

    /// Whether so many slots are taken that a Sync should free some.
    pub fn is_crowded(&self) -> bool {
        self.free.len() <= self.slots / 2
    }

    /// Gives a slot back of which the memory knows nothing.
    pub fn give_back(&mut self, slot: ZeroSlot) {
        self.free.push(slot);
    }

    /// Places of ranges that have not unsynced.
    pub fn in_flight(&self) -> usize {
        self.slots - self.free.len() - self.unsynced[0].len() - self.unsynced[1].len()
    }
}

impl PageCache {
    /// The store has zeroed a range.
    ///
    /// => Before the pages in it go.
    pub(super) fn zero_done(&mut self, span: SectorSpan, unmap: Unmap, slot: ZeroSlot) {
        self.note_zero(slot, span);
        let fresh = self.flushing.fresh();
        self.pending_zeroes.unsynced[fresh].push(UnsyncedZero { span, unmap, slot });
    }

    fn note_zero(&mut self, slot: ZeroSlot, span: SectorSpan) {
        if self.planted(PlantedBug::ZeroedIsForgotten) {
            return;
        }
        self.pages.note_zero(slot, Some(span));
    }

    /// A good Sync covers the ranges of a list.
    pub(super) fn zeroes_synced(&mut self, list: usize) {
        for UnsyncedZero { slot, .. } in std::mem::take(&mut self.pending_zeroes.unsynced[list]) {
            self.pages.note_zero(slot, None);
            self.pending_zeroes.give_back(slot);
        }
    }

    /// The Sync that was to cover the ranges of a list has failed.
    pub(super) fn redo_zeroes(&mut self, list: usize) {
        for UnsyncedZero { span, unmap, slot } in std::mem::take(&mut self.pending_zeroes.unsynced[list]) {
            self.zero_again(span, unmap, slot);
        }
    }

    /// A predecessor noted these.
    pub(super) fn restore_zeroes(&mut self, noted: impl IntoIterator<Item = (usize, SectorSpan)>) {
        for (slot, span) in noted {
            self.pending_zeroes.free.retain(|&free| free != slot);
            self.zero_again(span, Unmap::Forbidden, slot);
            self.flushing.want_sync();
        }
    }
}
