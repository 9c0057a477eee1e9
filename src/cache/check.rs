//! The invariants of [`PageCache`], recounted from scratch. The simulator calls this every few steps.

use crate::units::{FrameId, OpKind};

use super::PageCache;
use super::pages::{COPY_ON_WRITE, NONE, Period, READING};
use super::store_ops::StoreOp;

impl PageCache {
    /// Checks every invariant; `pinned` are the frames of pieces that the owner has not returned.
    ///
    /// # Panics
    /// If one does not hold.
    pub fn check(&self, pinned: &[FrameId]) {
        let under_way = self.store_ops.iter().flat_map(|op| op.frames.iter().copied());
        self.pages.check(under_way.chain(pinned.iter().copied()));
        self.check_waiters();
        self.check_readahead();
        self.check_store_ops();
        assert_eq!(self.pending_zeroes.reserved(), self.ranges.with_zero_slot(), "I4: slots of zeroed ranges");
    }

    fn check_waiters(&self) {
        let mut waiters = 0;
        for (_, page) in self.pages.iter() {
            waiters += self.waiters.chain_len(page.waiters());
            let awaited = page.is(READING) || page.waiters() != NONE;
            assert!(page.frame().is_some() || awaited, "{:?} has no frame, and nothing gives it one", page.no());
        }
        assert_eq!(self.waiters.in_use(), waiters, "I4: waiters");
    }

    fn check_readahead(&self) {
        let unread: Vec<Period> = self.pages.iter().filter_map(|(_, page)| page.unread_since()).collect();
        self.streams.check(&unread);
    }

    fn check_store_ops(&self) {
        // A Sync has no span, and a Map or Allocate changes no contents.
        let has_contents = |op: &&StoreOp| !matches!(op.kind, OpKind::Sync | OpKind::Map | OpKind::Allocate);
        let mut store_ops: Vec<&StoreOp> = self.store_ops.iter().filter(has_contents).collect();
        store_ops.sort_by_key(|op| op.span.start);
        for pair in store_ops.windows(2) {
            let [one, next] = pair else { unreachable!("windows of two") };
            let both_read = one.kind == OpKind::Read && next.kind == OpKind::Read;
            let apart = one.span.end() <= next.span.start;
            assert!(apart || both_read, "I6: {:?} {:?} overlaps {:?} {:?}", one.kind, one.span, next.kind, next.span);
        }
        for op in store_ops {
            for (&id, &frame) in op.ids.iter().zip(&op.frames) {
                let page = &self.pages[id];
                if op.kind == OpKind::Read {
                    assert!(page.is(READING), "{:?} is being read in and not READING", page.no());
                    assert_ne!(page.frame(), Some(frame), "I7: a read-in has a frame of its own");
                } else {
                    assert!(!page.writing.is_empty(), "{:?} is being written and has no writing sectors", page.no());
                    assert_eq!(
                        page.is(COPY_ON_WRITE),
                        page.frame() == Some(frame),
                        "{:?}: only a frame under write is frozen",
                        page.no()
                    );
                }
            }
        }
    }
}
