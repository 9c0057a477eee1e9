//! The invariants of `mod.rs`, recounted from scratch. The simulator calls this after every step.

use std::collections::HashMap;

use crate::units::{FrameId, OpKind, PageNo};

use super::PageCache;
use super::page::{FAILED, FROZEN, NONE, PREFETCHED, READING};
use super::readahead::Period;
use super::store_ops::StoreOp;

impl PageCache {
    /// Checks every invariant; `pinned` are the frames of pieces handed out and not yet given back.
    ///
    /// # Panics
    /// If one does not hold.
    pub fn check(&self, pinned: &[FrameId]) {
        self.check_frames(pinned);
        self.check_pages();
        self.check_store_ops();
        assert_eq!(self.pending_zeroes.in_flight(), self.ranges.placed(), "I4: places of zeroed ranges");
    }

    fn check_frames(&self, pinned: &[FrameId]) {
        let mut held: HashMap<FrameId, u32> = HashMap::new();
        let resident = self.pages.iter().filter_map(|(_, page)| page.frame());
        let flying = self.store_ops.iter().flat_map(|op| op.frames.iter().copied());
        for frame in resident.chain(flying).chain(pinned.iter().copied()) {
            *held.entry(frame).or_default() += 1;
        }
        for (&frame, &count) in &held {
            assert_eq!(self.frames.references(frame), count, "I3: references of {frame:?}");
        }
        assert_eq!(held.len(), (self.frames.total() - self.frames.free()) as usize, "I9: free + held frames = arena");
    }

    fn check_pages(&self) {
        let mut dirty: Vec<PageNo> = Vec::new();
        let (mut dirty_or_writeback, mut unstable, mut failed, mut waiters) = (0, 0, 0, 0);
        let mut unread: Vec<Period> = Vec::new();
        for (id, page) in self.pages.iter() {
            page.check();
            let beyond = self.beyond_image(page.no());
            assert!(page.dirty.and(beyond).is_empty(), "I5: {:?} is dirty beyond the image", page.no());
            assert!(self.policy.contains(id), "I1: {:?} is on no queue", page.no());
            assert_eq!(self.pages.find(page.no()), Some(id), "the index finds the page");
            if !page.dirty.is_empty() {
                dirty.push(page.no());
            }
            dirty_or_writeback += u32::from(self.dirty.counts(page));
            unstable += u32::from(self.dirty.counts_unstable(page));
            failed += u32::from(page.is(FAILED));
            if page.is(PREFETCHED) {
                unread.push(page.period());
            }
            waiters += self.waiters.chain_len(page.waiters);
            if page.frame().is_none() {
                assert!(page.is(READING) || page.waiters != NONE, "{:?}: no frame, and nobody brings one", page.no());
            }
        }
        dirty.sort();
        assert_eq!(self.policy.len(), self.pages.len(), "I1: queues hold the pages and nothing else");
        assert!(self.dirty.iter().eq(dirty.iter().copied()), "I2: the dirty set is the dirty pages");
        assert_eq!(self.dirty.dirty_pages() as usize, dirty.len(), "I4: dirty pages");
        assert_eq!(self.dirty.dirty_or_writeback_pages(), dirty_or_writeback, "I4: dirty_or_writeback pages");
        assert_eq!(self.dirty.unstable_pages(), unstable, "I4: unstable pages");
        assert_eq!(self.dirty.failed_pages(), failed, "I4: failed pages");
        self.streams.check(&unread);
        assert_eq!(self.waiters.in_use(), waiters, "I4: waiters");
    }

    fn check_store_ops(&self) {
        // They touch no byte.
        let about_space = |op: &StoreOp| matches!(op.kind, OpKind::Map | OpKind::Allocate);
        let mut store_ops: Vec<&StoreOp> =
            self.store_ops.iter().filter(|op| op.span.count > 0 && !about_space(op)).collect();
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
                    assert!(page.is(READING), "a page being read in says so");
                    assert_ne!(page.frame(), Some(frame), "I7: a read-in has a frame of its own");
                } else {
                    assert!(!page.writing.is_empty(), "a page being written says so");
                    assert_eq!(page.is(FROZEN), page.frame() == Some(frame), "frozen is the frame in op");
                }
            }
        }
    }
}
