//! Store operations in flight: what the cache asked for, which pages and frames each holds, and how it ended.

use crate::units::{Epoch, Fault, FrameId, PageId, PageNo, SECTORS_PER_PAGE, SectorSpan, Tick};

use super::PageCache;

/// What the owner is to do on the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlanKind {
    /// Read the span into the frames.
    Read,
    /// Write the frames to the span.
    Write,
    /// Make durable every write whose outcome was told before.
    Sync,
    /// Make the span read as zeros.
    Zero {
        /// Space may be given back.
        unmap: bool,
    },
    /// The span's contents no longer matter.
    Discard,
    /// Tell data from holes in the span.
    Map,
    /// Reserve space for what of the span has none.
    Allocate,
}

/// One operation for the store.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// Name to report the outcome under.
    pub tag: u32,
    /// What to do.
    pub kind: PlanKind,
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
    Mapped(Vec<(u64, bool)>),
    /// It failed; nothing is known of the memory of a read or the span of a write.
    Failed(Fault),
}

/// An operation that the cache waits for.
#[derive(Debug)]
pub(super) struct Flight {
    pub kind: PlanKind,
    pub span: SectorSpan,
    pub frames: Vec<FrameId>,
    /// The page of each frame.
    pub ids: Vec<PageId>,
    /// Write: the oldest epoch among its pages.
    pub epoch: Epoch,
    /// As in its plan.
    pub demand: bool,
}

impl Flight {
    /// An operation that holds no pages.
    pub fn without_pages(kind: PlanKind, span: SectorSpan) -> Self {
        Self { kind, span, frames: Vec::new(), ids: Vec::new(), epoch: Epoch(0), demand: true }
    }

    /// The pages on the image that the operation touches.
    pub fn first_page(&self) -> PageNo {
        self.span.pages().first
    }
}

/// Slots of operations; vectors are used again, so a steady state allocates nothing.
#[derive(Debug, Default)]
pub(super) struct Flights {
    slots: Vec<Option<Flight>>,
    free: Vec<u32>,
    queued: Vec<u32>,
    spare: Vec<(Vec<FrameId>, Vec<PageId>)>,
    writes: u32,
}

impl Flights {
    /// Adds an operation; its plan waits to be taken.
    pub fn launch(&mut self, flight: Flight) {
        if flight.kind == PlanKind::Write {
            self.writes += 1;
        }
        let tag = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            u32::try_from(self.slots.len() - 1).expect("operations in flight fit 32 bits")
        });
        self.slots[tag as usize] = Some(flight);
        self.queued.push(tag);
    }

    /// Takes an operation that ended.
    pub fn land(&mut self, tag: u32) -> Flight {
        let flight = self.slots[tag as usize].take().expect("an outcome belongs to an operation in flight");
        if flight.kind == PlanKind::Write {
            self.writes -= 1;
        }
        self.free.push(tag);
        flight
    }

    /// Empty vectors for the frames and pages of an operation.
    pub fn vectors(&mut self) -> (Vec<FrameId>, Vec<PageId>) {
        self.spare.pop().unwrap_or_default()
    }

    /// Takes an operation's vectors back.
    pub fn recycle(&mut self, flight: Flight) {
        let Flight { mut frames, mut ids, .. } = flight;
        if frames.capacity() > 0 && self.spare.len() < 64 {
            frames.clear();
            ids.clear();
            self.spare.push((frames, ids));
        }
    }

    /// Writes in flight.
    pub fn writes(&self) -> u32 {
        self.writes
    }

    /// Every operation in flight.
    pub fn iter(&self) -> impl Iterator<Item = &Flight> {
        self.slots.iter().flatten()
    }
}

impl PageCache {
    /// Hands out the operations that wait to be started.
    ///
    /// => The frames of a plan stay held until [`PageCache::complete`] is told of its tag.
    pub fn take_plans(&mut self, mut start: impl FnMut(Plan<'_>)) {
        for tag in self.flights.queued.drain(..) {
            let flight = self.flights.slots[tag as usize].as_ref().expect("a queued operation is in flight");
            let Flight { kind, span, ref frames, demand, .. } = *flight;
            let first_sector = (span.start % SECTORS_PER_PAGE) as u8;
            start(Plan { tag, kind, span, first_sector, frames, demand });
        }
    }

    /// Tells how an operation ended (where the kernel calls biodone).
    pub fn complete(&mut self, tag: u32, outcome: &Outcome, now: Tick) {
        self.now = self.now.max(now);
        self.stalled.unblock();
        let flight = self.flights.land(tag);
        match flight.kind {
            PlanKind::Read => self.read_done(&flight, outcome),
            PlanKind::Write => self.write_done(&flight, outcome),
            PlanKind::Sync => self.sync_done(outcome),
            PlanKind::Zero { .. } | PlanKind::Discard => self.range_done(&flight, outcome),
            PlanKind::Map => self.map_done(&flight, outcome),
            PlanKind::Allocate => self.allocate_done(&flight, outcome),
        }
        self.flights.recycle(flight);
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
