//! \[5\] The page cache, sans I/O: it decides what to read, write and sync, and does no I/O of its own.
//!
//! The cache has no file descriptor, clock, thread, random number, guest address or data byte. It handles only the
//! numbers of pages and frames. Its owner carries out its [`StoreOpRef`]s, reports their [`Outcome`]s, and delivers its
//! [`Notice`]s. So a simulator can run it through millions of orderings, each from one seed.
//!
//! A turn of the owner:
//!
//! 1. [`PageCache::complete`] for every store operation that ended.
//! 2. [`PageCache::read`], [`PageCache::write`], [`PageCache::flush`], [`PageCache::zero`] and [`PageCache::discard`]
//!    for new requests.
//! 3. The owner copies the pieces and returns them with [`PageCache::finish_read`] and [`PageCache::finish_write`].
//! 4. [`PageCache::pump`] writes back, syncs, reclaims and resumes.
//! 5. [`PageCache::take_ops`] and [`PageCache::take_notices`]. The owner may call them earlier too.
//!
//! The invariants I1 to I10 are listed at [`PageCache`].

mod access;
mod allocate;
mod changed_ranges;
mod check;
mod eager;
mod flush;
mod freeze;
mod getpages;
mod growing;
mod holes;
mod image_size;
mod page_ranges;
mod pages;
mod pending_zeroes;
pub mod policy;
mod putpages;
mod ranges;
mod readahead;
mod reclaim;
mod resize;
mod restore;
mod runs;
mod settings;
mod stalled;
mod stats;
mod store_health;
mod store_ops;
#[cfg(test)]
mod tests;
mod throttle;
mod warm;
mod witness;
mod write;
mod writeback;

use crate::units::{FrameId, FrameRecord, PageId, PageNo, SECTORS_PER_PAGE, SectorMask, SectorSpan, Tick};

pub use access::{Access, Admitted, Attempt, CopyResult, Notice, Piece, Ticket};
pub use settings::{ErrorPolicy, PolicyKind, Settings};
pub use stats::Stats;
pub use store_health::{Health, HealthEvent};
pub use store_ops::{Outcome, StoreOpRef};
pub use warm::WarmStep;

use access::PagePart;
use allocate::SpaceAllocations;
use changed_ranges::ChangedRanges;
use eager::EagerWriteback;
use flush::FlushState;
use freeze::FreezeState;
use getpages::{MissRun, Waiters};
use holes::HoleMap;
use pages::Pages;
use pending_zeroes::PendingZeroes;
use ranges::Ranges;
use readahead::Streams;
use resize::Resize;
use stalled::StalledRequests;
use store_health::StoreHealth;
use store_ops::StoreOps;
use throttle::Throttle;
use writeback::Writeback;

/// Pages of a region (1 MiB), the unit of bulk work: no cluster crosses the border of a region, hole maps and space
/// allocations are requested by region, and a region that a sequential writer has filled is written back immediately.
pub const REGION_PAGES: u64 = 256;
/// Words of a bitmap of a region's pages.
#[expect(clippy::cast_possible_truncation, reason = "a region has 256 pages")]
const REGION_WORDS: usize = REGION_PAGES as usize / u64::BITS as usize;
/// Frames of the cache for each slot of a table of regions. A table thus covers an image of four times the cache, and
/// all tables together take about 0.02 % of the cache.
const FRAMES_PER_REGION: u32 = 64;

/// A page's bit in the bitmap of its region: the word, and the mask within it.
fn bit_of(no: PageNo) -> (usize, u64) {
    let index = no.0 % REGION_PAGES;
    let bits = u64::from(u64::BITS);
    ((index / bits) as usize, 1 << (index % bits))
}

/// The memory of the frames: the operations on its bytes that the cache needs.
pub trait FrameMemory: Send + std::fmt::Debug {
    /// Copies the sectors of `mask` from `source` to the same places in `target`.
    fn copy_sectors(&self, source: FrameId, target: FrameId, mask: SectorMask);
    /// Fills the sectors of `mask` with zeros.
    fn zero_sectors(&self, frame: FrameId, mask: SectorMask);
    /// Records the contents of the frame, whose bytes are already in place. An empty record: the frame holds nothing.
    ///
    /// => After a crash of the daemon, the next daemon passes the last record of each frame to [`PageCache::restore`].
    fn publish(&self, frame: FrameId, record: FrameRecord);
    /// Only the first `count` frames are used from now on. The others hold nothing, and their memory may be freed.
    ///
    /// => They are used again only after a call with a larger count.
    fn use_frames(&self, _count: u32) {}
    /// Number of zeroed ranges that can be recorded at a time; at least one.
    fn zero_slots(&self) -> usize;
    /// Records in a slot (one of [`FrameMemory::zero_slots`]) a range that must read as zeros although the store may
    /// still have other contents; `None` clears the slot. [`PageCache::restore`] gets the slots together with the
    /// frames.
    fn note_zero(&self, slot: usize, span: Option<SectorSpan>);
    /// Number of slots for changed ranges; at least 4.
    fn changed_slots(&self) -> usize {
        4
    }
    /// Notes in a slot, one of [`FrameMemory::changed_slots`], a range that the store may have changed, and whose
    /// change it may lose; `None` clears the slot. [`PageCache::restore`] gets the slots as it gets the frames.
    fn note_changed(&self, _slot: usize, _span: Option<SectorSpan>) {}
}

/// The page cache of one image.
///
/// # Invariants
///
/// - I1: A page is on exactly one replacement queue if and only if it is in the table. Upheld by `Pages::insert`,
///   `remove` and `evict`.
/// - I2: The dirty set is the pages whose `dirty` mask is not empty. Upheld by `Pages::change` and `forget`.
/// - I3: References to a frame = residency + pins + store operations. `Pages` upholds residency; each copy and each
///   operation takes and drops its own.
/// - I4: Counters equal a recount. For pages, upheld by `Pages::change` and `forget`.
/// - I5: Dirty sectors are valid. Checked by `Pages::change`.
/// - I6: Two store operations in flight overlap only if both are reads. Upheld by `fill`, `can_write_back` and
///   `start_ranges`, which start none on a page that has one.
/// - I7: A store read never overwrites a valid sector. It fills a frame of its own, and the page takes only the sectors
///   that it lacks. Upheld by `page_read_in`.
/// - I8: A flush is complete when nothing of its epoch is dirty or under write-back, and a Sync submitted after the
///   last such write has succeeded. Upheld by `advance_flushes`.
/// - I9: Free frames + held frames = frames in use. Upheld by `Frames`, which `Pages` owns.
/// - I10: Every request completes exactly once. Upheld by the queues of waiters, stalled requests, flushes and ranges,
///   which remove an entry when they report it, and by the owner.
///
/// [`PageCache::check`] recounts I1 to I7 and I9 from scratch. The simulator calls it every few steps, and its oracle
/// checks I8 and I10.
#[derive(Debug)]
pub struct PageCache {
    settings: Settings,
    /// The image is about to shrink to this many sectors (`image_size.rs`).
    shrinks_to: Option<u64>,
    now: Tick,
    /// I1 to I5, I9.
    pages: Pages,
    /// Reads that wait for a page (I10).
    waiters: Waiters,
    /// I6.
    store_ops: StoreOps,
    run: MissRun,
    holes: HoleMap,
    streams: Streams,
    writeback: Writeback,
    eager: EagerWriteback,
    health: StoreHealth,
    allocating: SpaceAllocations,
    throttle: Throttle,
    /// I8.
    flushing: FlushState,
    /// I6.
    ranges: Ranges,
    pending_zeroes: PendingZeroes,
    changed_ranges: ChangedRanges,
    resize: Resize,
    freeze: FreezeState,
    /// Requests that were not admitted whole (I10).
    stalled: StalledRequests,
    /// Pages whose waiters could not be served yet, for lack of a frame or of a map.
    unfilled: Vec<PageId>,
    notices: Vec<Notice>,
    stats: Stats,
}

impl PageCache {
    /// An empty cache whose frames are `memory`.
    ///
    /// # Panics
    /// If the settings are invalid. The configuration's checks rule that out.
    pub fn new(settings: Settings, memory: Box<dyn FrameMemory>) -> Self {
        assert!(settings.frames > 0, "a cache has at least 1 frame");
        assert!(settings.image_sectors > 0, "an image has at least 1 sector");
        assert!((1..=8).contains(&settings.block_sectors), "a block has 1 to 8 sectors");
        assert!(
            (1..=REGION_PAGES).contains(&u64::from(settings.cluster_pages_max)),
            "a cluster has 1 to {REGION_PAGES} pages"
        );
        let frames = settings.frames;
        Self {
            now: Tick::ZERO,
            shrinks_to: None,
            pending_zeroes: PendingZeroes::new(memory.zero_slots()),
            changed_ranges: ChangedRanges::new(memory.changed_slots()),
            pages: Pages::new(&settings, memory),
            waiters: Waiters::default(),
            store_ops: StoreOps::default(),
            run: MissRun::default(),
            holes: HoleMap::new(settings.holes, settings.image_sectors, frames),
            streams: Streams::new(settings.readahead_pages_max, frames),
            writeback: Writeback::new(settings.dirty_age_us),
            eager: EagerWriteback::default(),
            health: StoreHealth::default(),
            allocating: SpaceAllocations::new(frames),
            throttle: Throttle::new(settings.flush_target_us, settings.dirty_pages_max),
            flushing: FlushState::default(),
            ranges: Ranges::default(),
            freeze: FreezeState::default(),
            resize: Resize::default(),
            stalled: StalledRequests::default(),
            unfilled: Vec::new(),
            notices: Vec::new(),
            stats: Stats::default(),
            settings,
        }
    }

    /// The end of a turn: starts the work that is due, and retries stalled requests.
    ///
    /// => Call it after the turn's completions and requests, before [`PageCache::take_ops`].
    pub fn pump(&mut self, now: Tick) {
        self.advance_clock(now);
        self.end_hold();
        self.retry_allocations();
        self.start_ranges();
        self.write_back();
        self.advance_flushes();
        self.advance_freeze();
        self.advance_resize();
        self.reclaim();
        // After the reclaim: nothing else in this turn frees a frame for them.
        self.retry_unfilled();
        self.continue_windows();
        if self.pages.take_made_room() {
            self.stalled.unblock();
            self.writeback.made_room();
        }
        self.stalled.resume(&mut self.notices);
    }

    /// When [`PageCache::pump`] next has work without a request or a completion; `None` while all pages are clean.
    pub fn next_deadline(&self) -> Option<Tick> {
        if self.stalled.may_resume(self.pages.has_made_room()) {
            return Some(self.now);
        }
        let resize = self.resize.due();
        [resize, self.writeback_deadline()].into_iter().flatten().min()
    }

    /// Whether all completed writes are durable on the store, and no recorded zero is about to complete.
    pub fn is_durable(&self) -> bool {
        self.pages.dirty().dirty_or_writeback_pages() == 0
            && self.flushing.nothing_unsynced()
            && !self.flushing.is_confirming()
            && self.pending_zeroes.is_empty()
    }

    /// Abandons the rest of a stalled request. False: it is no longer stalled, and a [`Notice::Resume`] reports it.
    pub fn withdraw(&mut self, ticket: Ticket) -> bool {
        self.stalled.withdraw(ticket)
    }

    /// Sets the number of devices that use the cache; each gets a fair share of it.
    pub fn share(&mut self, readers: usize) {
        self.pages.share(readers);
    }

    /// A device detaches from the image, and the others share the cache; or a device with this number attaches again.
    pub fn set_reader_present(&mut self, reader: usize, is_present: bool) {
        self.pages.set_reader_present(reader, is_present);
    }

    /// Sets the device that sends the following requests.
    pub fn set_reader(&mut self, reader: usize) {
        self.pages.set_reader(reader);
    }

    /// Number of operations that have not ended.
    pub fn ops_in_flight(&self) -> usize {
        self.store_ops.in_flight()
    }

    /// Number of operations that change the image and have not ended.
    pub fn changes_in_flight(&self) -> u32 {
        self.store_ops.changes()
    }

    /// Takes the pending notices, in order.
    pub fn take_notices(&mut self, into: &mut Vec<Notice>) {
        into.append(&mut self.notices);
    }

    /// Counters, and the present state of the cache.
    pub fn stats(&self) -> Stats {
        Stats {
            frames: u64::from(self.pages.frames().in_use()),
            frames_free: u64::from(self.pages.frames().free()),
            resident_pages: u64::from(self.pages.len()),
            dirty_pages: u64::from(self.pages.dirty().dirty_pages()),
            dirty_limit_pages: u64::from(self.throttle.limit_pages()),
            metadata_bytes: self.metadata_bytes() as u64,
            ..self.stats
        }
    }

    /// Bytes of memory that the cache uses in addition to its frames.
    pub fn metadata_bytes(&self) -> usize {
        self.pages.metadata_bytes()
            + self.holes.metadata_bytes()
            + self.allocating.metadata_bytes()
            + self.flushing.metadata_bytes()
    }

    /// The sectors of `pages` pages starting at `first`, truncated at the end of the image.
    fn span_of(&self, first: PageNo, pages: u64) -> SectorSpan {
        let start = first.0 * SECTORS_PER_PAGE;
        let end = (start + pages * SECTORS_PER_PAGE).min(self.settings.image_sectors);
        SectorSpan::new(start, end - start)
    }

    /// Number of pages of the image. The image may end within the last one.
    fn image_pages(&self) -> u64 {
        self.settings.image_sectors.div_ceil(SECTORS_PER_PAGE)
    }

    /// Number of pages that may be read without a request: those that stay if the image is about to shrink.
    fn readable_pages(&self) -> u64 {
        self.shrinks_to.unwrap_or(self.settings.image_sectors).div_ceil(SECTORS_PER_PAGE)
    }
}
