//! Keeping frames free: a reserve is filled at the end of each turn, so that a request normally finds a frame at once.

use crate::units::{PageId, PageNo};

use super::PageCache;
use super::pages::Period;
use super::write::FILL_FRAMES;

/// Pages looked at for one victim.
const STEPS_MAX: u32 = 64;

impl PageCache {
    /// Frames that are kept free.
    pub(super) fn reserve(&self) -> u32 {
        let total = self.pages.frames().total();
        (total / 200).max(64).min(total / 8).max(FILL_FRAMES + 1)
    }

    /// Evicts clean pages until the reserve is full; says what is in the way if there are none.
    pub(super) fn reclaim(&mut self) {
        let target = if self.settings.retain { self.reserve() } else { self.pages.frames().total() };
        while self.pages.frames().free() < target && self.pages.len() > 0 {
            let (mut dirty, mut unsynced) = (false, false);
            let evicted = self.pages.evict(STEPS_MAX, |kept| {
                dirty |= !kept.dirty.is_empty();
                unsynced |= kept.is_unsynced();
            });
            let Some(page) = evicted else {
                // Without retention there is always something left; only a want of frames is a reason to hurry.
                if self.pages.frames().free() < self.reserve() {
                    self.writeback.pressure |= dirty;
                    if unsynced {
                        self.flushing.want_sync();
                    }
                }
                return;
            };
            if let Some(period) = page.unread_since() {
                self.prefetch_was_wasted(page.no(), period);
            }
            self.stats.evicted_pages += 1;
        }
    }

    /// Takes a page that is not busy out of the cache for another reason than a lack of frames. What it had dirty is lost.
    pub(super) fn remove_page(&mut self, id: PageId) {
        let page = self.pages.remove(id);
        if let Some(period) = page.unread_since() {
            self.prefetch_was_wasted(page.no(), period);
        }
    }

    /// A page that was read ahead in `period` is removed or overwritten before a guest has read it.
    pub(super) fn prefetch_was_wasted(&mut self, no: PageNo, period: Period) {
        self.streams.page_not_unread(period);
        self.stats.readahead_wasted_pages += 1;
        self.streams.wasted(no);
    }
}
