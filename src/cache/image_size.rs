//! Changes of the size of the image while the cache is used. Both sizes are whole pages, so no page in memory gains or
//! loses a sector.
//!
//! An image that shrinks loses the sectors beyond its new end only after nothing depends on them: the owner admits no
//! more requests for them, completes those in progress, and flushes. Then every page there is clean and durable, and
//! the cache drops it. So a daemon that dies before the image is cut has lost nothing, and its successor finds no page
//! beyond the end of an image that was cut.

use crate::units::{OpKind, PageId, SectorSpan, Unmap};

use super::PageCache;

impl PageCache {
    /// The image has grown to `image_sectors` sectors; the added part is a hole, or has the state that the store
    /// reports.
    ///
    /// => The store takes operations up to the new end.
    pub fn grow(&mut self, image_sectors: u64) {
        assert!(image_sectors >= self.settings.image_sectors, "an image does not shrink under its cache");
        if image_sectors > self.settings.image_sectors {
            self.holes.grow(image_sectors);
            self.set_image_sectors(image_sectors);
        }
    }

    /// The image is to shrink to `image_sectors` sectors: from now on nothing beyond that end is read ahead or warmed.
    /// `None`: it keeps its size.
    pub fn announce_shrink(&mut self, image_sectors: Option<u64>) {
        self.shrinks_to = image_sectors;
    }

    /// Drops the clean pages beyond the announced end, in `count` slots of the page table from slot `from` on. Returns
    /// the next slot, if there is one.
    pub fn drop_beyond_end(&mut self, from: u32, count: u32) -> Option<u32> {
        let end = self.readable_pages();
        let beyond = |id: &PageId| self.pages[*id].no().0 >= end;
        let dropped: Vec<PageId> = self.pages.evictable(from, count).into_iter().filter(beyond).collect();
        dropped.into_iter().for_each(|id| self.remove_page(id));
        Some(from.saturating_add(count)).filter(|&next| next < self.pages.slots())
    }

    /// Shrinks to the announced size, and returns it, in sectors, if nothing in the cache refers to sectors beyond it.
    /// `None`: a page there is in memory, or not everything there is durable.
    ///
    /// => No request for sectors beyond the new end is in progress, and none follows.
    pub fn shrink(&mut self) -> Option<u64> {
        let (before, after) = (self.settings.image_sectors, self.shrinks_to?);
        assert!(after < before, "an image that shrinks has more sectors");
        let beyond = SectorSpan::new(after, before - after);
        let reaches = |span: SectorSpan| span.end() > after;
        if self.store_ops.iter().any(|op| reaches(op.span))
            || self.ranges.reach_beyond(after)
            || self.pending_zeroes.reach_beyond(after)
            || self.changed_ranges.reach_beyond(beyond.pages().first)
            || !self.pages.within(beyond.pages()).is_empty()
        {
            return None;
        }
        self.forget_holes(beyond, OpKind::Zero { unmap: Unmap::Forbidden });
        self.holes.shrink(after);
        self.allocating.forget_trimmed(beyond.pages());
        self.set_image_sectors(after);
        self.shrinks_to = None;
        Some(after)
    }

    fn set_image_sectors(&mut self, image_sectors: u64) {
        self.pages.set_image_sectors(image_sectors);
        self.settings.image_sectors = image_sectors;
    }
}
