//! S3-FIFO that finds out how long its small queue should be.
//!
//! A short small queue (10 % of the cache) is right for most of what guests do: it keeps pages that are popular, and a
//! scan passes through without harm. But a page that comes back after a while, once or twice and then never more (a log
//! that is compacted, a working set that drifts), has left the short queue by then, where LRU would still have it. No
//! fixed share serves both: benches/miss_ratio.rs has cases in which either loses ten points and more.
//!
//! So the policy tries both on a sample of the pages, in two caches without memory, and takes the share of the one that
//! misses less. Sources: Waldspurger et al., "Cache modeling and optimization using miniature simulations" (ATC 2017);
//! for the counter that says who is ahead, Qureshi et al., "Adaptive insertion policies" (ISCA 2007). ARC's rule, which
//! moves the border by hits among ghosts, was tried in its place and did worse: it drifts where nothing is to be gained.

use crate::units::{PageId, PageNo, low_u32};

use super::mini_simulation::MiniSimulation;
use super::s3fifo::S3Fifo;
use super::{Policy, Verdict};

/// Small's share where pages are last_reported apart by how often they are asked for.
const SHORT_PERCENT: u32 = 10;
/// Small's share where what counts is how long ago that was: nearly LRU.
const LONG_PERCENT: u32 = 90;
/// Pages of each trial; fewer are too much at the mercy of chance.
const TRIAL_PAGES: u32 = 512;
/// The lead counts up to this, so that what was long ago is outweighed soon.
const LEAD_MAX: i32 = 32;
/// A lead of so many misses decides.
const LEAD_DECIDES: i32 = 8;

/// The queues, and the trials that say how to set them.
#[derive(Debug)]
pub(super) struct Adaptive {
    queues: S3Fifo,
    short: MiniSimulation,
    long: MiniSimulation,
    /// Misses of `short` less those of `long`, within bounds.
    lead_of_long: i32,
    /// Pages whose hash lies below this take part in the trials.
    sample_below: u64,
}

impl Adaptive {
    /// For a cache of `pages` pages.
    pub fn new(pages: u32) -> Self {
        let trial_pages = pages.min(TRIAL_PAGES);
        let trial = |percent| MiniSimulation::with(Box::new(S3Fifo::new(trial_pages, percent)), trial_pages);
        Self {
            queues: S3Fifo::new(pages, SHORT_PERCENT),
            short: trial(SHORT_PERCENT),
            long: trial(LONG_PERCENT),
            lead_of_long: 0,
            sample_below: (u64::from(trial_pages) << 32) / u64::from(pages.max(1)),
        }
    }

    /// Tells the trials of an access, if the page is in the sample.
    fn try_out(&mut self, no: PageNo) {
        // Not the hash that places ghosts: the sample would fall into a few of their sets.
        let hash = low_u32(no.0.wrapping_mul(0xd6e8_feb8_6659_fd93) >> 32);
        if u64::from(hash) < self.sample_below {
            self.compare(no);
        }
    }

    #[cold]
    fn compare(&mut self, no: PageNo) {
        let (short, long) = (self.short.access(no), self.long.access(no));
        if short == long {
            return;
        }
        self.lead_of_long = (self.lead_of_long + if long { 1 } else { -1 }).clamp(-LEAD_MAX, LEAD_MAX);
        if self.lead_of_long >= LEAD_DECIDES {
            self.queues.set_small_share(LONG_PERCENT);
        } else if self.lead_of_long <= -LEAD_DECIDES {
            self.queues.set_small_share(SHORT_PERCENT);
        }
    }
}

impl Policy for Adaptive {
    fn insert(&mut self, id: PageId, no: PageNo) {
        self.queues.insert(id, no);
    }

    fn first_touch(&mut self, id: PageId, no: PageNo) {
        self.queues.first_touch(id, no);
        self.try_out(no);
    }

    fn touch(&mut self, id: PageId, no: PageNo) {
        self.queues.touch(id, no);
        self.try_out(no);
    }

    fn remove(&mut self, id: PageId) {
        self.queues.remove(id);
    }

    fn evict(
        &mut self,
        steps_max: u32,
        judge: &mut dyn FnMut(PageId) -> Verdict,
        number: &dyn Fn(PageId) -> PageNo,
    ) -> Option<PageId> {
        self.queues.evict(steps_max, judge, number)
    }

    fn contains(&self, id: PageId) -> bool {
        self.queues.contains(id)
    }

    fn len(&self) -> u32 {
        self.queues.len()
    }

    fn metadata_bytes(&self) -> usize {
        self.queues.metadata_bytes() + self.short.metadata_bytes() + self.long.metadata_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::policy::lru::Lru;
    use crate::prng::Prng;

    const PAGES: u32 = 2000;

    fn misses(policy: Box<dyn Policy>, accesses: impl Iterator<Item = u64>) -> usize {
        let mut model = MiniSimulation::with(policy, PAGES);
        accesses.filter(|page| !model.access(PageNo(*page))).count()
    }

    /// Every page comes back once, when most of a cache of others has been asked for.
    fn once_again() -> impl Iterator<Item = u64> {
        (800..50_000u64).flat_map(|n| [n, n - 800])
    }

    /// Hot pages of half the cache, asked for at random and at first alone, then with a scan between them.
    fn hot_pages_and_a_scan(scan_from: u64, end: u64) -> impl Iterator<Item = u64> {
        let mut prng = Prng::new(1);
        (0..end).flat_map(move |n| {
            let hot = 100_000 + prng.below(1000);
            [Some(hot), (n >= scan_from).then_some(1_000_000 + n)].into_iter().flatten()
        })
    }

    #[test]
    fn what_comes_back_once_after_a_while_is_kept_as_by_lru() {
        let lru = misses(Box::new(Lru::new(PAGES)), once_again());
        let fixed = misses(Box::new(S3Fifo::new(PAGES, SHORT_PERCENT)), once_again());
        let adaptive = misses(Box::new(Adaptive::new(PAGES)), once_again());
        assert!(fixed > lru * 3 / 2, "the case is hard for a short queue: {fixed} misses, LRU {lru}");
        assert!(adaptive < lru * 21 / 20, "{adaptive} misses, LRU {lru}");
    }

    #[test]
    fn a_scan_that_comes_while_the_long_queue_is_right_turns_it_short() {
        let misses_before_scan =
            misses(Box::new(Adaptive::new(PAGES)), once_again().chain(hot_pages_and_a_scan(20_000, 20_000)));
        let misses_in_all =
            misses(Box::new(Adaptive::new(PAGES)), once_again().chain(hot_pages_and_a_scan(20_000, 40_000)));
        let hot_misses = misses_in_all - misses_before_scan - 20_000;
        assert!(hot_misses < 20_000 / 10, "{hot_misses} of 20000 accesses to hot pages missed");
    }
}
