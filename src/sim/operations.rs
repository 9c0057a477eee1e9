//! The operations in flight in a simulated world: the guest's requests and the cache's store operations.

use crate::cache::StoreOpRef;
use crate::units::{ExtentKind, FrameId, OpKind, SectorSpan, Tick, Unmap};

use super::failure_oracle::RequestClass;
use super::oracle::Knowledge;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GuestOp {
    Read,
    Write {
        version: u32,
    },
    Zero {
        unmap: Unmap,
    },
    Discard,
    Flush,
    /// Sent by the host's operator, not by the guest.
    Freeze {
        until_us: u64,
        holds_reads: bool,
    },
}

impl GuestOp {
    pub fn class(self) -> RequestClass {
        match self {
            GuestOp::Read => RequestClass::Read,
            GuestOp::Write { .. } => RequestClass::Write,
            GuestOp::Zero { .. } | GuestOp::Discard => RequestClass::Range,
            GuestOp::Flush | GuestOp::Freeze { .. } => RequestClass::Flush,
        }
    }

    /// Whether its result is undefined if another request overlaps it.
    pub fn excludes_others(self) -> bool {
        matches!(self, GuestOp::Discard)
    }
}

/// A request in flight.
#[derive(Debug)]
pub(super) struct GuestRequest {
    pub op: GuestOp,
    pub span: SectorSpan,
    /// The step at which the guest sent it.
    pub sent_step: u64,
    pub sent_at: Tick,
    /// Number of sectors that the cache has admitted.
    pub admitted: u32,
    /// Number of sectors that are copied or have failed.
    pub settled: u64,
    /// The cache failed a part of it.
    pub failed: bool,
    /// The copy of a write's data from the guest stopped early.
    pub copy_failed: bool,
    /// The versions that a read may return, or that a flush makes durable.
    pub known: Knowledge,
    /// For a read: the versions read so far, by sector.
    pub seen: Vec<Option<u32>>,
}

impl GuestRequest {
    /// A request that the guest sends now.
    pub fn new(op: GuestOp, span: SectorSpan, sent_step: u64, sent_at: Tick, known: Knowledge) -> Self {
        let seen = if op == GuestOp::Read { vec![None; span.count as usize] } else { Vec::new() };
        Self { op, span, sent_step, sent_at, admitted: 0, settled: 0, failed: false, copy_failed: false, known, seen }
    }

    /// The next daemon gets the request again.
    pub fn restart(&mut self) {
        (self.admitted, self.settled, self.failed) = (0, 0, false);
        self.seen.fill(None);
    }
}

/// A store operation in flight.
#[derive(Debug)]
pub(super) struct DiskOp {
    pub kind: OpKind,
    pub span: SectorSpan,
    first_sector: u8,
    frames: Vec<FrameId>,
    /// For a write: the frames' contents at submission. They must not change until it completes.
    pub content: Vec<u32>,
    /// For a map: its result, if it was determined at submission.
    pub map: Option<Vec<(u64, ExtentKind)>>,
    /// For a Sync: its start on the disk's clock.
    pub began: u64,
    /// When it takes effect on disk and memory.
    pub effect_at: u64,
    /// Whether it has failed; `None` until it takes effect.
    pub failed: Option<bool>,
    /// When the cache is notified of its completion.
    pub ends_at: u64,
}

impl DiskOp {
    /// A store operation of the cache; the disk's first sector is sector `base` of the image.
    pub fn new(op: &StoreOpRef<'_>, base: u64) -> Self {
        let frames = op.frames.to_vec();
        Self {
            kind: op.kind,
            span: SectorSpan::new(op.span.start.saturating_sub(base), op.span.count),
            first_sector: op.first_sector,
            frames,
            content: Vec::new(),
            map: None,
            began: 0,
            effect_at: 0,
            failed: None,
            ends_at: 0,
        }
    }

    /// The frame of the operation's sector `n`, and that sector's index in the frame.
    pub fn frame_sector(&self, n: usize) -> (FrameId, usize) {
        let sector = usize::from(self.first_sector) + n;
        (self.frames[sector / 8], sector % 8)
    }
}
