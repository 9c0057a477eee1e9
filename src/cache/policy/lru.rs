//! Least recently used: the baseline that other policies are measured against.

use super::list::{List, ListId, Node, add_nodes, nodes};
use super::{Policy, Verdict};
use crate::units::{PageId, PageNo};

const LRU: ListId = ListId(1);

/// One list, in order of last use.
#[derive(Debug)]
pub(super) struct Lru {
    nodes: Vec<Node>,
    list: List,
}

impl Lru {
    /// A policy for a cache of `pages` pages, later of at most `pages_max`.
    pub fn new(pages: u32, pages_max: u32) -> Self {
        Self { nodes: nodes(pages, pages_max), list: List::new(LRU) }
    }
}

impl Policy for Lru {
    fn insert(&mut self, id: PageId, _no: PageNo) {
        self.list.push(&mut self.nodes, id);
    }

    fn first_touch(&mut self, id: PageId, no: PageNo) {
        self.touch(id, no);
    }

    fn touch(&mut self, id: PageId, _no: PageNo) {
        self.list.renew(&mut self.nodes, id);
    }

    fn remove(&mut self, id: PageId) {
        self.list.unlink(&mut self.nodes, id);
    }

    fn evict(
        &mut self,
        kept_max: u32,
        judge: &mut dyn FnMut(PageId) -> Verdict,
        _page_no: &dyn Fn(PageId) -> PageNo,
    ) -> Option<PageId> {
        for _ in 0..kept_max.min(self.list.len()) {
            let id = self.list.oldest()?;
            match judge(id) {
                Verdict::Evict { .. } => {
                    self.list.unlink(&mut self.nodes, id);
                    return Some(id);
                }
                // Propose it again after the others.
                Verdict::Keep => self.list.renew(&mut self.nodes, id),
            }
        }
        None
    }

    fn add_slots(&mut self, slots: u32) {
        add_nodes(&mut self.nodes, slots);
    }

    fn set_pages(&mut self, _pages: u32) {}

    fn contains(&self, id: PageId) -> bool {
        self.nodes[id.index()].list != ListId::NONE
    }

    fn len(&self) -> u32 {
        self.list.len()
    }

    fn metadata_bytes(&self) -> usize {
        self.nodes.len() * size_of::<Node>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_page_is_evicted_first() {
        let mut lru = Lru::new(3, 3);
        for id in 0..3 {
            lru.insert(PageId(id), PageNo(u64::from(id)));
        }
        lru.touch(PageId(0), PageNo(0));
        let evicted = lru.evict(8, &mut |_| Verdict::Evict { used: true }, &|id| PageNo(u64::from(id.0)));
        assert_eq!(evicted, Some(PageId(1)));
        assert!(!lru.contains(PageId(1)) && lru.contains(PageId(0)));
    }

    #[test]
    fn a_search_ends_after_its_limit_of_kept_pages() {
        let mut lru = Lru::new(4, 4);
        for id in 0..4 {
            lru.insert(PageId(id), PageNo(u64::from(id)));
        }
        let mut proposed = 0;
        let evicted = lru.evict(
            3,
            &mut |_| {
                proposed += 1;
                Verdict::Keep
            },
            &|_| PageNo(0),
        );
        assert_eq!((evicted, proposed, lru.len()), (None, 3, 4));
    }
}
