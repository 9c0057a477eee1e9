//! S3-FIFO with one reference bit and a correlation window.
//!
//! Sources: Yang et al., "FIFO queues are all you need for cache eviction" (SOSP 2023); the author's later advice that
//! for block I/O one bit is better than two; and Clock2Q+ (Zhai et al., VLDB 2026): accesses to blocks are correlated,
//! so a second access soon after the first predicts little, and hits on the newest pages of the small queue set no bit.
//!
//! New pages enter *small*. A page that is used again before it reaches the end of small moves to *main*, a CLOCK with
//! one bit. The others are evicted, and *ghost* keeps their numbers: a page that returns while it has a ghost enters
//! main. Small's share of the cache can change at any time: see `adaptive.rs`.

use super::ghost::Ghost;
use super::list::{List, ListId, Node, add_nodes, nodes};
use super::{Policy, Verdict};
use crate::units::{PageId, PageNo, low_u16, low_u32};

const SMALL: ListId = ListId(1);
const MAIN: ListId = ListId(2);

/// Length of the correlation window, in percent of the cache: the accesses to a page belong to one burst until that
/// many pages have been inserted after it.
const BURST_PERCENT: u32 = 5;
/// Hits that advance the clock as much as one insertion. If the working set fits, nothing is inserted. Without this,
/// every hit would then count as part of a burst, and the next scan would find no page with its bit set.
const HITS_PER_INSERTION: u32 = 16;
/// Fewest ticks of the clock of [`Node::stamp`] in a burst: the resolution of its length.
const BURST_TICKS_MIN: u32 = 8;
/// While small has most of the cache, one eviction in ten is from main: otherwise pages that were hot once would stay
/// there forever.
const EVICTIONS_PER_MAIN: u32 = 10;

/// The result for a candidate for eviction.
enum QueueStep {
    Evicted(PageId),
    /// Its bit was set: it moved to main's newest end.
    Promoted,
    /// It may not be evicted.
    Kept,
}

/// The three queues.
#[derive(Debug)]
pub(super) struct S3Fifo {
    nodes: Vec<Node>,
    small: List,
    main: List,
    ghost: Ghost,
    /// Pages of the cache, of which small has `small_percent`.
    pages: u32,
    small_percent: u32,
    /// Pages are evicted from small while it is longer than this.
    small_target: u32,
    /// Time, in hits; an insertion counts as [`HITS_PER_INSERTION`].
    clock: u32,
    /// The clock of [`Node::stamp`] is `clock` without this many of its low bits.
    stamp_shift: u32,
    /// Length of a burst on that clock.
    burst_ticks: u16,
    /// Pages evicted.
    evicted: u32,
}

impl S3Fifo {
    /// A policy for a cache of `pages` pages, which can grow to `pages_max`. The small queue gets `small_percent` of
    /// them. `key` is a random key for the ghost list.
    pub fn new(pages: u32, pages_max: u32, small_percent: u32, key: u64) -> Self {
        let mut queues = Self {
            nodes: nodes(pages, pages_max),
            small: List::new(SMALL),
            main: List::new(MAIN),
            ghost: Ghost::new(pages, key),
            pages,
            small_percent,
            small_target: 0,
            clock: 0,
            stamp_shift: 0,
            burst_ticks: 0,
            evicted: 0,
        };
        queues.set_targets();
        queues
    }

    /// Changes small's share; later insertions and evictions adjust the queues.
    pub fn set_small_share(&mut self, small_percent: u32) {
        self.small_percent = small_percent;
        self.set_targets();
    }

    /// Sets the values that depend on the number of pages and on small's share. There are as many ghosts as pages in
    /// main, so that a loop longer than the cache does not evict itself from main.
    fn set_targets(&mut self) {
        let burst = (percent(self.pages, BURST_PERCENT) * HITS_PER_INSERTION).max(1);
        self.stamp_shift = (burst / BURST_TICKS_MIN).max(1).ilog2();
        self.burst_ticks = low_u16(u64::from(burst >> self.stamp_shift));
        self.small_target = percent(self.pages, self.small_percent).max(1);
        self.ghost.set_life(self.pages - self.small_target);
    }

    /// The coarse clock. It wraps, and stamps are compared by distance.
    fn stamp(&self) -> u16 {
        low_u16(u64::from(self.clock >> self.stamp_shift))
    }

    /// Whether the next page should be evicted from small.
    fn prefers_small(&self) -> bool {
        let small_has_most = self.small_target > self.pages / 2;
        let main_is_due = small_has_most && self.evicted.is_multiple_of(EVICTIONS_PER_MAIN);
        self.main.len() == 0 || (self.small.len() > self.small_target && !main_is_due)
    }

    /// Handles small's oldest page: promotes it to main if it was used again, otherwise evicts it if that is allowed.
    fn step_small(
        &mut self,
        judge: &mut dyn FnMut(PageId) -> Verdict,
        page_no: &dyn Fn(PageId) -> PageNo,
    ) -> QueueStep {
        let id = self.small.oldest().expect("small is not empty");
        if self.nodes[id.index()].referenced {
            self.small.unlink(&mut self.nodes, id);
            self.nodes[id.index()].referenced = false;
            self.main.push(&mut self.nodes, id);
            return QueueStep::Promoted;
        }
        match judge(id) {
            Verdict::Evict { used } => {
                self.small.unlink(&mut self.nodes, id);
                if used {
                    self.ghost.insert(page_no(id));
                }
                QueueStep::Evicted(id)
            }
            Verdict::Keep => {
                self.small.renew(&mut self.nodes, id);
                QueueStep::Kept
            }
        }
    }

    /// Handles main's oldest page: gives it another round if it was used, otherwise evicts it if that is allowed.
    fn step_main(&mut self, judge: &mut dyn FnMut(PageId) -> Verdict) -> QueueStep {
        let id = self.main.oldest().expect("main is not empty");
        let step = if std::mem::take(&mut self.nodes[id.index()].referenced) {
            QueueStep::Promoted
        } else {
            match judge(id) {
                Verdict::Evict { .. } => {
                    self.main.unlink(&mut self.nodes, id);
                    return QueueStep::Evicted(id);
                }
                Verdict::Keep => QueueStep::Kept,
            }
        };
        self.main.renew(&mut self.nodes, id);
        step
    }
}

impl Policy for S3Fifo {
    fn insert(&mut self, id: PageId, no: PageNo) {
        self.nodes[id.index()].referenced = false;
        if self.ghost.take(no) {
            self.main.push(&mut self.nodes, id);
        } else {
            self.clock = self.clock.wrapping_add(HITS_PER_INSERTION);
            self.nodes[id.index()].stamp = self.stamp();
            self.small.push(&mut self.nodes, id);
        }
    }

    fn first_touch(&mut self, id: PageId, _no: PageNo) {
        // The burst begins now. Readahead may have inserted the page long ago: counted from its insertion, the next hit
        // would count as one after the burst.
        self.nodes[id.index()].stamp = self.stamp();
    }

    fn touch(&mut self, id: PageId, _no: PageNo) {
        self.clock = self.clock.wrapping_add(1);
        let now = self.stamp();
        let node = &mut self.nodes[id.index()];
        let in_burst = node.list == SMALL && now.wrapping_sub(node.stamp) < self.burst_ticks;
        if !in_burst && !node.referenced {
            node.referenced = true;
        }
    }

    fn remove(&mut self, id: PageId) {
        match self.nodes[id.index()].list {
            SMALL => self.small.unlink(&mut self.nodes, id),
            MAIN => self.main.unlink(&mut self.nodes, id),
            _ => unreachable!("a page that is removed is on a queue"),
        }
    }

    fn evict(
        &mut self,
        kept_max: u32,
        judge: &mut dyn FnMut(PageId) -> Verdict,
        page_no: &dyn Fn(PageId) -> PageNo,
    ) -> Option<PageId> {
        // Only pages that are kept count against the bound. The cost of a promotion is bounded by the hit that set the
        // bit.
        let mut kept = 0;
        while self.len() > 0 {
            // Half of the bound for each queue: if one yields no victim, search the other.
            let is_stuck = kept > 0 && kept >= kept_max / 2;
            let from_small = (self.prefers_small() != is_stuck || self.main.len() == 0) && self.small.len() > 0;
            let step = if from_small { self.step_small(judge, page_no) } else { self.step_main(judge) };
            match step {
                QueueStep::Evicted(id) => {
                    self.evicted = self.evicted.wrapping_add(1);
                    return Some(id);
                }
                QueueStep::Kept => {
                    kept += 1;
                    if kept >= kept_max {
                        return None;
                    }
                }
                QueueStep::Promoted => {}
            }
        }
        None
    }

    fn evict_cold(
        &mut self,
        is_cold: &mut dyn FnMut(PageId) -> bool,
        page_no: &dyn Fn(PageId) -> PageNo,
    ) -> Option<PageId> {
        // The cost of a promotion is bounded by the hit that set the bit.
        while let Some(id) = self.small.oldest() {
            let is_referenced = self.nodes[id.index()].referenced;
            if !is_referenced && !is_cold(id) {
                return None;
            }
            let mut judge = |_| Verdict::Evict { used: true };
            if let QueueStep::Evicted(id) = self.step_small(&mut judge, page_no) {
                self.evicted = self.evicted.wrapping_add(1);
                return Some(id);
            }
        }
        None
    }

    fn add_slots(&mut self, slots: u32) {
        add_nodes(&mut self.nodes, slots);
    }

    fn set_pages(&mut self, pages: u32) {
        self.pages = pages;
        self.ghost.set_pages(pages);
        self.set_targets();
    }

    fn contains(&self, id: PageId) -> bool {
        self.nodes[id.index()].list != ListId::NONE
    }

    fn len(&self) -> u32 {
        self.small.len() + self.main.len()
    }

    fn metadata_bytes(&self) -> usize {
        self.nodes.len() * size_of::<Node>() + self.ghost.metadata_bytes()
    }
}

fn percent(pages: u32, percent: u32) -> u32 {
    low_u32(u64::from(pages) * u64::from(percent) / 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page_no(id: PageId) -> PageNo {
        PageNo(u64::from(id.0))
    }

    fn touch(policy: &mut S3Fifo, id: u32) {
        policy.touch(PageId(id), page_no(PageId(id)));
    }

    fn evict(policy: &mut S3Fifo) -> PageId {
        policy.evict(64, &mut |_| Verdict::Evict { used: true }, &page_no).expect("a page may be evicted")
    }

    #[test]
    fn a_page_that_returns_while_its_ghost_lives_enters_main() {
        let mut policy = S3Fifo::new(100, 100, 10, 0);
        for id in 0..20 {
            policy.insert(PageId(id), page_no(PageId(id)));
        }
        assert_eq!(evict(&mut policy), PageId(0));
        policy.insert(PageId(0), PageNo(0));
        assert_eq!(policy.nodes[0].list, MAIN);
        assert_eq!(policy.nodes[1].list, SMALL);
    }

    #[test]
    fn a_scan_does_not_evict_hot_pages() {
        let mut policy = S3Fifo::new(1000, 1000, 10, 0);
        for id in 0..1000 {
            policy.insert(PageId(id), page_no(PageId(id)));
        }
        // The first 200 are used long after their insertion, so not in a burst.
        for id in 0..200 {
            touch(&mut policy, id);
        }
        // A scan of ten times the cache; each hot page is used from time to time.
        for scan in 0..10_000u64 {
            let id = evict(&mut policy);
            assert!(id.0 >= 200, "hot page {id:?} was evicted by scan step {scan}");
            policy.insert(id, PageNo(10_000 + scan));
            touch(&mut policy, u32::try_from(scan % 200).unwrap());
        }
    }

    #[test]
    fn hits_within_a_burst_set_no_reference_bit() {
        let mut policy = S3Fifo::new(1000, 1000, 10, 0);
        policy.insert(PageId(0), PageNo(0));
        touch(&mut policy, 0);
        assert!(!policy.nodes[0].referenced);
        for id in 1..100 {
            policy.insert(PageId(id), page_no(PageId(id)));
        }
        touch(&mut policy, 0);
        assert!(policy.nodes[0].referenced);
    }

    #[test]
    fn the_burst_of_a_prefetched_page_starts_with_its_first_use() {
        let mut policy = S3Fifo::new(1000, 1000, 10, 0);
        for id in 0..100 {
            policy.insert(PageId(id), page_no(PageId(id)));
        }
        policy.first_touch(PageId(0), PageNo(0));
        touch(&mut policy, 0);
        assert!(!policy.nodes[0].referenced, "still in the burst");
        for id in 100..200 {
            policy.insert(PageId(id), page_no(PageId(id)));
        }
        touch(&mut policy, 0);
        assert!(policy.nodes[0].referenced);
    }

    #[test]
    fn hits_set_the_reference_bit_without_any_insertion() {
        let mut policy = S3Fifo::new(1000, 1000, 10, 0);
        for id in 0..100 {
            policy.insert(PageId(id), page_no(PageId(id)));
        }
        for hit in 0..2000 {
            touch(&mut policy, hit % 100);
        }
        assert!((0..100).all(|id| policy.nodes[id].referenced));
    }

    #[test]
    fn main_evicts_formerly_hot_pages_while_small_has_most_of_the_cache() {
        let mut policy = S3Fifo::new(1000, 1000, 10, 0);
        for id in 0..1000 {
            policy.insert(PageId(id), page_no(PageId(id)));
        }
        for id in 0..500 {
            touch(&mut policy, id);
        }
        let next = evict(&mut policy);
        assert_eq!((next, policy.main.len()), (PageId(500), 500));
        policy.set_small_share(90);
        // The 500 pages of main are not used again.
        let mut free = next;
        for new in 0..6000u64 {
            policy.insert(free, PageNo(10_000 + new));
            free = evict(&mut policy);
        }
        assert!(policy.main.len() < 50, "{} pages are left in main", policy.main.len());
    }

    #[test]
    fn main_is_searched_if_no_page_of_small_may_be_evicted() {
        let mut policy = S3Fifo::new(100, 100, 10, 0);
        for id in 0..100 {
            policy.insert(PageId(id), page_no(PageId(id)));
        }
        for id in 0..30 {
            touch(&mut policy, id);
        }
        // The first 30 of small are promoted to main. All others of small are kept, and the victim comes from main.
        let mut judge = |id: PageId| {
            if id.0 < 30 { Verdict::Evict { used: true } } else { Verdict::Keep }
        };
        assert!(policy.evict(200, &mut judge, &page_no).is_some());
    }
}
