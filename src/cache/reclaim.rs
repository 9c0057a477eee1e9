//! The reserve of free frames. The end of each turn refills it, so that a request normally finds a frame immediately.

use crate::units::{PageId, PageNo, low_u32};

use super::PageCache;
use super::pages::Period;
use super::resize::EVICTED_PAGES_MAX;
use super::write::FILL_FRAMES;

/// Most unevictable pages that one victim search skips; bounds its time.
const KEPT_PAGES_MAX: u32 = 64;
/// The reserve is 1/200 of the cache: enough for a turn's requests, too little to cost hits ...
const RESERVE_DIVISOR: u32 = 200;
/// ... but at least this many frames (256 KiB), because a small cache has as many requests in a turn as a large one ...
const RESERVE_FRAMES_MIN: u32 = 64;
/// ... and at most 1/8 of a tiny cache.
const RESERVE_DIVISOR_MIN: u32 = 8;

impl PageCache {
    /// Number of frames to keep free.
    pub(super) fn reserve(&self) -> u32 {
        let total = self.pages.frames().total();
        (total / RESERVE_DIVISOR).max(RESERVE_FRAMES_MIN).min(total / RESERVE_DIVISOR_MIN).max(FILL_FRAMES + 1)
    }

    /// Evicts clean pages until the reserve is full. If there are none, starts write-back or a Sync.
    pub(super) fn reclaim(&mut self) {
        let mut left = if self.is_resized() { u32::MAX } else { EVICTED_PAGES_MAX };
        while self.pages.len() > 0 && left > 0 {
            left -= 1;
            // The reclaim may have evicted a page that had to move.
            let wanted = self.reserve() + self.frames_to_move_to();
            let target = if self.settings.retain { wanted } else { self.pages.frames().total() };
            if self.pages.frames().free() >= target {
                return;
            }
            let (mut dirty, mut unsynced) = (false, false);
            let evicted = self.pages.evict(KEPT_PAGES_MAX, |kept| {
                dirty |= !kept.dirty.is_empty();
                unsynced |= kept.is_unsynced();
            });
            let Some(page) = evicted else {
                // Without retention it is normal that pages which cannot be evicted remain. Only a shortage of frames
                // justifies urgency.
                if self.pages.frames().free() < wanted {
                    self.writeback.pressure |= dirty;
                    if unsynced {
                        self.flushing.request_sync();
                    }
                }
                return;
            };
            if let Some(period) = page.unread_since() {
                self.count_wasted_readahead(page.no(), period);
            }
            self.stats.evicted_pages += 1;
        }
    }

    /// Evicts the clean pages in `count` slots of the page table, starting at slot `from`. Returns their number, and
    /// the next slot, if there is one.
    pub fn drop_clean(&mut self, from: u32, count: u32) -> (u32, Option<u32>) {
        let clean = self.pages.evictable(from, count);
        for &id in &clean {
            self.remove_page(id);
            self.stats.evicted_pages += 1;
        }
        let next = from.saturating_add(count);
        (low_u32(clean.len() as u64), Some(next).filter(|&next| next < self.pages.slots()))
    }

    /// Removes a page that is not busy, for a reason other than a shortage of frames. Its dirty sectors are dropped.
    pub(super) fn remove_page(&mut self, id: PageId) {
        let page = self.pages.remove(id);
        if let Some(period) = page.unread_since() {
            self.count_wasted_readahead(page.no(), period);
        }
    }

    /// A clean page becomes dirty without a guest's write. If it is unread readahead, it stops counting as such: its
    /// epoch uses the field that held its period.
    pub(super) fn forget_unread(&mut self, id: PageId) {
        if let Some(period) = self.pages.take_unread(id) {
            self.streams.remove_unread(period);
        }
    }

    /// A page that was read ahead in `period` is evicted, removed or overwritten before a guest read it.
    pub(super) fn count_wasted_readahead(&mut self, no: PageNo, period: Period) {
        if period == Period::WARMED {
            return;
        }
        self.streams.remove_unread(period);
        self.stats.readahead_wasted_pages += 1;
        self.streams.note_wasted(no);
    }
}
