//! A cache's settings, fixed for its life.

use crate::units::ImageHoles;

/// Replacement policies to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyKind {
    /// S3-FIFO with a correlation window.
    S3Fifo,
    /// Least recently used.
    Lru,
}

/// What becomes of requests that need the store while its writes fail. The pages stay dirty in every case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorPolicy {
    /// They fail: each FLUSH that includes a failed write, and writes that meet the dirty limit.
    Report,
    /// They wait for the store.
    Hold,
    /// All requests fail that memory alone can't serve, and the store gets no more operations, until
    /// [`super::PageCache::resume`].
    Stop,
}

/// A cache's shape and limits.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Number of frames, of 4 KiB.
    pub frames: u32,
    /// Size of the image in sectors.
    pub image_sectors: u64,
    /// The store's block in sectors (1 to 8): offsets and lengths of store operations are multiples of it.
    pub block_sectors: u8,
    /// Whether the image may have holes: then the cache asks for a map before it reads.
    pub holes: ImageHoles,
    /// Longest store operation in pages, at most one region ([`super::REGION_PAGES`]).
    pub cluster_pages_max: u32,
    /// Whether pages stay in memory after use; without it the cache is a bounce buffer (cache mode none).
    pub retain: bool,
    /// The replacement policy.
    pub policy: PolicyKind,
    /// Longest readahead window in pages; 0: no readahead.
    pub readahead_pages_max: u32,
    /// The dirty limit is what the store writes in this time.
    pub flush_target_us: u64,
    /// The dirty limit is never above this.
    pub dirty_pages_max: u32,
    /// Write-back of a page begins before it has been dirty for longer than this.
    pub dirty_age_us: u64,
    /// Whether a hole gets its space before the write that fills it completes.
    pub allocate: bool,
    /// What becomes of requests while writes to the store fail.
    pub on_error: ErrorPolicy,
    /// The same, while they fail because the store has no space.
    pub on_full: ErrorPolicy,
    /// [`ErrorPolicy::Hold`] becomes [`ErrorPolicy::Report`] after this time.
    pub hold_us: u64,
}
