//! Keeping frames free: a reserve is filled at the end of each turn, so that a request normally finds a frame at once.

use crate::units::PageId;

use super::PageCache;
use super::page::{PREFETCHED, UNSYNCED};
use super::policy::Verdict;
use super::write::FILL_FRAMES;

/// Pages looked at for one victim.
const STEPS_MAX: u32 = 64;

impl PageCache {
    /// Frames that are kept free.
    pub(super) fn reserve(&self) -> u32 {
        let total = self.frames.total();
        (total / 200).max(64).min(total / 8).max(FILL_FRAMES + 1)
    }

    /// Evicts clean pages until the reserve is full; says what is in the way if there are none.
    pub(super) fn reclaim(&mut self) {
        let target = if self.settings.retain { self.reserve() } else { self.frames.total() };
        while self.frames.free() < target && self.pages.len() > 0 {
            let Self { policy, pages, frames, .. } = self;
            let (mut dirty, mut unsynced) = (false, false);
            let mut judge = |id: PageId| {
                let page = &pages[id];
                let held = page.frame().is_none_or(|frame| frames.references(frame) > 1);
                let not_stable = page.any(UNSYNCED[0] | UNSYNCED[1]);
                dirty |= !page.dirty.is_empty();
                unsynced |= not_stable;
                if held || not_stable || page.busy() || !page.dirty.is_empty() {
                    Verdict::Keep
                } else {
                    Verdict::Evict { asked_for: !page.is(PREFETCHED) }
                }
            };
            let victim = policy.evict(STEPS_MAX, &mut judge, &|id| pages[id].no());
            let Some(id) = victim else {
                // Without retention there is always something left; only a want of frames is a reason to hurry.
                if self.frames.free() < self.reserve() {
                    self.writeback.pressure |= dirty;
                    if unsynced {
                        self.flushing.want_sync();
                    }
                }
                return;
            };
            self.drop_page(id, false);
            self.stats.evicted_pages += 1;
        }
    }

    /// A page goes, or is overwritten: if readahead brought it and nobody read it, that was in vain.
    pub(super) fn note_unread_prefetch(&mut self, id: PageId) {
        let page = &mut self.pages[id];
        if page.is(PREFETCHED) {
            let no = page.no();
            page.clear(PREFETCHED);
            self.streams.page_not_unread(page.period());
            self.stats.readahead_wasted_pages += 1;
            self.streams.wasted(no);
        }
    }
}
