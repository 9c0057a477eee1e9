//! Restores the cache that the previous daemon left in its frames when it died.
//!
//! The previous daemon recorded the contents of each frame (`FrameMemory::publish`), atomically and after the bytes
//! were in place. So the records describe a consistent cache, at whatever step it died:
//!
//! - Pages that were dirty or under write-back are dirty.
//! - So are pages that no Sync had covered. The result of a Sync in flight is unknown, so everything that it would have
//!   covered is written or zeroed again.
//! - Clean pages of a discarded range that no Sync had covered are dropped: the store may have lost the discard.
//! - A page that was moving to another frame is recorded for both, with the same bytes; either one is used.

use crate::units::{FrameId, FrameRecord, SectorSpan};

use super::PageCache;

impl PageCache {
    /// Fills an empty cache from the records of the frames, and from the recorded zeroes and changed ranges by their
    /// slots. Returns the number of pages in the cache, and how many of them are dirty.
    ///
    /// => If the cache is configured with fewer frames than the restored one, it starts with all of them, and shrinks.
    pub fn restore(
        &mut self,
        records: impl IntoIterator<Item = (FrameId, FrameRecord)>,
        zeroes: impl IntoIterator<Item = (usize, SectorSpan)>,
        changed: impl IntoIterator<Item = (usize, SectorSpan)>,
    ) -> (u32, u32) {
        let records: Vec<_> = records.into_iter().collect();
        let frames = records.iter().map(|(frame, _)| frame.0 + 1).max().unwrap_or(0);
        if frames > self.pages.frames().total() {
            self.pages.add_frames(frames);
        }
        self.publish_frames_in_use(self.pages.frames().total());
        self.pages.restore(records);
        self.set_frames(self.settings.frames);
        self.restore_changed_ranges(changed);
        self.restore_zeroes(zeroes);
        self.throttle.restored(self.pages.dirty().dirty_pages());
        (self.pages.len(), self.pages.dirty().dirty_pages())
    }
}
