//! Taking over what a daemon that died has left in its frames.
//!
//! The memory was told of every frame what it holds (`FrameMemory::publish`), each time in one step and after the bytes
//! were in place. So at whatever step the daemon died, what was last published is a cache that it could have had: what
//! was dirty or on its way to the store is dirty, and so is what no Sync has covered, for the end of a Sync in flight is
//! not known. A page that was moving to another frame stands in both, with the same bytes. So a Sync that the predecessor
//! has not lived to hear of makes no difference: everything that it was to cover is written, or zeroed, again.

#[cfg(test)]
use super::page::UNSYNCED;
use super::{Left, PageCache, Record};
#[cfg(test)]
use crate::sim::PlantedBug;
#[cfg(test)]
use crate::units::PageNo;
use crate::units::{SectorSpan, Tick};

impl PageCache {
    /// Fills an empty cache with what a predecessor left, in frames and as zeroed ranges by their places; returns how many
    /// pages that were, and how many are dirty.
    pub fn adopt(
        &mut self,
        left: impl IntoIterator<Item = Left>,
        zeroed: impl IntoIterator<Item = (usize, SectorSpan)>,
    ) -> (u32, u32) {
        assert_eq!(self.pages.len(), 0, "only an empty cache adopts");
        let mut adopted = Vec::new();
        for Left { frame, no, record } in left {
            let beyond = self.beyond_image(no);
            let useful = record.valid.without(beyond) != crate::units::SectorMask::NONE;
            match if useful && self.pages.find(no).is_none() { self.create_page(no) } else { None } {
                Some(id) => adopted.push((id, frame, record, beyond)),
                None => self.memory.publish(frame, no, Record::NONE),
            }
        }
        self.frames.claim(adopted.iter().map(|&(_, frame, ..)| frame));
        let epoch = self.dirty.current();
        for &(id, frame, record, beyond) in &adopted {
            self.change(id, |page| {
                page.set_frame(frame);
                page.valid = record.valid.or(beyond);
                page.dirty = record.dirty.without(beyond);
                page.epoch = epoch;
            });
        }
        self.adopt_zeroed(zeroed);
        self.writeback.ages_from(Tick(0), self.settings.dirty_age_us);
        (self.pages.len(), self.dirty.dirty_pages())
    }

    /// What is published of a page, with the bug that is planted, if it is one of these.
    #[cfg(test)]
    pub(super) fn planted_record(&self, no: PageNo, record: Record) -> Record {
        let page = self.pages.find(no).map(|id| &self.pages[id]);
        match (self.planted, page) {
            (Some(PlantedBug::WrittenIsStable), Some(page)) => Record { dirty: page.dirty.or(page.writing), ..record },
            (Some(PlantedBug::WritingIsClean), Some(page)) if !page.is(UNSYNCED[0]) && !page.is(UNSYNCED[1]) => {
                Record { dirty: page.dirty, ..record }
            }
            _ => record,
        }
    }
}
