//! Doubly linked lists of slots in one array: a slot is on at most one list, and all operations take constant time.

use crate::units::PageId;

const NONE: u32 = u32::MAX;

/// A slot's place on a list, and what a policy remembers of it.
#[derive(Clone, Debug)]
pub(super) struct Node {
    newer: u32,
    older: u32,
    /// When the slot came on its list, on the policy's own coarse clock.
    pub stamp: u16,
    /// Which list holds the slot; 0: none.
    pub list: u8,
    /// Asked for again since the policy last looked.
    pub referenced: bool,
}

/// One list: newest and oldest end, and the list's name in [`Node::list`].
#[derive(Clone, Debug)]
pub(super) struct List {
    name: u8,
    newest: u32,
    oldest: u32,
    len: u32,
}

/// Nodes for `slots` slots, all on no list.
pub(super) fn nodes(slots: u32) -> Vec<Node> {
    vec![Node { newer: NONE, older: NONE, stamp: 0, list: 0, referenced: false }; slots as usize]
}

impl List {
    /// An empty list; `name` is not 0.
    pub fn new(name: u8) -> Self {
        Self { name, newest: NONE, oldest: NONE, len: 0 }
    }

    /// Number of slots on the list.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// The slot that came first.
    pub fn oldest(&self) -> Option<PageId> {
        (self.oldest != NONE).then_some(PageId(self.oldest))
    }

    /// Puts a slot that is on no list at the new end.
    pub fn push(&mut self, nodes: &mut [Node], id: PageId) {
        let node = &mut nodes[id.index()];
        assert_eq!(node.list, 0, "{id:?} is on a list already");
        node.list = self.name;
        node.newer = NONE;
        node.older = self.newest;
        if self.newest == NONE {
            self.oldest = id.0;
        } else {
            nodes[self.newest as usize].newer = id.0;
        }
        self.newest = id.0;
        self.len += 1;
    }

    /// Takes a slot off this list.
    pub fn unlink(&mut self, nodes: &mut [Node], id: PageId) {
        let node = &mut nodes[id.index()];
        assert_eq!(node.list, self.name, "{id:?} is on another list");
        node.list = 0;
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

    /// Moves a slot of this list to its new end.
    pub fn renew(&mut self, nodes: &mut [Node], id: PageId) {
        if self.newest != id.0 {
            self.unlink(nodes, id);
            self.push(nodes, id);
        }
    }
}
