//! Who is measured: the policies of the daemon itself, driven as the page cache drives them; CLOCK; ARC; and OPT, which
//! knows the future.

use std::collections::BinaryHeap;

use genblk::cache::PolicyKind;
use genblk::cache::policy::MiniSimulation;
use genblk::units::PageNo;

use super::workloads::Access;

/// A cache of pages, as far as hits and misses go.
pub trait Contender {
    /// Asks for a page, and says whether it was there.
    fn access(&mut self, access: Access) -> bool;
}

/// Those who are compared, in the order of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rival {
    /// genblk's S3-FIFO.
    Ours,
    /// Least recently used, as genblk has it.
    Lru,
    /// One bit and a hand.
    Clock,
    /// Adaptive replacement cache.
    Arc,
    /// Belady's: gives up the page whose next use is furthest away.
    Opt,
}

impl Rival {
    /// Every rival.
    pub const ALL: [Self; 5] = [Self::Ours, Self::Lru, Self::Clock, Self::Arc, Self::Opt];

    /// For tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "genblk",
            Self::Lru => "LRU",
            Self::Clock => "CLOCK",
            Self::Arc => "ARC",
            Self::Opt => "OPT",
        }
    }

    /// How many accesses of `trace`, which names pages below `page_count`, miss in a cache of `cache_pages`.
    pub fn misses(self, trace: &[Access], page_count: u32, cache_pages: u32) -> usize {
        let mut contender: Box<dyn Contender> = match self {
            Self::Ours => Box::new(MiniSimulation::new(PolicyKind::S3Fifo, cache_pages)),
            Self::Lru => Box::new(MiniSimulation::new(PolicyKind::Lru, cache_pages)),
            Self::Clock => Box::new(Clock::new(page_count, cache_pages)),
            Self::Arc => Box::new(Arc::new(page_count, cache_pages)),
            Self::Opt => return opt_misses(trace, page_count, cache_pages),
        };
        trace.iter().filter(|access| !contender.access(**access)).count()
    }
}

const NONE: u32 = u32::MAX;

impl Contender for MiniSimulation {
    fn access(&mut self, access: Access) -> bool {
        Self::access(self, PageNo(u64::from(access.page)))
    }
}

/// Pages in a ring, and a hand that clears bits until it finds one clear.
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

impl Contender for Clock {
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

/// ARC (Megiddo and Modha, FAST 2003): pages seen once and pages seen again on two LRU lists, whose shares follow the
/// hits among the pages that each gave up last.
#[derive(Debug)]
struct Arc {
    lists: Lists,
    /// The share of [`ONCE`], in pages.
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

    /// Gives up a page of the list that is over its share, and keeps its ghost.
    fn replace(&mut self, asked_for_ghost_of_again: bool) {
        let once = self.lists.len[ONCE];
        let over = once > self.target || (asked_for_ghost_of_again && once == self.target);
        let (from, to) = if once > 0 && over { (ONCE, ONCE_GHOSTS) } else { (AGAIN, AGAIN_GHOSTS) };
        let page = self.lists.pop_oldest(from);
        self.lists.push(to, page);
    }

    /// A page that is neither in the cache nor a ghost: makes room, and bounds the ghosts.
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

impl Contender for Arc {
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

/// Four lists of pages, newest first; a page is on at most one. Kept in stamps: a list's oldest page is the first in its
/// log whose stamp is still the page's own.
#[derive(Debug)]
struct Lists {
    /// Stamp of each page's last move, and the list it is on (or [`NONE`]).
    place: Vec<(u64, u32)>,
    logs: [std::collections::VecDeque<(u64, u32)>; 4],
    len: [u32; 4],
    clock: u64,
}

impl Lists {
    fn new(page_count: u32) -> Self {
        Self { place: vec![(0, NONE); page_count as usize], logs: Default::default(), len: [0; 4], clock: 0 }
    }

    fn list_of(&self, page: u32) -> Option<usize> {
        let list = self.place[page as usize].1;
        (list != NONE).then_some(list as usize)
    }

    fn push(&mut self, list: usize, page: u32) {
        self.clock += 1;
        self.place[page as usize] = (self.clock, list as u32);
        self.logs[list].push_back((self.clock, page));
        self.len[list] += 1;
    }

    fn remove(&mut self, page: u32) {
        let list = std::mem::replace(&mut self.place[page as usize].1, NONE);
        self.len[list as usize] -= 1;
    }

    fn pop_oldest(&mut self, list: usize) -> u32 {
        loop {
            let (stamp, page) = self.logs[list].pop_front().expect("the list is not empty");
            if self.place[page as usize] == (stamp, list as u32) {
                self.remove(page);
                return page;
            }
        }
    }
}

/// Misses of Belady's policy.
fn opt_misses(trace: &[Access], page_count: u32, cache_pages: u32) -> usize {
    let mut next_use = vec![NONE; trace.len()];
    let mut last_seen = vec![NONE; page_count as usize];
    for (at, access) in trace.iter().enumerate().rev() {
        next_use[at] = std::mem::replace(&mut last_seen[access.page as usize], at as u32);
    }
    // When each page in the cache is used next; `u32::MAX` is also "never". Entries of the heap that say something
    // else are out of date.
    let mut due = vec![None; page_count as usize];
    let mut furthest = BinaryHeap::new();
    let (mut misses, mut resident) = (0, 0);
    for (access, &next) in trace.iter().zip(&next_use) {
        if due[access.page as usize].is_none() {
            misses += 1;
            resident += 1;
        }
        if resident > cache_pages {
            loop {
                let (at, page) = furthest.pop().expect("a full cache has an entry for each page");
                if due[page as usize] == Some(at) {
                    due[page as usize] = None;
                    break;
                }
            }
            resident -= 1;
        }
        due[access.page as usize] = Some(next);
        furthest.push((next, access.page));
    }
    misses
}
