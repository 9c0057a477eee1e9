//! I1 to I5 and I9, recounted from scratch.

use crate::units::{FrameId, PageNo};

use super::Pages;
use super::page::FAILED;
use crate::cache::REGION_PAGES;

impl Pages {
    /// Checks the invariants; `held` are the frames of pins and store operations, one for each reference.
    ///
    /// # Panics
    /// If one does not hold.
    pub fn check(&self, held: impl Iterator<Item = FrameId>) {
        self.check_frames(held);
        self.check_pages();
    }

    fn check_frames(&self, held: impl Iterator<Item = FrameId>) {
        let mut references = vec![0; self.frames.known().count()];
        for frame in self.iter().filter_map(|(_, page)| page.frame()).chain(held) {
            references[frame.index()] += 1;
        }
        for (frame, &count) in (0..).map(FrameId).zip(&references).filter(|(_, count)| **count > 0) {
            assert_eq!(self.frames.references(frame), count, "I3: references of {frame:?}");
        }
        let held = references.iter().filter(|count| **count > 0).count();
        let free_or_held = self.frames.free() as usize + held;
        let in_use = (self.frames.total() + self.frames.leaving_held()) as usize;
        assert_eq!(free_or_held, in_use, "I9: free + held frames = frames in use");
    }

    fn check_pages(&self) {
        let mut dirty: Vec<PageNo> = Vec::new();
        let (mut dirty_or_writeback, mut unstable, mut failed) = (0, 0, 0);
        for (id, page) in self.iter() {
            page.check();
            let beyond = self.beyond_image(page.no());
            assert!(page.dirty.and(beyond).is_empty(), "I5: {:?} is dirty beyond the image", page.no());
            assert!(self.policy.contains(id), "I1: {:?} is on no queue", page.no());
            assert_eq!(self.find(page.no()), Some(id), "I1: the index does not find {:?}", page.no());
            if !page.dirty.is_empty() {
                dirty.push(page.no());
            }
            dirty_or_writeback += u32::from(page.is_dirty_or_writeback());
            unstable += u32::from(page.is_not_durable());
            failed += u32::from(page.is(FAILED));
        }
        dirty.sort();
        assert_eq!(self.policy.len(), self.len(), "I1: pages on queues");
        assert!(self.dirty.iter().eq(dirty.iter().copied()), "I2: the dirty set is the dirty pages");
        assert_eq!(self.dirty.dirty_pages() as usize, dirty.len(), "I4: dirty pages");
        let starts_run = |at: &usize| {
            let follows = *at > 0 && dirty[at - 1].plus(1) == dirty[*at];
            !follows || dirty[*at].0.is_multiple_of(REGION_PAGES)
        };
        assert_eq!(self.dirty.runs() as usize, (0..dirty.len()).filter(starts_run).count(), "I4: runs of dirty pages");
        assert_eq!(self.dirty.dirty_or_writeback_pages(), dirty_or_writeback, "I4: pages dirty or under write-back");
        assert_eq!(self.dirty.unstable_pages(), unstable, "I4: unstable pages");
        assert_eq!(self.dirty.failed_pages(), failed, "I4: failed pages");
    }
}
