//! The settings of a cache. Those of [`PageCache::reconfigure`] may change while it is used; the others are fixed for
//! its lifetime.

use crate::units::ImageHoles;

use super::PageCache;

/// Replacement policies to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyKind {
    /// S3-FIFO with a correlation window.
    S3Fifo,
    /// Least recently used.
    Lru,
}

/// What happens to requests that need the store while its writes fail. The pages stay dirty in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorPolicy {
    /// They fail: each FLUSH that covers a failed write, and writes at the dirty limit.
    Report,
    /// They wait until the store recovers, but no longer than [`Settings::hold_us`].
    Hold,
    /// All requests except reads of cached pages fail, and the store gets no more operations, until
    /// [`super::PageCache::resume`].
    Stop,
}

/// The size and the limits of a cache.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Number of frames, of 4 KiB.
    pub frames: u32,
    /// The largest number of frames that the cache may later have; at least `frames`.
    pub frames_max: u32,
    /// Size of the image in sectors.
    pub image_sectors: u64,
    /// The store's block size in sectors (1 to 8): offsets and lengths of store operations are multiples of it.
    pub block_sectors: u8,
    /// Whether the image may have holes: then the cache requests a map before it reads.
    pub holes: ImageHoles,
    /// Longest store operation in pages, at most one region ([`super::REGION_PAGES`]).
    pub cluster_pages_max: u32,
    /// Whether pages stay in memory after use. If not, the cache is a bounce buffer (cache mode "none").
    pub retain: bool,
    /// The replacement policy.
    pub policy: PolicyKind,
    /// Longest readahead window in pages; 0: no readahead.
    pub readahead_pages_max: u32,
    /// The dirty limit is the amount that the store writes in this time, in microseconds.
    pub flush_target_us: u64,
    /// Upper bound of the dirty limit.
    pub dirty_pages_max: u32,
    /// Write-back of a page begins before it has been dirty for this long, in microseconds.
    pub dirty_age_us: u64,
    /// Whether a hole is allocated on the store before the write that fills it completes.
    pub allocate: bool,
    /// Whether discards and zeros that may unmap free space on the store. If not, a discard does nothing, and a zero
    /// keeps the space.
    pub unmap: bool,
    /// What happens to requests while writes to the store fail.
    pub on_error: ErrorPolicy,
    /// The same, while they fail for lack of space on the store.
    pub on_full: ErrorPolicy,
    /// Random, so that a guest cannot choose pages that are found slowly (in the simulators: from the seed).
    pub page_key: u64,
    /// [`ErrorPolicy::Hold`] turns into [`ErrorPolicy::Report`] after this time, in microseconds.
    pub hold_us: u64,
}

impl Settings {
    /// For tests and benchmarks: the default limits of a device, for an image without holes.
    pub fn of(frames: u32, image_sectors: u64) -> Self {
        Self {
            frames,
            frames_max: frames,
            image_sectors,
            block_sectors: 1,
            holes: ImageHoles::NoneYet,
            cluster_pages_max: 256,
            retain: true,
            policy: PolicyKind::S3Fifo,
            readahead_pages_max: 512,
            dirty_pages_max: frames / 4,
            flush_target_us: 250_000,
            dirty_age_us: 5_000_000,
            allocate: false,
            unmap: true,
            on_error: ErrorPolicy::Report,
            on_full: ErrorPolicy::Report,
            page_key: 0,
            hold_us: 0,
        }
    }
}

impl PageCache {
    /// Applies those settings of `new` that may change while the cache is used: its size, and the settings of
    /// readahead, write-back and failures.
    ///
    /// => The memory of that many frames is allocated.
    pub fn reconfigure(&mut self, new: &Settings) {
        let now = self.now;
        let old = &mut self.settings;
        let changes_failures = (old.on_error, old.on_full, old.hold_us) != (new.on_error, new.on_full, new.hold_us);
        let ages_sooner = new.dirty_age_us < old.dirty_age_us;
        old.readahead_pages_max = new.readahead_pages_max;
        old.flush_target_us = new.flush_target_us;
        old.dirty_pages_max = new.dirty_pages_max;
        old.dirty_age_us = new.dirty_age_us;
        (old.allocate, old.unmap) = (new.allocate, new.unmap);
        (old.on_error, old.on_full, old.hold_us) = (new.on_error, new.on_full, new.hold_us);
        self.streams.set_window_max(new.readahead_pages_max, new.frames);
        self.throttle.reconfigure(new.flush_target_us, new.dirty_pages_max);
        if new.frames != self.settings.frames {
            self.set_frames(new.frames);
        }
        if ages_sooner {
            self.writeback.start_aging(now, new.dirty_age_us);
        }
        // Apply the new policy to the present failure. A stopped store stays stopped until the operator resumes it.
        if changes_failures && self.health.stopped().is_none() {
            self.resume();
        }
        self.stalled.unblock();
        self.writeback.reset_progress();
    }
}
