//! Which page to give up: a small trait, so that policies are measured against each other and not argued about.
//!
//! A policy sees slots only ([`PageId`]) and the page's number where it needs a name that outlives the slot (ghosts).

use crate::units::{PageId, PageNo};

use super::PolicyKind;

mod adaptive;
mod ghost;
mod list;
mod lru;
mod mini_simulation;
mod s3fifo;

pub use mini_simulation::MiniSimulation;

/// What the cache says of a page that the policy offers up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The page goes now: the policy forgets it. `asked_for` is false for readahead that nobody read.
    Evict {
        /// Whether a guest has asked for the page.
        asked_for: bool,
    },
    /// The page is busy, dirty or not yet synced: leave it and try another.
    Keep,
}

/// A replacement policy over the page table's slots.
pub(crate) trait Policy: Send + std::fmt::Debug {
    /// The page came in, and nobody has asked for it yet.
    fn insert(&mut self, id: PageId, no: PageNo);
    /// A guest asked for the page for the first time: when it came in, or later if readahead brought it.
    fn first_touch(&mut self, id: PageId, no: PageNo);
    /// A guest asked for the page again.
    fn touch(&mut self, id: PageId, no: PageNo);
    /// The page went for another reason than eviction (discard, error).
    fn remove(&mut self, id: PageId);
    /// Finds a page to evict: offers candidates to `judge` until one is evicted or `steps_max` have been seen.
    ///
    /// => An evicted page is on no queue any more when this returns.
    fn evict(
        &mut self,
        steps_max: u32,
        judge: &mut dyn FnMut(PageId) -> Verdict,
        number: &dyn Fn(PageId) -> PageNo,
    ) -> Option<PageId>;
    /// Whether the page is on a queue.
    fn contains(&self, id: PageId) -> bool;
    /// Number of pages on the queues.
    fn len(&self) -> u32;
    /// Bytes of memory the policy takes.
    fn metadata_bytes(&self) -> usize;
}

/// A policy for a cache of `pages` pages.
pub(super) fn new(kind: PolicyKind, pages: u32) -> Box<dyn Policy> {
    match kind {
        PolicyKind::S3Fifo => Box::new(adaptive::Adaptive::new(pages)),
        PolicyKind::Lru => Box::new(lru::Lru::new(pages)),
    }
}
