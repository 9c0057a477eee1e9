//! Replacement: which page to evict. The policies implement one small trait, so that benchmarks can compare them.
//!
//! A policy works on slots of the page table ([`PageId`]). It also gets the page's number, to recognize a page that
//! returns in another slot after its eviction.

use crate::units::{PageId, PageNo};

use super::PolicyKind;

mod adaptive;
mod ghost;
mod list;
mod lru;
mod mini_simulation;
mod s3fifo;

pub use mini_simulation::MiniSimulation;

/// The cache's decision about a page that the policy proposes to evict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The page is evicted: the policy removes it.
    Evict {
        /// Whether a guest has used the page. False for a page that was read ahead and went unread.
        used: bool,
    },
    /// The page is busy, dirty or not yet synced: the policy proposes another one.
    Keep,
}

/// A replacement policy over the page table's slots.
pub(crate) trait Policy: Send + std::fmt::Debug {
    /// The page was inserted into the table. No guest has used it yet.
    fn insert(&mut self, id: PageId, no: PageNo);
    /// A guest uses the page for the first time: when it is inserted, or later if the page was read ahead.
    fn first_touch(&mut self, id: PageId, no: PageNo);
    /// A guest uses the page again.
    fn touch(&mut self, id: PageId, no: PageNo);
    /// The page was removed for a reason other than eviction (discard, error).
    fn remove(&mut self, id: PageId);
    /// Proposes pages to `judge` until one is evicted, or `kept_max` were kept. `page_no` returns the number of a page.
    ///
    /// => An evicted page is no longer on a queue when this returns.
    fn evict(
        &mut self,
        kept_max: u32,
        judge: &mut dyn FnMut(PageId) -> Verdict,
        page_no: &dyn Fn(PageId) -> PageNo,
    ) -> Option<PageId>;
    /// Evicts the page that the policy would evict next among those that were used only once, or in one burst, if
    /// `is_cold` agrees. `None`: there is none, or the policy does not know how often pages were used.
    fn evict_cold(
        &mut self,
        _is_cold: &mut dyn FnMut(PageId) -> bool,
        _page_no: &dyn Fn(PageId) -> PageNo,
    ) -> Option<PageId> {
        None
    }
    /// Sets the number of slots, which never decreases.
    fn add_slots(&mut self, slots: u32);
    /// Sets the size of the cache: the shares of the queues and the record of evicted pages change accordingly.
    fn set_pages(&mut self, pages: u32);
    /// Whether the page is on a queue.
    fn contains(&self, id: PageId) -> bool;
    /// Number of pages on the queues.
    fn len(&self) -> u32;
    /// Bytes of memory that the policy takes.
    fn metadata_bytes(&self) -> usize;
}

/// A policy for a cache of `pages` pages, later of at most `pages_max`; `key` is random.
pub(super) fn new(kind: PolicyKind, pages: u32, pages_max: u32, key: u64) -> Box<dyn Policy> {
    match kind {
        PolicyKind::S3Fifo => Box::new(adaptive::Adaptive::new(pages, pages_max, key)),
        PolicyKind::Lru => Box::new(lru::Lru::new(pages, pages_max)),
    }
}
