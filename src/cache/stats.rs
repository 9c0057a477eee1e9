//! What the cache did and holds, for logs and tests.

/// Counters since the cache was made, and (in [`super::PageCache::stats`]) its present state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Pages read that were in memory.
    pub read_hit_pages: u64,
    /// Pages read that had to be waited for.
    pub read_miss_pages: u64,
    /// Pages read that are holes.
    pub read_hole_pages: u64,
    /// Pages written by guests.
    pub write_pages: u64,
    /// Writes that found the page's frame on its way to the store.
    pub copied_on_write: u64,
    /// Reads sent to the store.
    pub store_reads: u64,
    /// Sectors of those.
    pub store_read_sectors: u64,
    /// Clusters sent to the store.
    pub store_writes: u64,
    /// Sectors of those.
    pub store_written_sectors: u64,
    /// Syncs sent to the store.
    pub syncs: u64,
    /// Times that the store was asked for space ahead of a write.
    pub allocations: u64,
    /// Extent maps asked for.
    pub maps: u64,
    /// Flushes asked for.
    pub flushes: u64,
    /// Zero and discard operations sent to the store.
    pub range_operations: u64,
    /// Pages brought in by readahead.
    pub readahead_pages: u64,
    /// Of those, pages that were then asked for.
    pub readahead_used_pages: u64,
    /// Of those, pages that went unread.
    pub readahead_wasted_pages: u64,
    /// Pages evicted.
    pub evicted_pages: u64,
    /// Times a request could not be admitted whole.
    pub stalls: u64,
    /// Times a write met the dirty limit.
    pub throttled: u64,
    /// Pages that could not be read in.
    pub read_errors: u64,
    /// Clusters that could not be written.
    pub write_errors: u64,
    /// Syncs that failed.
    pub sync_errors: u64,
    /// Frames of the cache.
    pub frames: u64,
    /// Frames that hold nothing.
    pub frames_free: u64,
    /// Pages in memory.
    pub resident_pages: u64,
    /// Pages newer than the store.
    pub dirty_pages: u64,
    /// The present limit of dirty pages.
    pub dirty_limit_pages: u64,
    /// Bytes of memory beside the frames.
    pub metadata_bytes: u64,
}
