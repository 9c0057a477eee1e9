//! Store operations: what the cache requests, which pages and frames each operation holds, and how it ended.

use crate::units::{
    Epoch, ExtentKind, Fault, FrameId, OpKind, PageId, PageNo, PageSpan, SECTORS_PER_PAGE, SectorSpan, Tick, Urgency,
};

use super::PageCache;

/// One operation for the store.
#[derive(Clone, Copy, Debug)]
pub struct StoreOpRef<'a> {
    /// The tag to pass to [`PageCache::complete`].
    pub tag: u32,
    /// The kind of the operation.
    pub kind: OpKind,
    /// The range of the image: block-aligned, except at the image's end. Empty for a Sync.
    pub span: SectorSpan,
    /// First sector within the first frame; the other frames are used from their start.
    pub first_sector: u8,
    /// The memory of a Read or Write: held until the operation ends.
    pub frames: &'a [FrameId],
    /// Whether a request waits for the operation.
    pub urgency: Urgency,
}

/// How an operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It succeeded in full.
    Done,
    /// A Map succeeded: runs of (sectors, kind) that cover the span; the last one may reach beyond it.
    Mapped(Vec<(u64, ExtentKind)>),
    /// It failed. The contents of a read's memory and of a write's span are undefined.
    Failed(Fault),
}

/// An operation in flight.
#[derive(Debug)]
pub(super) struct StoreOp {
    pub kind: OpKind,
    pub span: SectorSpan,
    pub frames: Vec<FrameId>,
    /// The page of each frame.
    pub ids: Vec<PageId>,
    /// Write: the oldest epoch among its pages.
    pub epoch: Epoch,
    /// See [`StoreOpRef::urgency`].
    pub urgency: Urgency,
    /// See [`PageCache::is_in_doubt`].
    pub doubts: u32,
    /// Number of Syncs that had succeeded when it was submitted.
    pub syncs: u64,
    /// Read: the store may since have lost the data that it reads (`changed_ranges.rs`).
    pub is_lost: bool,
    /// When it was queued.
    pub since: Tick,
}

impl StoreOp {
    /// An operation that holds no pages.
    pub fn without_pages(kind: OpKind, span: SectorSpan) -> Self {
        let (frames, ids) = (Vec::new(), Vec::new());
        Self {
            kind,
            span,
            frames,
            ids,
            epoch: Epoch(0),
            urgency: Urgency::Demand,
            doubts: 0,
            syncs: 0,
            is_lost: false,
            since: Tick::ZERO,
        }
    }

    /// Whether its failure may mean that the device was reset and lost the data that was not durable.
    pub fn may_report_reset(&self) -> bool {
        matches!(self.kind, OpKind::Write | OpKind::Zero { .. } | OpKind::Discard)
    }

    /// The first page that the operation touches.
    pub fn first_page(&self) -> PageNo {
        self.span.pages().first
    }
}

/// Most pairs of vectors that are kept for later operations: twice the writes in flight at full speed (see
/// `writeback.rs`).
const SPARE_MAX: usize = 64;

/// The operations in flight, by tag. Their vectors are reused, so a steady state allocates nothing.
#[derive(Debug, Default)]
pub(super) struct StoreOps {
    slots: Vec<Option<StoreOp>>,
    /// Free tags.
    free: Vec<u32>,
    /// Tags of operations that the owner has not taken yet.
    queued: Vec<u32>,
    /// Empty vectors.
    spare: Vec<(Vec<FrameId>, Vec<PageId>)>,
    writes: u32,
    /// Operations that change the image.
    changes: u32,
}

impl StoreOps {
    /// Adds an operation, for [`PageCache::take_ops`].
    pub fn submit(&mut self, op: StoreOp) {
        if op.kind == OpKind::Write {
            self.writes += 1;
        }
        self.changes += u32::from(op.kind.is_change());
        let tag = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 operations are in flight")
        });
        self.slots[tag as usize] = Some(op);
        self.queued.push(tag);
    }

    /// Removes an operation that ended.
    pub fn complete(&mut self, tag: u32) -> StoreOp {
        let op = self.slots[tag as usize].take().expect("an outcome belongs to an operation in flight");
        if op.kind == OpKind::Write {
            self.writes -= 1;
        }
        self.changes -= u32::from(op.kind.is_change());
        self.free.push(tag);
        op
    }

    /// Empty vectors for the frames and pages of an operation.
    pub fn vectors(&mut self) -> (Vec<FrameId>, Vec<PageId>) {
        self.spare.pop().unwrap_or_default()
    }

    /// Keeps an operation's vectors for later ones.
    pub fn recycle(&mut self, op: StoreOp) {
        let StoreOp { mut frames, mut ids, .. } = op;
        if frames.capacity() > 0 && self.spare.len() < SPARE_MAX {
            frames.clear();
            ids.clear();
            self.spare.push((frames, ids));
        }
    }

    /// Number of operations in flight.
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Number of operations in flight that change the image.
    pub fn changes(&self) -> u32 {
        self.changes
    }

    /// Number of writes in flight.
    pub fn writes(&self) -> u32 {
        self.writes
    }

    /// The store may have lost the data that the reads in flight have read from a span.
    pub fn doubt_reads(&mut self, span: PageSpan) {
        let reads = self.slots.iter_mut().flatten().filter(|op| op.kind == OpKind::Read);
        reads.filter(|op| op.span.pages().overlaps(span)).for_each(|op| op.is_lost = true);
    }

    /// The operations in flight.
    pub fn iter(&self) -> impl Iterator<Item = &StoreOp> {
        self.slots.iter().flatten()
    }
}

impl PageCache {
    /// Queues an operation for the store.
    pub(super) fn submit_op(&mut self, op: StoreOp) {
        let (doubts, syncs) = (self.flushing.doubts(), self.flushing.successes());
        self.store_ops.submit(StoreOp { doubts, syncs, since: self.now, ..op });
    }

    /// The operation that has been in flight longest, and its start.
    pub fn oldest_op(&self) -> Option<(OpKind, SectorSpan, Tick)> {
        self.store_ops.iter().min_by_key(|op| op.since).map(|op| (op.kind, op.span, op.since))
    }

    /// The operation with this tag: its kind, its span, and its start.
    ///
    /// # Panics
    /// If there is none.
    pub fn operation(&self, tag: u32) -> (OpKind, SectorSpan, Tick) {
        let op = self.store_ops.slots[tag as usize].as_ref().expect("the operation is in flight");
        (op.kind, op.span, op.since)
    }

    /// Whether [`PageCache::take_ops`] has any operation to hand out.
    pub fn has_new_ops(&self) -> bool {
        !self.store_ops.queued.is_empty()
    }

    /// Hands out the operations that the owner has not started yet, in the order of their submission.
    ///
    /// => The frames of an operation stay held until [`PageCache::complete`] gets its tag.
    pub fn take_ops(&mut self, mut start: impl FnMut(StoreOpRef<'_>)) {
        for tag in self.store_ops.queued.drain(..) {
            let op = self.store_ops.slots[tag as usize].as_ref().expect("a queued operation is in flight");
            let StoreOp { kind, span, ref frames, urgency, .. } = *op;
            let first_sector = (span.start % SECTORS_PER_PAGE) as u8;
            start(StoreOpRef { tag, kind, span, first_sector, frames, urgency });
        }
    }

    /// How many pages the operation with this tag has.
    pub fn pages_of_op(&self, tag: u32) -> usize {
        self.store_ops.slots[tag as usize].as_ref().map_or(0, |op| op.ids.len())
    }

    /// The operation with this tag has ended (in the kernel: biodone).
    pub fn complete(&mut self, tag: u32, outcome: &Outcome, now: Tick) {
        self.advance_clock(now);
        self.stalled.unblock();
        // A page that could not be written before may be writable now.
        self.writeback.reset_progress();
        let op = self.store_ops.complete(tag);
        self.stats.completed_ops += 1;
        match op.kind {
            OpKind::Read => self.read_done(&op, outcome),
            OpKind::Write => self.write_done(&op, outcome),
            OpKind::Sync => self.sync_done(outcome),
            OpKind::Zero { .. } | OpKind::Discard => self.range_done(&op, outcome),
            OpKind::Map => self.map_done(&op, outcome),
            OpKind::Allocate => self.allocate_done(&op, outcome),
        }
        self.op_ended(&op);
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
