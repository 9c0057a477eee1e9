//! The replacement algorithms under comparison: those of genblk, driven as the page cache drives them; CLOCK; ARC; and
//! OPT, which knows the future.

use std::collections::BinaryHeap;

use genblk::cache::PolicyKind;
use genblk::cache::policy::MiniSimulation;
use genblk::units::PageNo;

use super::trace::Access;

/// A simulated cache that counts hits and misses.
pub trait Simulation {
    /// Accesses a page; returns whether it was a hit.
    fn access(&mut self, access: Access) -> bool;
}

/// The algorithms, in the order of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// genblk's S3-FIFO with adaptive queue sizes.
    Genblk,
    /// Least recently used, in genblk's implementation.
    Lru,
    /// One reference bit per page and a hand.
    Clock,
    /// Adaptive replacement cache.
    Arc,
    /// Belady's algorithm: evicts the page whose next use is furthest away.
    Opt,
}

impl Algorithm {
    /// Every algorithm.
    pub const ALL: [Self; 5] = [Self::Genblk, Self::Lru, Self::Clock, Self::Arc, Self::Opt];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Genblk => "genblk",
            Self::Lru => "LRU",
            Self::Clock => "CLOCK",
            Self::Arc => "ARC",
            Self::Opt => "OPT",
        }
    }

    /// The misses of `trace`, whose pages are below `page_count`, in a cache of `cache_pages`.
    pub fn misses(self, trace: &[Access], page_count: u32, cache_pages: u32) -> usize {
        let mut simulation: Box<dyn Simulation> = match self {
            Self::Genblk => Box::new(MiniSimulation::new(PolicyKind::S3Fifo, cache_pages)),
            Self::Lru => Box::new(MiniSimulation::new(PolicyKind::Lru, cache_pages)),
            Self::Clock => Box::new(Clock::new(page_count, cache_pages)),
            Self::Arc => Box::new(Arc::new(page_count, cache_pages)),
            Self::Opt => return opt_misses(trace, page_count, cache_pages),
        };
        trace.iter().filter(|access| !simulation.access(**access)).count()
    }
}

const NONE: u32 = u32::MAX;

impl Simulation for MiniSimulation {
    fn access(&mut self, access: Access) -> bool {
        Self::access(self, PageNo(u64::from(access.page)))
    }
}

/// CLOCK: the hand clears reference bits until it finds a page whose bit is clear.
#[derive(Debug)]
struct Clock {
    slot_of: Vec<u32>,
    ring: Vec<(u32, bool)>,
    hand: usize,
    cache_pages: u32,
}

impl Clock {
    fn new(page_count: u32, cache_pages: u32) -> Self {
        Self { slot_of: vec![NONE; page_count as usize], ring: Vec::new(), hand: 0, cache_pages }
    }
}

impl Simulation for Clock {
    fn access(&mut self, access: Access) -> bool {
        let slot = self.slot_of[access.page as usize];
        if slot != NONE {
            self.ring[slot as usize].1 = true;
            return true;
        }
        if self.ring.len() < self.cache_pages as usize {
            self.slot_of[access.page as usize] = self.ring.len() as u32;
            self.ring.push((access.page, false));
            return false;
        }
        while std::mem::take(&mut self.ring[self.hand].1) {
            self.hand = (self.hand + 1) % self.ring.len();
        }
        self.slot_of[self.ring[self.hand].0 as usize] = NONE;
        self.slot_of[access.page as usize] = self.hand as u32;
        self.ring[self.hand].0 = access.page;
        self.hand = (self.hand + 1) % self.ring.len();
        false
    }
}

/// ARC (Megiddo and Modha, FAST 2003): one LRU list of pages seen once, one of pages seen again. Hits among the pages
/// that each list evicted last (its ghosts) adapt their shares.
#[derive(Debug)]
struct Arc {
    lists: Lists,
    /// The target size of [`ONCE`], in pages.
    target: u32,
    cache_pages: u32,
}

const ONCE: usize = 0;
const AGAIN: usize = 1;
const ONCE_GHOSTS: usize = 2;
const AGAIN_GHOSTS: usize = 3;

impl Arc {
    fn new(page_count: u32, cache_pages: u32) -> Self {
        Self { lists: Lists::new(page_count), target: 0, cache_pages }
    }

    /// Evicts a page of the list that exceeds its share, and keeps its ghost.
    fn replace(&mut self, ghost_of_again_was_hit: bool) {
        let once = self.lists.len[ONCE];
        let over = once > self.target || (ghost_of_again_was_hit && once == self.target);
        let (from, to) = if once > 0 && over { (ONCE, ONCE_GHOSTS) } else { (AGAIN, AGAIN_GHOSTS) };
        let page = self.lists.pop_oldest(from);
        self.lists.push(to, page);
    }

    /// Makes room for a page that is neither cached nor a ghost, and bounds the ghosts.
    fn make_room(&mut self) {
        let len = self.lists.len;
        if len[ONCE] + len[ONCE_GHOSTS] == self.cache_pages {
            if len[ONCE] < self.cache_pages {
                self.lists.pop_oldest(ONCE_GHOSTS);
                self.replace(false);
            } else {
                self.lists.pop_oldest(ONCE);
            }
        } else if len.iter().sum::<u32>() >= self.cache_pages {
            if len.iter().sum::<u32>() == 2 * self.cache_pages {
                self.lists.pop_oldest(AGAIN_GHOSTS);
            }
            self.replace(false);
        }
    }
}

impl Simulation for Arc {
    fn access(&mut self, access: Access) -> bool {
        let (page, len) = (access.page, self.lists.len);
        let list = self.lists.list_of(page);
        match list {
            Some(ONCE | AGAIN) => {}
            Some(ONCE_GHOSTS) => {
                let step = (len[AGAIN_GHOSTS] / len[ONCE_GHOSTS]).max(1);
                self.target = (self.target + step).min(self.cache_pages);
                self.replace(false);
            }
            Some(_) => {
                let step = (len[ONCE_GHOSTS] / len[AGAIN_GHOSTS]).max(1);
                self.target = self.target.saturating_sub(step);
                self.replace(true);
            }
            None => self.make_room(),
        }
        if list.is_some() {
            self.lists.remove(page);
        }
        self.lists.push(if list.is_some() { AGAIN } else { ONCE }, page);
        matches!(list, Some(ONCE | AGAIN))
    }
}

/// Four LRU lists; a page is on at most one. Removal is lazy: each move gives the page a new stamp and appends to the
/// log of the list. An entry of a log is valid if it has the current stamp of its page.
#[derive(Debug)]
struct Lists {
    /// For each page the stamp of its last move, and its list (or [`NONE`]).
    position: Vec<(u64, u32)>,
    logs: [std::collections::VecDeque<(u64, u32)>; 4],
    len: [u32; 4],
    clock: u64,
}

impl Lists {
    fn new(page_count: u32) -> Self {
        Self { position: vec![(0, NONE); page_count as usize], logs: Default::default(), len: [0; 4], clock: 0 }
    }

    fn list_of(&self, page: u32) -> Option<usize> {
        let list = self.position[page as usize].1;
        (list != NONE).then_some(list as usize)
    }

    fn push(&mut self, list: usize, page: u32) {
        self.clock += 1;
        self.position[page as usize] = (self.clock, list as u32);
        self.logs[list].push_back((self.clock, page));
        self.len[list] += 1;
    }

    fn remove(&mut self, page: u32) {
        let list = std::mem::replace(&mut self.position[page as usize].1, NONE);
        self.len[list as usize] -= 1;
    }

    fn pop_oldest(&mut self, list: usize) -> u32 {
        loop {
            let (stamp, page) = self.logs[list].pop_front().expect("the list is not empty");
            if self.position[page as usize] == (stamp, list as u32) {
                self.remove(page);
                return page;
            }
        }
    }
}

/// Misses of Belady's algorithm.
fn opt_misses(trace: &[Access], page_count: u32, cache_pages: u32) -> usize {
    let mut next_use = vec![NONE; trace.len()];
    let mut last_seen = vec![NONE; page_count as usize];
    for (at, access) in trace.iter().enumerate().rev() {
        next_use[at] = std::mem::replace(&mut last_seen[access.page as usize], at as u32);
    }
    // The next use of each cached page; `u32::MAX` is "never". Entries of the heap that differ from it are stale.
    let mut next_use_of = vec![None; page_count as usize];
    let mut furthest = BinaryHeap::new();
    let (mut misses, mut resident) = (0, 0);
    for (access, &next) in trace.iter().zip(&next_use) {
        if next_use_of[access.page as usize].is_none() {
            misses += 1;
            resident += 1;
        }
        if resident > cache_pages {
            loop {
                let (at, page) = furthest.pop().expect("a full cache has an entry for each page");
                if next_use_of[page as usize] == Some(at) {
                    next_use_of[page as usize] = None;
                    break;
                }
            }
            resident -= 1;
        }
        next_use_of[access.page as usize] = Some(next);
        furthest.push((next, access.page));
    }
    misses
}
