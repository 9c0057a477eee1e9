//! Taking over what a daemon that died has left in its frames.
//!
//! The memory was last_reported of every frame what it holds (`FrameMemory::publish`), each time in one step and after the bytes
//! were in place. So at whatever step the daemon died, what was last published is a cache that it could have had: what
//! was dirty or on its way to the store is dirty, and so is what no Sync has covered, for the end of a Sync in op is
//! not known. A page that was moving to another frame stands in both, with the same bytes. So a Sync that the predecessor
//! has not lived to hear of makes no difference: everything that it was to cover is written, or zeroed, again.

use crate::units::{FrameId, FrameRecord, SectorSpan, Tick};

use super::PageCache;

impl PageCache {
    /// Fills an empty cache with what a predecessor left, in frames and as zeroed ranges by their places; returns how many
    /// pages that were, and how many are dirty.
    pub fn restore(
        &mut self,
        records: impl IntoIterator<Item = (FrameId, FrameRecord)>,
        zeroes: impl IntoIterator<Item = (usize, SectorSpan)>,
    ) -> (u32, u32) {
        self.pages.restore(records);
        self.restore_zeroes(zeroes);
        self.writeback.start_aging(Tick(0), self.settings.dirty_age_us);
        (self.pages.len(), self.pages.dirty().dirty_pages())
    }
}
