//! Warming: reads in pages that were cached earlier, with a lower priority than all guest requests.
//!
//! Warmed pages get free frames, and those of cold pages: pages that guests have used only once, or in one burst, and
//! that the policy would evict next. Warmed pages that no guest has used are not cold, so a list that does not fit
//! leaves its beginning in the cache.

use crate::units::{PageNo, PageSpan};

use super::PageCache;

/// A further page is read in only while at most this many store operations are in flight. A guest's own operations have
/// priority.
const OPS_MAX: usize = 4;
/// Most pages that are read in at a time, 1 MiB: other users of the cache and the store wait meanwhile.
const PAGES_MAX: u32 = 256;
/// The cache counts as full while less than this fraction of its frames is free, so that the next requests of guests
/// evict nothing.
const FREE_DIVISOR: u32 = 32;

/// The result of a step of warming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WarmStep {
    /// It has read in as much as one step may.
    Done,
    /// The guest or the store is busy.
    Busy,
    /// The cache is full, and no page is cold.
    Full,
}

impl PageCache {
    /// Reads in absent pages of `span`, in order. Returns the page from which to continue.
    ///
    /// => It never waits, evicts only cold pages, and starts no read while a guest waits for a page.
    pub fn warm(&mut self, span: PageSpan) -> (PageNo, WarmStep) {
        let (mut next, mut pages) = (span.first, 0);
        let least_free = self.reserve() + self.pages.frames().total() / FREE_DIVISOR;
        let is_busy = self.health.stopped().is_some()
            || self.freeze.holds_writes()
            || self.waiters.in_use() > 0
            || self.store_ops.in_flight() >= OPS_MAX;
        if is_busy {
            return (next, WarmStep::Busy);
        }
        self.run.is_readahead = true;
        let mut step = WarmStep::Done;
        while next < span.end() && next.0 < self.readable_pages() && pages < PAGES_MAX {
            if self.pages.find(next).is_none() && !self.ranges.contain(next) {
                if self.pages.frames().free() <= least_free && !self.evict_cold_page() {
                    step = WarmStep::Full;
                    break;
                }
                match self.begin_warming(next) {
                    Some(is_read) => pages += u32::from(is_read),
                    None => {
                        step = WarmStep::Busy;
                        break;
                    }
                }
            }
            next = next.plus(1);
        }
        self.submit_run();
        self.run.is_readahead = false;
        (if next.0 < self.readable_pages() { next } else { span.end() }, step)
    }

    /// Evicts a cold page. False: there is none.
    fn evict_cold_page(&mut self) -> bool {
        let evicted = self.pages.evict_cold().is_some();
        self.stats.evicted_pages += u64::from(evicted);
        evicted
    }

    /// The pages in `count` slots of the page table from slot `from` on that have all their bytes. Also returns the
    /// next slot, if there is one.
    pub fn resident(&self, from: u32, count: u32) -> (Vec<PageNo>, Option<u32>) {
        let next = from.saturating_add(count);
        let pages = self.pages.whole_pages(from, count);
        (pages, Some(next).filter(|&next| next < self.pages.slots()))
    }
}
