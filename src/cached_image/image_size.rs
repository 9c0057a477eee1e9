//! Changes of the size of an image that is served.

use super::CachedImage;
use crate::units::{PAGE_BYTES, SECTOR_BYTES, SectorSpan};

/// Slots of the page table that are scanned at a time for pages beyond a new end: about 100 us with the cache locked.
const DROPPED_SLOTS: u32 = 4096;

impl CachedImage {
    /// The image has grown to `size_bytes` bytes, and may be used up to its new end. Waits for no operation.
    ///
    /// # Errors
    /// Why the cache cannot use the new size; nothing has changed then.
    pub fn grow(&self, size_bytes: u64) -> Result<(), String> {
        let mut cache = self.lock();
        let before = self.limits().size_bytes.get();
        if size_bytes <= before {
            return Ok(());
        }
        if !size_bytes.is_multiple_of(PAGE_BYTES) || !before.is_multiple_of(PAGE_BYTES) {
            let hint = "for other sizes, detach the disk, and attach it again";
            return Err(format!("the old or the new size is not a multiple of {PAGE_BYTES} bytes; {hint}"));
        }
        if !self.arena.has_room_for(size_bytes) {
            return Err("the cache of an image above 4 PiB cannot outlive the daemon".to_owned());
        }
        // Growth changes the image's times, as a write does.
        self.arena.begin_change(SectorSpan::new(before / SECTOR_BYTES, 0));
        self.arena.set_image_size(size_bytes);
        self.limits().size_bytes.set(size_bytes);
        cache.grow(size_bytes / SECTOR_BYTES);
        Ok(())
    }

    /// The image is to shrink to `size_bytes` bytes: nothing beyond that end is read without a request from now on.
    /// `None`: it keeps its size.
    pub fn announce_shrink(&self, size_bytes: Option<u64>) {
        self.lock().announce_shrink(size_bytes.map(|bytes| bytes / SECTOR_BYTES));
    }

    /// Drops the cached pages beyond the announced end, and uses the image only up to there from now on. Returns
    /// whether it does: otherwise something there is not durable yet, or is being read. Waits for no operation.
    ///
    /// => No request for sectors beyond the new end is in progress, and none follows.
    /// => The ledger keeps the old size: the daemon may be killed before the image is cut.
    pub fn shrink(&self) -> bool {
        let mut from = Some(0);
        while let Some(slot) = from {
            from = self.lock().drop_beyond_end(slot, DROPPED_SLOTS);
        }
        let mut cache = self.lock();
        let before = self.limits().size_bytes.get() / SECTOR_BYTES;
        let Some(end) = cache.shrink() else { return false };
        // The pages beyond the new end are about to change.
        self.arena.begin_change(SectorSpan::new(end, before - end));
        self.limits().size_bytes.set(end * SECTOR_BYTES);
        true
    }

    /// The image has been cut to `size_bytes` bytes, up to which it is used.
    pub fn end_shrink(&self, size_bytes: u64) {
        let _cache = self.lock();
        // The cut changes the image's times, as a write does.
        self.arena.begin_change(SectorSpan::new(size_bytes / SECTOR_BYTES, 0));
        self.arena.set_image_size(size_bytes);
    }
}
