//! The witness of the last Sync: a page that was written shortly before it, and that the store now has as its frame has
//! it. Its hash in the ledger shows the next daemon that the image has the last writes, so that it is no older copy.

use crate::units::{FrameId, PageId, PageNo, SectorMask};

use super::PageCache;

/// Most pages that are considered after a Sync, from the last one that was written.
const CANDIDATES: usize = 8;

impl PageCache {
    /// Chooses the witness among the pages that a Sync covers, in the order in which they were written.
    pub(super) fn choose_witness(&self, synced: &[PageId]) -> Option<PageId> {
        synced.iter().rev().take(CANDIDATES).copied().find(|id| self.is_witness(*id))
    }

    /// The witness of a Sync that has succeeded since the last call: its page and its frame.
    pub fn take_witness(&mut self) -> Option<(PageNo, FrameId)> {
        let id = self.flushing.take_witness()?;
        let page = &self.pages[id];
        // A completion after that of the Sync may have changed the page.
        if self.is_witness(id) { Some((page.no(), page.frame()?)) } else { None }
    }

    /// Whether the store has the whole page as its frame has it, durably, and no operation is about to change that.
    fn is_witness(&self, id: PageId) -> bool {
        // The slot may be free meanwhile: then nothing is valid. Or it may have another page, which is as good.
        let page = &self.pages[id];
        page.valid == SectorMask::ALL
            && !page.is_not_durable()
            && !page.busy()
            // Of a page that the end of the image cuts, the rest is not on the store.
            && self.pages.beyond_image(page.no()).is_empty()
            && !self.ranges.contain(page.no())
            && !self.changed_ranges.contain(page.no())
            && self.zeroed_sectors(page.no()).is_empty()
    }
}
