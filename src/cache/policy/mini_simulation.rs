//! Simulation of a cache without its memory: a policy and the index that it needs. Benchmarks use it, and the adaptive
//! policy compares settings with it (Waldspurger et al., "Cache modeling and optimization using miniature simulations",
//! ATC 2017).

use hashbrown::HashTable;

use crate::units::{PageId, PageNo, low_u32};

use super::super::PolicyKind;
use super::{Policy, Verdict};

/// A simulated cache.
#[derive(Debug)]
pub struct MiniSimulation {
    policy: Box<dyn Policy>,
    /// Slots, by the number of their page.
    index: HashTable<u32>,
    /// The page in each slot. Slots are first used in order.
    page_of_slot: Vec<PageNo>,
    pages: u32,
}

impl MiniSimulation {
    /// An empty cache of `pages` pages.
    pub fn new(kind: PolicyKind, pages: u32) -> Self {
        Self::with_policy(super::new(kind, pages, pages, 0), pages)
    }

    /// The same with this policy, which is made for `pages` pages.
    pub(super) fn with_policy(policy: Box<dyn Policy>, pages: u32) -> Self {
        let index = HashTable::with_capacity(pages as usize);
        Self { policy, index, page_of_slot: Vec::with_capacity(pages as usize), pages }
    }

    /// Reads or writes a page. Returns whether it was a hit.
    pub fn access(&mut self, no: PageNo) -> bool {
        let page_of_slot = &self.page_of_slot;
        if let Some(&slot) = self.index.find(hash(no), |&slot| page_of_slot[slot as usize] == no) {
            self.policy.touch(PageId(slot), no);
            return true;
        }
        let id = self.free_slot();
        self.page_of_slot[id.index()] = no;
        let page_of_slot = &self.page_of_slot;
        self.index.insert_unique(hash(no), id.0, |&slot| hash(page_of_slot[slot as usize]));
        self.policy.insert(id, no);
        self.policy.first_touch(id, no);
        false
    }

    /// An unused slot, or that of the page that the policy evicts.
    fn free_slot(&mut self) -> PageId {
        if self.page_of_slot.len() < self.pages as usize {
            self.page_of_slot.push(PageNo(0));
            return PageId(low_u32(self.page_of_slot.len() as u64 - 1));
        }
        let page_of_slot = &self.page_of_slot;
        let evict_any = &mut |_| Verdict::Evict { used: true };
        let id = self.policy.evict(1, evict_any, &|id| page_of_slot[id.index()]).expect("every page may be evicted");
        let evicted = page_of_slot[id.index()];
        self.index.find_entry(hash(evicted), |&slot| slot == id.0).expect("a page in a slot is in the index").remove();
        id
    }

    /// Bytes of memory that the simulation takes.
    pub fn metadata_bytes(&self) -> usize {
        self.policy.metadata_bytes() + self.index.allocation_size() + self.page_of_slot.capacity() * size_of::<PageNo>()
    }
}

/// Multiplicative hashing (Knuth), by 2^64 / the golden ratio.
fn hash(no: PageNo) -> u64 {
    let mixed = no.0.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ mixed >> 32
}
