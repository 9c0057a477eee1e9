//! S3-FIFO that adapts the length of its small queue.
//!
//! A short small queue (10 % of the cache) suits most guests: it keeps popular pages, and a scan does no harm. But some
//! pages are used once or twice more after a while, and never again (a log that is compacted, a working set that
//! drifts). They have left the short queue before that use, while LRU would still have them. No fixed share suits both:
//! in benches/miss_ratio.rs each loses ten points or more in some workload.
//!
//! So the policy simulates both shares on a sample of the pages, and uses the one with fewer misses. Sources:
//! Waldspurger et al., "Cache modeling and optimization using miniature simulations" (ATC 2017); for the counter that
//! selects (PSEL), Qureshi et al., "Adaptive insertion policies for high performance caching" (ISCA 2007). ARC's rule,
//! which moves the border by hits among ghosts, did worse: it drifts when neither share is better.

use crate::units::{PageId, PageNo, low_u32};

use super::mini_simulation::MiniSimulation;
use super::s3fifo::S3Fifo;
use super::{Policy, Verdict};

/// Small's share of the cache if frequency of use is the better criterion.
const SHORT_PERCENT: u32 = 10;
/// Small's share of the cache if recency of use is the better criterion: nearly LRU.
const LONG_PERCENT: u32 = 90;
/// Pages of each simulated cache. With fewer, chance decides too often.
const SIMULATED_PAGES: u32 = 512;
/// The selector saturates here, so that it soon follows a change in the guest's behaviour.
const SELECTOR_MAX: i32 = 32;
/// The selector changes the share when it leads by this many misses: a smaller lead may be chance.
const SELECTOR_LEAD: i32 = 8;
/// Multiplier of the hash that selects the sample. It is not the ghost queue's hash: the sample would fall into a few
/// of the ghost queue's sets.
const SAMPLE_HASH: u64 = 0xd6e8_feb8_6659_fd93;

/// The queues, and the simulations that choose the share of the small one.
#[derive(Debug)]
pub(super) struct Adaptive {
    queues: S3Fifo,
    short: MiniSimulation,
    long: MiniSimulation,
    /// Misses of `short` minus misses of `long`, saturating.
    selector: i32,
    /// Pages of each simulated cache.
    simulated: u32,
    /// A page is in the sample if its hash, of 32 bits, is below this.
    sample_below: u64,
    /// Random, so that a guest cannot predict which pages are in the sample, and their places in the simulations.
    key: u64,
}

impl Adaptive {
    /// A policy for a cache of `pages` pages, later of at most `pages_max`; `key` is random.
    pub fn new(pages: u32, pages_max: u32, key: u64) -> Self {
        let simulated = pages.min(SIMULATED_PAGES);
        let simulation =
            |percent| MiniSimulation::with_policy(Box::new(S3Fifo::new(simulated, simulated, percent, key)), simulated);
        Self {
            queues: S3Fifo::new(pages, pages_max, SHORT_PERCENT, key),
            short: simulation(SHORT_PERCENT),
            long: simulation(LONG_PERCENT),
            selector: 0,
            simulated,
            sample_below: sample_below(simulated, pages),
            key,
        }
    }

    /// Simulates an access, if the page is in the sample.
    fn sample(&mut self, no: PageNo) {
        let keyed = no.0 ^ self.key;
        let hash = low_u32(keyed.wrapping_mul(SAMPLE_HASH) >> 32);
        if u64::from(hash) < self.sample_below {
            self.simulate(PageNo(keyed));
        }
    }

    #[cold]
    fn simulate(&mut self, no: PageNo) {
        let (short_hit, long_hit) = (self.short.access(no), self.long.access(no));
        if short_hit == long_hit {
            return;
        }
        self.selector = (self.selector + if long_hit { 1 } else { -1 }).clamp(-SELECTOR_MAX, SELECTOR_MAX);
        if self.selector >= SELECTOR_LEAD {
            self.queues.set_small_share(LONG_PERCENT);
        } else if self.selector <= -SELECTOR_LEAD {
            self.queues.set_small_share(SHORT_PERCENT);
        }
    }
}

/// The bound of the hashes of a sample: it selects so many of all pages that `simulated` pages are to the sample what
/// `pages` pages of a cache are to all pages.
fn sample_below(simulated: u32, pages: u32) -> u64 {
    (u64::from(simulated) << 32) / u64::from(pages.max(1))
}

impl Policy for Adaptive {
    fn insert(&mut self, id: PageId, no: PageNo) {
        self.queues.insert(id, no);
    }

    fn first_touch(&mut self, id: PageId, no: PageNo) {
        self.queues.first_touch(id, no);
        self.sample(no);
    }

    fn touch(&mut self, id: PageId, no: PageNo) {
        self.queues.touch(id, no);
        self.sample(no);
    }

    fn remove(&mut self, id: PageId) {
        self.queues.remove(id);
    }

    fn evict(
        &mut self,
        kept_max: u32,
        judge: &mut dyn FnMut(PageId) -> Verdict,
        page_no: &dyn Fn(PageId) -> PageNo,
    ) -> Option<PageId> {
        self.queues.evict(kept_max, judge, page_no)
    }

    fn evict_cold(
        &mut self,
        is_cold: &mut dyn FnMut(PageId) -> bool,
        page_no: &dyn Fn(PageId) -> PageNo,
    ) -> Option<PageId> {
        self.queues.evict_cold(is_cold, page_no)
    }

    fn add_slots(&mut self, slots: u32) {
        self.queues.add_slots(slots);
    }

    fn set_pages(&mut self, pages: u32) {
        self.queues.set_pages(pages);
        self.sample_below = sample_below(self.simulated, pages);
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
        let mut cache = MiniSimulation::with_policy(policy, PAGES);
        accesses.filter(|page| !cache.access(PageNo(*page))).count()
    }

    /// Each page is used twice. Between the two uses, other pages that fill 80 % of a cache are used.
    fn pages_used_twice() -> impl Iterator<Item = u64> {
        (800..50_000u64).flat_map(|n| [n, n - 800])
    }

    /// Hot pages of half the cache, used at random; from access `scan_from` on interleaved with a scan.
    fn hot_pages_and_a_scan(scan_from: u64, end: u64) -> impl Iterator<Item = u64> {
        let mut prng = Prng::new(1);
        (0..end).flat_map(move |n| {
            let hot = 100_000 + prng.below(1000);
            [Some(hot), (n >= scan_from).then_some(1_000_000 + n)].into_iter().flatten()
        })
    }

    #[test]
    fn pages_used_twice_after_a_while_hit_as_often_as_with_lru() {
        let lru = misses(Box::new(Lru::new(PAGES, PAGES)), pages_used_twice());
        let fixed = misses(Box::new(S3Fifo::new(PAGES, PAGES, SHORT_PERCENT, 0)), pages_used_twice());
        let adaptive = misses(Box::new(Adaptive::new(PAGES, PAGES, 0)), pages_used_twice());
        assert!(fixed > lru * 3 / 2, "a short queue is worse than LRU: {fixed} misses, LRU {lru}");
        assert!(adaptive < lru * 21 / 20, "the adaptive policy is close to LRU: {adaptive} misses, LRU {lru}");
    }

    #[test]
    fn a_scan_makes_the_small_queue_short_again() {
        let misses_before_scan = misses(
            Box::new(Adaptive::new(PAGES, PAGES, 0)),
            pages_used_twice().chain(hot_pages_and_a_scan(20_000, 20_000)),
        );
        let misses_in_all = misses(
            Box::new(Adaptive::new(PAGES, PAGES, 0)),
            pages_used_twice().chain(hot_pages_and_a_scan(20_000, 40_000)),
        );
        let hot_misses = misses_in_all - misses_before_scan - 20_000;
        assert!(hot_misses < 20_000 / 10, "{hot_misses} of 20000 accesses to hot pages missed during the scan");
    }
}
