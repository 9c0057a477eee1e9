//! Ranges that read as zeros although the store may not have them so: they were zeroed, and no good Sync covers them.
//!
//! No frame holds such zeros, so the memory is told of the ranges themselves (`FrameMemory::note_zeroed`), in places of a
//! bounded table. A zero that a guest asks for takes its place before it starts; the range is noted when the store has
//! zeroed it, before the guest hears of it and before the pages in it go; and the place is free again when a good Sync
//! covers it. A Sync that fails, and a daemon's death, have the range zeroed again, from the same place. When all places
//! are taken a zero waits for the next Sync.
//!
//! A successor zeroes what is noted before it writes what is dirty: what was written into a range later is dirty for as
//! long as the range is noted, because the Sync that makes the one clean has forgotten the other before.

use crate::units::SectorSpan;

use super::PageCache;

/// A place of the table.
pub(super) type Place = usize;

/// A range that the store has zeroed.
#[derive(Clone, Copy, Debug)]
struct Landed {
    span: SectorSpan,
    unmap: bool,
    place: Place,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Zeroed {
    places: usize,
    free: Vec<Place>,
    /// As with pages: while a Sync is in flight, what it covers is in the one list, and what came later in the other.
    landed: [Vec<Landed>; 2],
}

impl Zeroed {
    /// A table with so many places.
    pub fn new(places: usize) -> Self {
        assert!(places > 0, "a zero needs a place");
        Self { places, free: (0..places).rev().collect(), landed: Default::default() }
    }

    /// Whether a zero has to wait for a place.
    pub fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    /// Takes a place.
    pub fn take(&mut self) -> Option<Place> {
        self.free.pop()
    }

    /// Whether so many places are taken that a Sync should free some.
    pub fn is_crowded(&self) -> bool {
        self.free.len() <= self.places / 2
    }

    /// Gives a place back of which the memory knows nothing.
    pub fn give_back(&mut self, place: Place) {
        self.free.push(place);
    }

    /// Places of ranges that have not landed.
    pub fn not_landed(&self) -> usize {
        self.places - self.free.len() - self.landed[0].len() - self.landed[1].len()
    }
}

impl PageCache {
    /// The store has zeroed a range.
    ///
    /// => Before the pages in it go.
    pub(super) fn zero_landed(&mut self, span: SectorSpan, unmap: bool, place: Place) {
        self.note_zeroed(place, span);
        let fresh = self.flushing.fresh();
        self.zeroed.landed[fresh].push(Landed { span, unmap, place });
    }

    fn note_zeroed(&self, place: Place, span: SectorSpan) {
        #[cfg(test)]
        if self.planted == Some(crate::sim::PlantedBug::ZeroedIsForgotten) {
            return;
        }
        self.memory.note_zeroed(place, Some(span));
    }

    /// A good Sync covers the ranges of a list.
    pub(super) fn zeroed_are_stable(&mut self, list: usize) {
        for Landed { place, .. } in std::mem::take(&mut self.zeroed.landed[list]) {
            self.memory.note_zeroed(place, None);
            self.zeroed.give_back(place);
        }
    }

    /// The Sync that was to cover the ranges of a list has failed.
    pub(super) fn zeroed_are_in_doubt(&mut self, list: usize) {
        for Landed { span, unmap, place } in std::mem::take(&mut self.zeroed.landed[list]) {
            self.zero_again(span, unmap, place);
        }
    }

    /// A predecessor noted these.
    pub(super) fn adopt_zeroed(&mut self, noted: impl IntoIterator<Item = (usize, SectorSpan)>) {
        for (place, span) in noted {
            self.zeroed.free.retain(|&free| free != place);
            self.zero_again(span, false, place);
            self.flushing.want_sync();
        }
    }
}
