//! Store operations in op: what the cache asked for, which pages and frames each holds, and how it ended.

use crate::units::{Epoch, ExtentKind, Fault, FrameId, OpKind, PageId, PageNo, SECTORS_PER_PAGE, SectorSpan, Tick};

use super::PageCache;

/// One operation for the store.
#[derive(Clone, Copy, Debug)]
pub struct StoreOpRef<'a> {
    /// Name to report the outcome under.
    pub tag: u32,
    /// What to do.
    pub kind: OpKind,
    /// Where on the image; block-aligned but at the image's end. Empty for Sync.
    pub span: SectorSpan,
    /// First sector within the first frame; the other frames are used from their start.
    pub first_sector: u8,
    /// The memory, for Read and Write: held until the outcome.
    pub frames: &'a [FrameId],
    /// A request waits for this very operation, or may: it is neither readahead nor write-back.
    pub demand: bool,
}

/// How an operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// In full.
    Done,
    /// A Map: runs of (sectors, is a hole) that cover the span.
    Mapped(Vec<(u64, ExtentKind)>),
    /// It failed; nothing is known of the memory of a read or the span of a write.
    Failed(Fault),
}

/// An operation that the cache waits for.
#[derive(Debug)]
pub(super) struct StoreOp {
    pub kind: OpKind,
    pub span: SectorSpan,
    pub frames: Vec<FrameId>,
    /// The page of each frame.
    pub ids: Vec<PageId>,
    /// Write: the oldest epoch among its pages.
    pub epoch: Epoch,
    /// As in its plan.
    pub demand: bool,
}

impl StoreOp {
    /// An operation that holds no pages.
    pub fn without_pages(kind: OpKind, span: SectorSpan) -> Self {
        Self { kind, span, frames: Vec::new(), ids: Vec::new(), epoch: Epoch(0), demand: true }
    }

    /// The pages on the image that the operation touches.
    pub fn first_page(&self) -> PageNo {
        self.span.pages().first
    }
}

/// Slots of operations; vectors are used again, so a steady state allocates nothing.
#[derive(Debug, Default)]
pub(super) struct StoreOps {
    slots: Vec<Option<StoreOp>>,
    free: Vec<u32>,
    queued: Vec<u32>,
    spare: Vec<(Vec<FrameId>, Vec<PageId>)>,
    writes: u32,
}

impl StoreOps {
    /// Adds an operation; its plan waits to be taken.
    pub fn submit(&mut self, op: StoreOp) {
        if op.kind == OpKind::Write {
            self.writes += 1;
        }
        let tag = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            u32::try_from(self.slots.len() - 1).expect("operations in op fit 32 bits")
        });
        self.slots[tag as usize] = Some(op);
        self.queued.push(tag);
    }

    /// Takes an operation that ended.
    pub fn complete(&mut self, tag: u32) -> StoreOp {
        let op = self.slots[tag as usize].take().expect("an outcome belongs to an operation in op");
        if op.kind == OpKind::Write {
            self.writes -= 1;
        }
        self.free.push(tag);
        op
    }

    /// Empty vectors for the frames and pages of an operation.
    pub fn vectors(&mut self) -> (Vec<FrameId>, Vec<PageId>) {
        self.spare.pop().unwrap_or_default()
    }

    /// Takes an operation's vectors back.
    pub fn recycle(&mut self, op: StoreOp) {
        let StoreOp { mut frames, mut ids, .. } = op;
        if frames.capacity() > 0 && self.spare.len() < 64 {
            frames.clear();
            ids.clear();
            self.spare.push((frames, ids));
        }
    }

    /// Writes in op.
    pub fn writes(&self) -> u32 {
        self.writes
    }

    /// Every operation in op.
    pub fn iter(&self) -> impl Iterator<Item = &StoreOp> {
        self.slots.iter().flatten()
    }
}

impl PageCache {
    /// Hands out the operations that wait to be started.
    ///
    /// => The frames of a plan stay held until [`PageCache::complete`] is last_reported of its tag.
    pub fn take_ops(&mut self, mut start: impl FnMut(StoreOpRef<'_>)) {
        for tag in self.store_ops.queued.drain(..) {
            let op = self.store_ops.slots[tag as usize].as_ref().expect("a queued operation is in op");
            let StoreOp { kind, span, ref frames, demand, .. } = *op;
            let first_sector = (span.start % SECTORS_PER_PAGE) as u8;
            start(StoreOpRef { tag, kind, span, first_sector, frames, demand });
        }
    }

    /// Tells how an operation ended (where the kernel calls biodone).
    pub fn complete(&mut self, tag: u32, outcome: &Outcome, now: Tick) {
        self.now = self.now.max(now);
        self.stalled.unblock();
        let op = self.store_ops.complete(tag);
        match op.kind {
            OpKind::Read => self.read_done(&op, outcome),
            OpKind::Write => self.write_done(&op, outcome),
            OpKind::Sync => self.sync_done(outcome),
            OpKind::Zero { .. } | OpKind::Discard => self.range_done(&op, outcome),
            OpKind::Map => self.map_done(&op, outcome),
            OpKind::Allocate => self.allocate_done(&op, outcome),
        }
        self.store_ops.recycle(op);
    }
}

impl Outcome {
    /// The fault of a failed operation.
    pub fn fault(&self) -> Option<Fault> {
        match self {
            Outcome::Failed(fault) => Some(*fault),
            _ => None,
        }
    }
}
