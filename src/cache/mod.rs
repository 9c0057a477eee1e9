//! \[5\] The page cache, sans I/O: what is to be read, written and synced, never how.
//!
//! The cache sees no file descriptor, clock, thread, random number, guest address or data byte. It moves the names of
//! pages and frames; whoever owns it carries out its [`StoreOpRef`]s, tells it of their [`Outcome`]s, and delivers its
//! [`Notice`]s. That is what lets a simulator run it through millions of orderings from one seed.
//!
//! A turn, as seen from here: [`PageCache::complete`] for every operation that ended, [`PageCache::read`],
//! [`PageCache::write`], [`PageCache::flush`], [`PageCache::zero`] and [`PageCache::discard`] for new requests, the
//! owner copies the pieces and gives them back ([`PageCache::finish_read`], [`PageCache::finish_write`]), then
//! [`PageCache::pump`], which writes back, syncs, reclaims and resumes. [`PageCache::take_ops`] and
//! [`PageCache::take_notices`] come last at least, and wherever the owner has use for what there is already.
//!
//! Invariants, checked by [`PageCache::check`]:
//! I1 a page is on exactly one replacement queue if and only if it is in the table. I2 the dirty set is the pages with
//! `dirty` not empty. I3 frame references = residency + pins + store operations. I4 counters equal a recount. I5 dirty
//! is a subset of valid. I6 two operations in op never overlap unless both are reads. I7 a store read never lands
//! on a valid sector: it fills a frame of its own, and only missing sectors are taken from it. I8 a flush is done when
//! nothing of its epoch is dirty or being written and a Sync submitted after the last such write succeeded. I9 free +
//! held frames = arena. I10 every request completes exactly once (the owner's part: see `sim/`).

mod allocate;
mod check;
mod dirty;
mod eager;
mod flush;
mod frames;
mod getpages;
mod holes;
mod page;
mod pending_zeroes;
pub mod policy;
mod putpages;
mod ranges;
mod readahead;
mod reclaim;
mod restore;
mod stalled;
mod stats;
mod store_health;
mod store_ops;
#[cfg(test)]
mod tests;
mod throttle;
mod write;
mod writeback;

use crate::units::{
    Fault, FrameId, FrameRecord, PageId, PageNo, SECTORS_PER_PAGE, SectorMask, SectorSpan, Tick, low_u8, low_u32,
};

pub use stats::Stats;
pub use store_health::{Health, HealthEvent};
pub use store_ops::{Outcome, StoreOpRef};

use allocate::Allocating;
use dirty::{DirtySet, Tally};
use eager::Eager;
use flush::Flushing;
use frames::Frames;
use getpages::{Run, Waiters};
use holes::Holes;
use page::{Page, PageTable};
use pending_zeroes::PendingZeroes;
use policy::Policy;
use ranges::Ranges;
use readahead::Streams;
use stalled::Stalled;
use store_health::StoreHealth;
use store_ops::StoreOps;
use throttle::Throttle;
use writeback::Writeback;

/// A request, as its owner names it; the cache only hands the name back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// Part of a request that can be copied now, pinned until it is given back: sectors that lie in a row, in memory too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The memory: the first of so many frames in a row as the sectors take. `None` stands for zeros (a hole).
    pub frame: Option<FrameId>,
    /// The first page, for pieces of writes.
    pub page: PageId,
    /// First sector within the first page.
    pub first: u8,
    /// Number of sectors.
    pub count: u32,
    /// Sector within the request.
    pub at: u32,
}

impl Piece {
    /// The frames that the piece pins.
    pub fn frames(&self) -> impl Iterator<Item = FrameId> + use<> {
        let end = u64::from(self.first) + u64::from(self.count);
        let count = usize::try_from(end.div_ceil(SECTORS_PER_PAGE)).expect("less than the frames");
        self.frame.into_iter().flat_map(|frame| (frame.0..).map(FrameId)).take(count)
    }

    /// Makes `next` a part of this piece, if it goes on where this one ends.
    fn absorb(&mut self, next: &Self) -> bool {
        let pages = (u64::from(self.first) + u64::from(self.count)) / SECTORS_PER_PAGE;
        let frame = self.frame.map(|frame| FrameId(frame.0 + low_u32(pages)));
        let follows = next.at == self.at + self.count && next.frame == frame;
        if follows {
            self.count += next.count;
        }
        follows
    }

    /// Adds the piece to others of its request.
    fn join(self, pieces: &mut Vec<Self>) {
        if !pieces.last_mut().is_some_and(|last| last.absorb(&self)) {
            pieces.push(self);
        }
    }
}

/// A request, or what is left of it: sectors from `from` on.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// Who asks.
    pub ticket: Ticket,
    /// The whole request; within the image.
    pub span: SectorSpan,
    /// Sectors admitted before.
    pub from: u32,
    /// It was last_reported to resume: it goes before requests that have not waited.
    pub resumed: bool,
}

/// How far a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admitted {
    /// All of it: every sector is in a piece handed out, or will come in a notice.
    All,
    /// Up to this sector of the request; a [`Notice::Resume`] will come.
    Until(u32),
    /// Up to this sector; the rest is refused.
    Refused(u32, Fault),
}

/// What the cache tells the owners of requests, later than the call that asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A piece of a read has come in.
    Ready(Ticket, Piece),
    /// So many sectors of a read can't be read.
    Unreadable(Ticket, u32, Fault),
    /// A request that stalled may go on.
    Resume(Ticket),
    /// A flush, zero or discard is done.
    Done(Ticket, Result<(), Fault>),
}

/// The bytes behind frames, as far as the cache must have them moved.
pub trait FrameMemory: Send + std::fmt::Debug {
    /// Copies the sectors of `mask` from `source` to the same places in `target`.
    fn copy_sectors(&self, source: FrameId, target: FrameId, mask: SectorMask);
    /// Fills the sectors of `mask` with zeros.
    fn zero_sectors(&self, frame: FrameId, mask: SectorMask);
    /// From now on the frame holds this of the page, in bytes that are in place; an empty record: nothing.
    ///
    /// => What was published last is what [`PageCache::restore`] gets after the daemon's death.
    fn publish(&self, frame: FrameId, record: FrameRecord);
    /// How many zeroed ranges can be noted at a time; at least one.
    fn zero_slots(&self) -> usize;
    /// From now on the place, one of [`FrameMemory::zero_slots`], holds a range that is to read as zeros and that the store
    /// may not have so; `None`: nothing. [`PageCache::restore`] gets it as it gets the frames.
    fn note_zero(&self, place: usize, span: Option<SectorSpan>);
}

/// Replacement policies to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyKind {
    /// S3-FIFO with a correlation window.
    S3Fifo,
    /// Least recently used.
    Lru,
}

/// What becomes of requests that need the store while it fails to take writes. The pages stay dirty in every case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorPolicy {
    /// They fail: a FLUSH that includes the write, and writes that find no room.
    Report,
    /// They wait for the store.
    Hold,
    /// Everything fails that is not in memory, and the store is left alone, until [`PageCache::resume`].
    Stop,
}

/// A cache's shape; fixed for its life.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Frames, of 4 KiB.
    pub frames: u32,
    /// Size of the image in sectors.
    pub image_sectors: u64,
    /// The store's block in sectors (1 to 8): offsets and lengths of store operations are multiples of it.
    pub block_sectors: u8,
    /// Whether the image may have holes: then the cache asks before it reads.
    pub sparse: bool,
    /// Whether the store can tell of holes, also of those that come later. One that can't is a device: it has no space to
    /// reserve either.
    pub can_map: bool,
    /// Longest store operation in pages, at most one region (256).
    pub cluster_pages_max: u32,
    /// Whether pages stay after use; without it the cache is a bounce buffer (cache mode none).
    pub retain: bool,
    /// Which pages to give up.
    pub policy: PolicyKind,
    /// Longest readahead window in pages; 0: none.
    pub readahead_pages_max: u32,
    /// The dirty limit is what the store writes in this time.
    pub flush_target_us: u64,
    /// The dirty limit is never above this.
    pub dirty_pages_max: u32,
    /// No page stays dirty for longer.
    pub dirty_age_us: u64,
    /// Whether a hole gets its space before the write that fills it completes.
    pub allocate: bool,
    /// What becomes of requests while the store fails to take writes.
    pub on_error: ErrorPolicy,
    /// The same, where the store has no space.
    pub on_full: ErrorPolicy,
    /// [`ErrorPolicy::Hold`] becomes [`ErrorPolicy::Report`] after this time.
    pub hold_us: u64,
}

/// The page cache of one image.
#[derive(Debug)]
pub struct PageCache {
    settings: Settings,
    memory: Box<dyn FrameMemory>,
    now: Tick,
    pages: PageTable,
    frames: Frames,
    policy: Box<dyn Policy>,
    waiters: Waiters,
    store_ops: StoreOps,
    run: Run,
    holes: Holes,
    streams: Streams,
    dirty: DirtySet,
    writeback: Writeback,
    eager: Eager,
    health: StoreHealth,
    allocating: Allocating,
    throttle: Throttle,
    flushing: Flushing,
    ranges: Ranges,
    pending_zeroes: PendingZeroes,
    stalled: Stalled,
    /// Pages whose waiters could not be served yet for lack of a frame or a map.
    unfilled: Vec<PageId>,
    notices: Vec<Notice>,
    stats: Stats,
    /// A deliberate bug, for the simulator to find.
    #[cfg(test)]
    pub(crate) planted: Option<crate::sim::PlantedBug>,
}

impl PageCache {
    /// An empty cache whose frames are `memory`.
    ///
    /// # Panics
    /// If the settings make no sense; whoever reads the configuration checks them before.
    pub fn new(settings: Settings, memory: Box<dyn FrameMemory>) -> Self {
        assert!(settings.frames > 0 && settings.image_sectors > 0, "an empty cache or image");
        assert!((1..=8).contains(&settings.block_sectors), "a block of 1 to 8 sectors");
        assert!(
            (1..=ranges::REGION_PAGES).contains(&u64::from(settings.cluster_pages_max)),
            "clusters stay in a region"
        );
        let frames = settings.frames;
        Self {
            pending_zeroes: PendingZeroes::new(memory.zero_slots()),
            memory,
            now: Tick(0),
            pages: PageTable::new(frames),
            frames: Frames::new(frames, !settings.retain),
            policy: policy::new(settings.policy, frames),
            waiters: Waiters::default(),
            store_ops: StoreOps::default(),
            run: Run::default(),
            holes: Holes::new(settings.sparse, settings.can_map, frames),
            streams: Streams::new(settings.readahead_pages_max, frames),
            dirty: DirtySet::default(),
            writeback: Writeback::default(),
            eager: Eager::default(),
            health: StoreHealth::default(),
            allocating: Allocating::new(frames),
            throttle: Throttle::new(settings.flush_target_us, settings.dirty_pages_max),
            flushing: Flushing::default(),
            ranges: Ranges::default(),
            stalled: Stalled::default(),
            unfilled: Vec::new(),
            notices: Vec::new(),
            stats: Stats::default(),
            settings,
            #[cfg(test)]
            planted: None,
        }
    }

    /// The end of a turn: starts what is due, and lets the stalled try again.
    ///
    /// => Call it after the turn's completions and requests, before [`PageCache::take_ops`].
    pub fn pump(&mut self, now: Tick) {
        self.now = self.now.max(now);
        self.end_hold();
        self.retry_allocations();
        self.start_ranges();
        self.write_back();
        self.advance_flushes();
        self.reclaim();
        // With what the reclaim has freed: it may be all that comes of this turn.
        self.retry_unfilled();
        self.continue_windows();
        self.stalled.resume(&mut self.notices);
    }

    /// When [`PageCache::pump`] has something to do although nothing happens; `None` while all is clean.
    pub fn next_deadline(&self) -> Option<Tick> {
        let writeback = self.writeback_deadline();
        if self.stalled.is_unblocked() { Some(self.now) } else { writeback }
    }

    /// Whether everything that completed is on the store, durably.
    pub fn is_stable(&self) -> bool {
        self.dirty.dirty_or_writeback_pages() == 0 && self.flushing.nothing_unsynced()
    }

    /// Takes the notices that wait.
    pub fn take_notices(&mut self, into: &mut Vec<Notice>) {
        into.append(&mut self.notices);
    }

    /// What the cache did and holds.
    pub fn stats(&self) -> Stats {
        Stats {
            frames: u64::from(self.frames.total()),
            frames_free: u64::from(self.frames.free()),
            resident_pages: u64::from(self.pages.len()),
            dirty_pages: u64::from(self.dirty.dirty_pages()),
            dirty_limit_pages: u64::from(self.throttle.limit_pages()),
            metadata_bytes: self.metadata_bytes() as u64,
            ..self.stats
        }
    }

    /// Bytes of memory the cache takes beside its frames.
    pub fn metadata_bytes(&self) -> usize {
        self.pages.metadata_bytes()
            + self.frames.metadata_bytes()
            + self.policy.metadata_bytes()
            + self.holes.metadata_bytes()
            + self.allocating.metadata_bytes()
            + self.dirty.metadata_bytes()
            + self.flushing.metadata_bytes()
    }

    /// The one place where a page's masks, frame and what counts for them change: keeps the dirty set and the counters in
    /// step (I2, I4), and the memory last_reported.
    fn change<R>(&mut self, id: PageId, mutate: impl FnOnce(&mut Page) -> R) -> R {
        let page = &mut self.pages[id];
        let before = Tally::of(page);
        let published = (page.frame(), page.record());
        let result = mutate(page);
        if cfg!(debug_assertions) {
            page.check();
        }
        let after = Tally::of(page);
        let no = page.no();
        let now = (page.frame(), page.record());
        if before != after {
            self.dirty.note(no, before, after);
            if after.makes_room(before) {
                self.stalled.unblock();
            }
        }
        if published != now {
            self.publish(published, now);
        }
        result
    }

    /// Tells the memory what a page's frame holds now.
    ///
    /// => A page that moved has two frames with the same bytes for a moment, never none.
    fn publish(&self, before: (Option<FrameId>, FrameRecord), now: (Option<FrameId>, FrameRecord)) {
        #[cfg(test)]
        let now = (now.0, self.planted_record(now.1));
        if let (Some(frame), record) = now {
            self.memory.publish(frame, record);
        }
        if let (Some(frame), record) = before
            && Some(frame) != now.0
            && !record.is_empty()
        {
            self.memory.publish(frame, FrameRecord::empty(record.page));
        }
    }

    /// Gives back a reference to a frame. One that is free then is what a stalled request may wait for.
    fn release(&mut self, frame: FrameId) {
        if self.frames.release(frame) {
            self.stalled.unblock();
        }
    }

    /// Makes an absent page; `None` when there is no slot.
    fn create_page(&mut self, no: PageNo) -> Option<PageId> {
        let id = self.pages.insert(no)?;
        self.policy.insert(id, no);
        Some(id)
    }

    /// Takes a page that nothing holds out of the cache, and frees its frame.
    ///
    /// => The policy has forgotten it already, or is last_reported here (`known_to_policy`).
    fn drop_page(&mut self, id: PageId, known_to_policy: bool) {
        debug_assert!(!self.pages[id].busy(), "a busy page is not dropped");
        if known_to_policy {
            self.policy.remove(id);
        }
        self.note_unread_prefetch(id);
        self.change(id, |page| {
            page.dirty = SectorMask::NONE;
            page.clear(u8::MAX);
        });
        if let Some(frame) = self.pages[id].frame() {
            self.memory.publish(frame, FrameRecord::empty(self.pages[id].no()));
            self.release(frame);
        }
        self.pages.remove(id);
    }

    /// Gives a page its frame; the sectors of a tail page that lie beyond the image become zeros for good.
    fn adopt_frame(&mut self, id: PageId, frame: FrameId) {
        let beyond = self.beyond_image(self.pages[id].no());
        if !beyond.is_empty() {
            self.memory.zero_sectors(frame, beyond);
        }
        self.change(id, |page| {
            page.set_frame(frame);
            page.valid = beyond;
        });
    }

    /// The sectors of a page that lie beyond the end of the image (genfs: past diskeof).
    fn beyond_image(&self, no: PageNo) -> SectorMask {
        let start = no.0 * SECTORS_PER_PAGE;
        match self.settings.image_sectors.saturating_sub(start) {
            SECTORS_PER_PAGE.. => SectorMask::NONE,
            inside => SectorMask::ALL.without(SectorMask::run(0, low_u8(inside))),
        }
    }

    /// Sectors of `pages` pages from `first`, cut at the end of the image.
    fn span_of(&self, first: PageNo, pages: u64) -> SectorSpan {
        let start = first.0 * SECTORS_PER_PAGE;
        let end = (start + pages * SECTORS_PER_PAGE).min(self.settings.image_sectors);
        SectorSpan::new(start, end - start)
    }
}

/// One step of a request through its pages: the page, the sectors in it, and where they lie in the request.
#[derive(Clone, Copy, Debug)]
struct PagePart {
    no: PageNo,
    first: u8,
    count: u8,
    at: u32,
}

impl PagePart {
    /// The step at sector `at` of a request for `span`; `None` past its end.
    fn of(span: SectorSpan, at: u32) -> Option<Self> {
        let left = span.count.checked_sub(u64::from(at)).filter(|&left| left > 0)?;
        let sector = span.start + u64::from(at);
        let first = low_u8(sector % SECTORS_PER_PAGE);
        let count = low_u8(left.min(SECTORS_PER_PAGE - u64::from(first)));
        Some(Self { no: PageNo(sector / SECTORS_PER_PAGE), first, count, at })
    }

    fn mask(self) -> SectorMask {
        SectorMask::run(self.first, self.count)
    }

    fn piece(self, page: PageId, frame: Option<FrameId>) -> Piece {
        Piece { frame, page, first: self.first, count: u32::from(self.count), at: self.at }
    }
}
