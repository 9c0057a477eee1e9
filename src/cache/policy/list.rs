//! Doubly linked lists of slots in one array. A slot is on at most one list. All operations take constant time.

use super::super::growing::vec_for;
use crate::units::PageId;

/// No neighbour.
const NONE: u32 = u32::MAX;

/// Identifies a list of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ListId(pub u8);

impl ListId {
    /// The slot is on no list.
    pub const NONE: Self = Self(0);
}

/// A slot's neighbours on its list, and the data that a policy keeps for each slot.
#[derive(Clone, Debug)]
pub(super) struct Node {
    newer: u32,
    older: u32,
    /// When the slot was put on its list, on the policy's own coarse clock.
    pub stamp: u16,
    /// The list that the slot is on.
    pub list: ListId,
    /// Reference bit: the page was used since the policy last cleared it.
    pub referenced: bool,
}

/// One list. Slots enter at the newest end.
#[derive(Clone, Debug)]
pub(super) struct List {
    id: ListId,
    newest: u32,
    oldest: u32,
    len: u32,
}

/// Nodes for `slots` slots that are on no list; later for at most `slots_max`.
pub(super) fn nodes(slots: u32, slots_max: u32) -> Vec<Node> {
    let mut nodes = vec_for(slots_max);
    add_nodes(&mut nodes, slots);
    nodes
}

/// Adds nodes that are on no list, until there are as many as `slots`.
pub(super) fn add_nodes(nodes: &mut Vec<Node>, slots: u32) {
    let node = Node { newer: NONE, older: NONE, stamp: 0, list: ListId::NONE, referenced: false };
    nodes.resize(nodes.len().max(slots as usize), node);
}

impl List {
    /// An empty list.
    pub fn new(id: ListId) -> Self {
        debug_assert_ne!(id, ListId::NONE);
        Self { id, newest: NONE, oldest: NONE, len: 0 }
    }

    /// Number of slots on the list.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// The slot at the oldest end.
    pub fn oldest(&self) -> Option<PageId> {
        (self.oldest != NONE).then_some(PageId(self.oldest))
    }

    /// Puts a slot that is on no list at the newest end.
    pub fn push(&mut self, nodes: &mut [Node], slot: PageId) {
        let node = &mut nodes[slot.index()];
        assert_eq!(node.list, ListId::NONE, "{slot:?} is on a list already");
        node.list = self.id;
        node.newer = NONE;
        node.older = self.newest;
        if self.newest == NONE {
            self.oldest = slot.0;
        } else {
            nodes[self.newest as usize].newer = slot.0;
        }
        self.newest = slot.0;
        self.len += 1;
    }

    /// Takes a slot off this list.
    pub fn unlink(&mut self, nodes: &mut [Node], slot: PageId) {
        let node = &mut nodes[slot.index()];
        assert_eq!(node.list, self.id, "{slot:?} is not on this list");
        node.list = ListId::NONE;
        let (newer, older) = (node.newer, node.older);
        match newer {
            NONE => self.newest = older,
            _ => nodes[newer as usize].older = older,
        }
        match older {
            NONE => self.oldest = newer,
            _ => nodes[older as usize].newer = newer,
        }
        self.len -= 1;
    }

    /// Moves a slot of this list to its newest end.
    pub fn renew(&mut self, nodes: &mut [Node], slot: PageId) {
        if self.newest != slot.0 {
            self.unlink(nodes, slot);
            self.push(nodes, slot);
        }
    }
}
