//! Taking over what a daemon that died has left in its frames.
//!
//! The memory was last_reported of every frame what it holds (`FrameMemory::publish`), each time in one step and after the bytes
//! were in place. So at whatever step the daemon died, what was last published is a cache that it could have had: what
//! was dirty or on its way to the store is dirty, and so is what no Sync has covered, for the end of a Sync in op is
//! not known. A page that was moving to another frame stands in both, with the same bytes. So a Sync that the predecessor
//! has not lived to hear of makes no difference: everything that it was to cover is written, or zeroed, again.

use super::PageCache;
#[cfg(test)]
use super::page::UNSYNCED;
#[cfg(test)]
use crate::sim::PlantedBug;
use crate::units::{FrameId, FrameRecord, SectorSpan, Tick};

impl PageCache {
    /// Fills an empty cache with what a predecessor left, in frames and as zeroed ranges by their places; returns how many
    /// pages that were, and how many are dirty.
    pub fn restore(
        &mut self,
        records: impl IntoIterator<Item = (FrameId, FrameRecord)>,
        zeroes: impl IntoIterator<Item = (usize, SectorSpan)>,
    ) -> (u32, u32) {
        assert_eq!(self.pages.len(), 0, "only an empty cache can be restored");
        let mut restored = Vec::new();
        for (frame, record) in records {
            let no = record.page;
            let beyond = self.beyond_image(no);
            let useful = record.valid.without(beyond) != crate::units::SectorMask::NONE;
            match if useful && self.pages.find(no).is_none() { self.create_page(no) } else { None } {
                Some(id) => restored.push((id, frame, record, beyond)),
                None => self.memory.publish(frame, FrameRecord::empty(no)),
            }
        }
        self.frames.claim(restored.iter().map(|&(_, frame, ..)| frame));
        let epoch = self.dirty.current();
        for &(id, frame, record, beyond) in &restored {
            self.change(id, |page| {
                page.set_frame(frame);
                page.valid = record.valid.or(beyond);
                page.dirty = record.dirty.without(beyond);
                page.epoch = epoch;
            });
        }
        self.restore_zeroes(zeroes);
        self.writeback.ages_from(Tick(0), self.settings.dirty_age_us);
        (self.pages.len(), self.dirty.dirty_pages())
    }

    /// What is published of a page, with the bug that is planted, if it is one of these.
    #[cfg(test)]
    pub(super) fn planted_record(&self, record: FrameRecord) -> FrameRecord {
        let page = self.pages.find(record.page).map(|id| &self.pages[id]);
        match (self.planted, page) {
            (Some(PlantedBug::WrittenIsStable), Some(page)) => {
                FrameRecord { dirty: page.dirty.or(page.writing), ..record }
            }
            (Some(PlantedBug::WritingIsClean), Some(page)) if !page.is(UNSYNCED[0]) && !page.is(UNSYNCED[1]) => {
                FrameRecord { dirty: page.dirty, ..record }
            }
            _ => record,
        }
    }
}
