//! A cache without memory: a policy, and the index it needs. For benchmarks, and for a policy that tries itself out.

use hashbrown::HashTable;

use crate::units::{PageId, PageNo, low_u32};

use super::super::PolicyKind;
use super::{Policy, Verdict};

/// What a cache of so many pages would hold.
#[derive(Debug)]
pub struct MiniSimulation {
    policy: Box<dyn Policy>,
    /// Slots by the number of their page.
    index: HashTable<u32>,
    page_in: Vec<PageNo>,
    pages: u32,
}

impl MiniSimulation {
    /// A cache of `pages` pages, empty.
    pub fn new(kind: PolicyKind, pages: u32) -> Self {
        Self::with(super::new(kind, pages), pages)
    }

    /// The same with a policy for so many pages.
    pub(super) fn with(policy: Box<dyn Policy>, pages: u32) -> Self {
        let index = HashTable::with_capacity(pages as usize);
        Self { policy, index, page_in: Vec::with_capacity(pages as usize), pages }
    }

    /// Reads or writes a page; returns whether it was there.
    pub fn access(&mut self, no: PageNo) -> bool {
        let page_in = &self.page_in;
        if let Some(&slot) = self.index.find(hash(no), |&slot| page_in[slot as usize] == no) {
            self.policy.touch(PageId(slot), no);
            return true;
        }
        let id = self.free_slot();
        self.page_in[id.index()] = no;
        let page_in = &self.page_in;
        self.index.insert_unique(hash(no), id.0, |&slot| hash(page_in[slot as usize]));
        self.policy.insert(id, no);
        self.policy.first_touch(id, no);
        false
    }

    /// A slot that was never used, or that of the page that the policy gives up.
    fn free_slot(&mut self) -> PageId {
        if self.page_in.len() < self.pages as usize {
            self.page_in.push(PageNo(0));
            return PageId(low_u32(self.page_in.len() as u64 - 1));
        }
        let page_in = &self.page_in;
        let may_go = &mut |_| Verdict::Evict { asked_for: true };
        let id = self.policy.evict(1, may_go, &|id| page_in[id.index()]).expect("no page has to stay");
        let gone = page_in[id.index()];
        self.index.find_entry(hash(gone), |&slot| slot == id.0).expect("a page in a slot is in the index").remove();
        id
    }

    /// Bytes of memory the model takes.
    pub fn metadata_bytes(&self) -> usize {
        self.policy.metadata_bytes() + self.index.allocation_size() + self.page_in.capacity() * size_of::<PageNo>()
    }
}

fn hash(no: PageNo) -> u64 {
    let mixed = no.0.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ mixed >> 32
}
