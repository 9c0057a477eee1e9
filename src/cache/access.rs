//! The cache's interface for guest requests: accesses, the pieces to copy, and notices.

use crate::units::{Fault, FrameId, PageId, PageNo, SECTORS_PER_PAGE, SectorMask, SectorSpan, low_u8, low_u32};

/// Identifies a request in the cache's notices. The cache's owner chooses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// Part of a request that can be copied now: a run of sectors that is contiguous in the request and in memory. Its
/// frames stay pinned until the owner returns the piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The first frame; the following ones are adjacent. `None`: a hole, which reads as zeros.
    pub frame: Option<FrameId>,
    /// The first page, if the piece belongs to a write.
    pub page: PageId,
    /// First sector within the first page.
    pub first: u8,
    /// Number of sectors.
    pub count: u32,
    /// First sector within the request.
    pub at: u32,
}

impl Piece {
    /// The frames that the piece pins.
    pub fn frames(&self) -> impl Iterator<Item = FrameId> + use<> {
        let end = u64::from(self.first) + u64::from(self.count);
        let count = low_u32(end.div_ceil(SECTORS_PER_PAGE));
        let frames = self.frame.map_or(0..0, |first| first.0..first.0 + count);
        frames.map(FrameId)
    }

    /// Extends this piece by `next` if `next` follows it in the request and in memory. Returns whether it did.
    pub(super) fn absorb(&mut self, next: &Self) -> bool {
        let pages = (u64::from(self.first) + u64::from(self.count)) / SECTORS_PER_PAGE;
        let frame = self.frame.map(|frame| FrameId(frame.0 + low_u32(pages)));
        let follows = next.at == self.at + self.count && next.frame == frame;
        if follows {
            self.count += next.count;
        }
        follows
    }

    /// Appends the piece to the earlier ones of its request, or extends the last of them by it.
    pub(super) fn join(self, pieces: &mut Vec<Self>) {
        if !pieces.last_mut().is_some_and(|last| last.absorb(&self)) {
            pieces.push(self);
        }
    }
}

/// How the copy of a write's piece from guest memory ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyResult {
    /// All bytes are in the frames.
    Complete,
    /// Some bytes may be missing: the sectors hold old bytes, new bytes or a mixture, as after a failed write.
    Incomplete,
}

/// Whether a request is new to the cache or is retried after a stall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// It did not stall, or this is another part of it.
    New,
    /// It stalled, and this is the retry after its [`Notice::Resume`]: it does not queue behind others.
    Resumed,
}

/// A read or write request, or the rest of one after a stall.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// Identifies the request.
    pub ticket: Ticket,
    /// The whole request; within the image.
    pub span: SectorSpan,
    /// The first sector of the request that is not yet admitted.
    pub from: u32,
    /// The sector of the request at which to stop: the end of a page, or of the request. A long request is admitted in
    /// several calls.
    pub until: u32,
    /// Whether the request stalled before.
    pub attempt: Attempt,
    /// Where [`PageCache::find_all`](super::PageCache::find_all) found the first page. It may be elsewhere by now.
    pub guess: PageId,
}

impl Access {
    /// A whole request for `span`, which is below 2 TiB.
    pub fn new(ticket: Ticket, span: SectorSpan) -> Self {
        let (until, guess) = (low_u32(span.count), PageId::NONE);
        Self { ticket, span, from: 0, until, attempt: Attempt::New, guess }
    }

    /// The sectors that this call admits.
    pub(super) fn part(&self) -> SectorSpan {
        let count = self.until.saturating_sub(self.from);
        SectorSpan::new(self.span.start + u64::from(self.from), u64::from(count))
    }
}

/// How much of a request was admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admitted {
    /// All of it, up to [`Access::until`]: every sector is in a piece, or a notice will report it.
    All,
    /// The sectors of the request before this one. The rest is stalled until a [`Notice::Resume`].
    Until(u32),
    /// The sectors of the request before this one. The rest has failed.
    Refused(u32, Fault),
}

/// An event of a request after the call that submitted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A piece of a read was read in.
    Ready(Ticket, Piece),
    /// This many sectors of a read could not be read in.
    Unreadable(Ticket, u32, Fault),
    /// A stalled request is to be retried.
    Resume(Ticket),
    /// A flush, zero or discard is complete.
    Done(Ticket, Result<(), Fault>),
}

/// The part of a request that lies in one page.
#[derive(Clone, Copy, Debug)]
pub(super) struct PagePart {
    pub no: PageNo,
    /// First sector within the page.
    pub first: u8,
    pub count: u8,
    /// First sector within the request.
    pub at: u32,
}

impl PagePart {
    /// The part that begins at sector `at` of a request for `span`; `None` past its end.
    pub fn of(span: SectorSpan, at: u32) -> Option<Self> {
        let left = span.count.checked_sub(u64::from(at)).filter(|&left| left > 0)?;
        let sector = span.start + u64::from(at);
        let first = low_u8(sector % SECTORS_PER_PAGE);
        let count = low_u8(left.min(SECTORS_PER_PAGE - u64::from(first)));
        Some(Self { no: PageNo(sector / SECTORS_PER_PAGE), first, count, at })
    }

    pub fn mask(self) -> SectorMask {
        SectorMask::run(self.first, self.count)
    }

    pub fn piece(self, page: PageId, frame: Option<FrameId>) -> Piece {
        Piece { frame, page, first: self.first, count: u32::from(self.count), at: self.at }
    }
}
