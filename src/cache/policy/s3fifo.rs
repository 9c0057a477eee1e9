//! S3-FIFO with one reference bit and a correlation window.
//!
//! Sources: Yang et al., "FIFO queues are all you need for cache eviction" (SOSP 2023); the author's later advice that
//! for block I/O one bit beats two; and Clock2Q+ (Zhai et al., VLDB 2026): accesses to blocks come in bursts, so a
//! second access soon after the first says little, and hits on the newest pages of the small queue set no bit.
//!
//! New pages enter *small*. A page that was asked for again before it reaches small's end moves to *main*, a CLOCK with
//! one bit; the others leave, and their numbers are remembered in *ghost*: a page that comes back while its ghost lives
//! goes straight to main. Small's share of the cache can change at any time: see `adaptive.rs`.

use super::ghost::Ghost;
use super::list::{List, Node, nodes};
use super::{Policy, Verdict};
use crate::units::{PageId, PageNo, low_u16, low_u32};

const SMALL: u8 = 1;
const MAIN: u8 = 2;

/// A burst lasts until this share of the cache has come in behind the page.
const BURST_PERCENT: u32 = 5;
/// So many hits pass as much time as one page that comes in. When all that is in use fits, nothing comes in, and without
/// this no hit would ever count: the next scan would find nothing marked as used.
const HITS_PER_INSERTION: u32 = 16;
/// The clock of [`Node::stamp`] ticks at least this often during a burst.
const BURST_TICKS_MIN: u32 = 8;
/// While small has most of the cache, main gives up one page in so many, or those that once were hot would stay for
/// ever.
const MAIN_TURN: u32 = 10;

/// What became of one candidate.
enum QueueStep {
    Evicted(PageId),
    /// It had been asked for: it moved up, or round.
    Promoted,
    /// It must stay, as so many before it in this search.
    Kept(u32),
}

/// The three queues.
#[derive(Debug)]
pub(super) struct S3Fifo {
    nodes: Vec<Node>,
    small: List,
    main: List,
    ghost: Ghost,
    /// Small gives up its pages while it is longer than this.
    small_target: u32,
    /// Time, in hits; a page that comes in counts for several.
    clock: u32,
    /// The clock of [`Node::stamp`] is this one without so many of its bits.
    stamp_shift: u32,
    /// A burst's length on that clock.
    burst_ticks: u16,
    /// Pages evicted.
    evicted: u32,
}

impl S3Fifo {
    /// For a cache of `pages` pages, of which small takes `small_percent`.
    pub fn new(pages: u32, small_percent: u32) -> Self {
        let burst = (percent(pages, BURST_PERCENT) * HITS_PER_INSERTION).max(1);
        let stamp_shift = (burst / BURST_TICKS_MIN).max(1).ilog2();
        let mut queues = Self {
            nodes: nodes(pages),
            small: List::new(SMALL),
            main: List::new(MAIN),
            ghost: Ghost::new(pages),
            small_target: 0,
            clock: 0,
            stamp_shift,
            burst_ticks: low_u16(u64::from(burst >> stamp_shift)),
            evicted: 0,
        };
        queues.set_small_share(small_percent);
        queues
    }

    /// Gives small another share; pages move as they come and go. Ghosts are as many as main has pages: so a loop that
    /// is longer than the cache does not push itself out of main.
    pub fn set_small_share(&mut self, small_percent: u32) {
        let pages = low_u32(self.nodes.len() as u64);
        self.small_target = percent(pages, small_percent).max(1);
        self.ghost.set_life(pages - self.small_target);
    }

    /// A coarse clock; wraps, and is compared by distance.
    fn stamp(&self) -> u16 {
        low_u16(u64::from(self.clock >> self.stamp_shift))
    }

    /// Whether the next page to go should be one of small's.
    fn prefers_small(&self) -> bool {
        let mains_turn =
            self.small_target > low_u32(self.nodes.len() as u64) / 2 && self.evicted.is_multiple_of(MAIN_TURN);
        self.main.len() == 0 || (self.small.len() > self.small_target && !mains_turn)
    }

    /// Small's oldest page: up to main if it was asked for again, out if it may go.
    fn step_small(
        &mut self,
        judge: &mut dyn FnMut(PageId) -> (Verdict, u32),
        number: &dyn Fn(PageId) -> PageNo,
    ) -> QueueStep {
        let id = self.small.oldest().expect("small is not empty");
        if self.nodes[id.index()].referenced {
            self.small.unlink(&mut self.nodes, id);
            self.nodes[id.index()].referenced = false;
            self.main.push(&mut self.nodes, id);
            return QueueStep::Promoted;
        }
        match judge(id) {
            (Verdict::Evict { asked_for }, _) => {
                self.small.unlink(&mut self.nodes, id);
                if asked_for {
                    self.ghost.insert(number(id));
                }
                QueueStep::Evicted(id)
            }
            (Verdict::Keep, kept) => {
                self.small.renew(&mut self.nodes, id);
                QueueStep::Kept(kept)
            }
        }
    }

    /// Main's oldest page: round again if it was asked for, out if it may go.
    fn step_main(&mut self, judge: &mut dyn FnMut(PageId) -> (Verdict, u32)) -> QueueStep {
        let id = self.main.oldest().expect("main is not empty");
        let step = if std::mem::take(&mut self.nodes[id.index()].referenced) {
            QueueStep::Promoted
        } else {
            match judge(id) {
                (Verdict::Evict { .. }, _) => {
                    self.main.unlink(&mut self.nodes, id);
                    return QueueStep::Evicted(id);
                }
                (Verdict::Keep, kept) => QueueStep::Kept(kept),
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
        // Readahead may have brought it long ago, and then this would look like a second access after a while.
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
            _ => unreachable!("a page that goes is on a queue"),
        }
    }

    fn evict(
        &mut self,
        steps_max: u32,
        judge: &mut dyn FnMut(PageId) -> Verdict,
        number: &dyn Fn(PageId) -> PageNo,
    ) -> Option<PageId> {
        // Only pages that must stay count against the bound: promoting a page and clearing its bit were was_worthwhile for by
        // the access that set it.
        let mut kept = 0;
        let mut judge = |id: PageId| {
            let verdict = judge(id);
            kept += u32::from(verdict == Verdict::Keep);
            (verdict, kept)
        };
        let mut stuck = false;
        while self.len() > 0 {
            // While every page of one queue must stay, look at the other one too.
            let from_small = (self.prefers_small() != stuck || self.main.len() == 0) && self.small.len() > 0;
            let step = if from_small { self.step_small(&mut judge, number) } else { self.step_main(&mut judge) };
            match step {
                QueueStep::Evicted(id) => {
                    self.evicted = self.evicted.wrapping_add(1);
                    return Some(id);
                }
                QueueStep::Kept(kept) if kept >= steps_max => return None,
                QueueStep::Kept(kept) => stuck = kept >= steps_max / 2,
                QueueStep::Promoted => {}
            }
        }
        None
    }

    fn contains(&self, id: PageId) -> bool {
        self.nodes[id.index()].list != 0
    }

    fn len(&self) -> u32 {
        self.small.len() + self.main.len()
    }

    fn metadata_bytes(&self) -> usize {
        self.nodes.capacity() * size_of::<Node>() + self.ghost.metadata_bytes()
    }
}

fn percent(pages: u32, percent: u32) -> u32 {
    low_u32(u64::from(pages) * u64::from(percent) / 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(id: PageId) -> PageNo {
        PageNo(u64::from(id.0))
    }

    fn touch(policy: &mut S3Fifo, id: u32) {
        policy.touch(PageId(id), number(PageId(id)));
    }

    fn evict(policy: &mut S3Fifo) -> PageId {
        policy.evict(64, &mut |_| Verdict::Evict { asked_for: true }, &number).expect("something can go")
    }

    #[test]
    fn a_page_that_comes_back_from_the_ghost_goes_to_main() {
        let mut policy = S3Fifo::new(100, 10);
        for id in 0..20 {
            policy.insert(PageId(id), number(PageId(id)));
        }
        assert_eq!(evict(&mut policy), PageId(0));
        policy.insert(PageId(0), PageNo(0));
        assert_eq!(policy.nodes[0].list, MAIN);
        assert_eq!(policy.nodes[1].list, SMALL);
    }

    #[test]
    fn a_scan_does_not_push_out_what_is_in_use() {
        let mut policy = S3Fifo::new(1000, 10);
        for id in 0..1000 {
            policy.insert(PageId(id), number(PageId(id)));
        }
        // The first 200 are asked for long after they came: that is no burst.
        for id in 0..200 {
            touch(&mut policy, id);
        }
        // A scan of ten times the cache; hot pages are asked for now and then.
        for scan in 0..10_000u64 {
            let id = evict(&mut policy);
            assert!(id.0 >= 200, "hot page {id:?} was evicted by scan step {scan}");
            policy.insert(id, PageNo(10_000 + scan));
            touch(&mut policy, u32::try_from(scan % 200).unwrap());
        }
    }

    #[test]
    fn a_burst_just_after_the_page_came_sets_no_bit() {
        let mut policy = S3Fifo::new(1000, 10);
        policy.insert(PageId(0), PageNo(0));
        touch(&mut policy, 0);
        assert!(!policy.nodes[0].referenced);
        for id in 1..100 {
            policy.insert(PageId(id), number(PageId(id)));
        }
        touch(&mut policy, 0);
        assert!(policy.nodes[0].referenced);
    }

    #[test]
    fn what_readahead_brought_is_not_hot_when_it_is_asked_for_at_last() {
        let mut policy = S3Fifo::new(1000, 10);
        for id in 0..100 {
            policy.insert(PageId(id), number(PageId(id)));
        }
        policy.first_touch(PageId(0), PageNo(0));
        touch(&mut policy, 0);
        assert!(!policy.nodes[0].referenced, "its burst begins with the first touch");
        for id in 100..200 {
            policy.insert(PageId(id), number(PageId(id)));
        }
        touch(&mut policy, 0);
        assert!(policy.nodes[0].referenced);
    }

    #[test]
    fn hits_count_although_nothing_comes_in() {
        let mut policy = S3Fifo::new(1000, 10);
        for id in 0..100 {
            policy.insert(PageId(id), number(PageId(id)));
        }
        for hit in 0..2000 {
            touch(&mut policy, hit % 100);
        }
        assert!((0..100).all(|id| policy.nodes[id].referenced));
    }

    #[test]
    fn main_gives_up_what_was_hot_once_when_small_has_most_of_the_cache() {
        let mut policy = S3Fifo::new(1000, 10);
        for id in 0..1000 {
            policy.insert(PageId(id), number(PageId(id)));
        }
        for id in 0..500 {
            touch(&mut policy, id);
        }
        let next = evict(&mut policy);
        assert_eq!((next, policy.main.len()), (PageId(500), 500));
        policy.set_small_share(90);
        // Nobody asks for the 500 pages of main again.
        let mut free = next;
        for new in 0..6000u64 {
            policy.insert(free, PageNo(10_000 + new));
            free = evict(&mut policy);
        }
        assert!(policy.main.len() < 50, "{} pages are left in main", policy.main.len());
    }

    #[test]
    fn a_victim_is_found_behind_a_queue_of_pages_that_must_stay() {
        let mut policy = S3Fifo::new(100, 10);
        for id in 0..100 {
            policy.insert(PageId(id), number(PageId(id)));
        }
        for id in 0..30 {
            touch(&mut policy, id);
        }
        // Small's first 30 go up to main; then all of small must stay, and main gives the victim.
        let mut judge = |id: PageId| {
            if id.0 < 30 { Verdict::Evict { asked_for: true } } else { Verdict::Keep }
        };
        assert!(policy.evict(200, &mut judge, &number).is_some());
    }
}
