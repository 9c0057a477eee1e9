//! Statistics of a cache, for logs and tests.

/// Counters since the cache was created, and, as returned by [`super::PageCache::stats`], its current state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Pages read that were in memory.
    pub read_hit_pages: u64,
    /// Pages read that had to be read in first.
    pub read_miss_pages: u64,
    /// Pages read that are holes.
    pub read_hole_pages: u64,
    /// Pages written by guests.
    pub write_pages: u64,
    /// How often a guest wrote a page under write-back, so that the page was copied to another frame.
    pub copied_on_write: u64,
    /// Store operations of any kind that have ended.
    pub completed_ops: u64,
    /// Reads submitted to the store.
    pub store_reads: u64,
    /// Sectors of those reads.
    pub store_read_sectors: u64,
    /// Writes submitted to the store: clusters of pages.
    pub store_writes: u64,
    /// Sectors of those writes.
    pub store_written_sectors: u64,
    /// Syncs submitted to the store.
    pub syncs: u64,
    /// Allocations of space ahead of a write submitted to the store.
    pub allocations: u64,
    /// Extent maps requested from the store.
    pub maps: u64,
    /// FLUSH requests of guests.
    pub flushes: u64,
    /// Zeros and discards submitted to the store.
    pub range_operations: u64,
    /// Pages read in by readahead.
    pub readahead_pages: u64,
    /// Of those, pages that a guest then read.
    pub readahead_used_pages: u64,
    /// Of those, pages that were dropped or overwritten unread.
    pub readahead_wasted_pages: u64,
    /// Pages evicted.
    pub evicted_pages: u64,
    /// How often a request could not be admitted whole.
    pub stalls: u64,
    /// How often a write stalled at the dirty limit.
    pub throttled: u64,
    /// Pages that could not be read in.
    pub read_errors: u64,
    /// Writes to the store that failed.
    pub write_errors: u64,
    /// Syncs that failed.
    pub sync_errors: u64,
    /// Frames of the cache.
    pub frames: u64,
    /// Frames that are free.
    pub frames_free: u64,
    /// Pages in memory.
    pub resident_pages: u64,
    /// Pages newer than the store.
    pub dirty_pages: u64,
    /// The current limit of dirty pages.
    pub dirty_limit_pages: u64,
    /// Bytes of memory that the cache uses in addition to its frames.
    pub metadata_bytes: u64,
}

impl Stats {
    /// Number of statistics.
    pub const COUNT: usize = 30;
    /// Of these, the first ones are counters, which only grow; the others describe the current state.
    pub const COUNTERS: usize = 24;

    /// The statistics, in the order of the fields.
    pub fn to_array(mut self) -> [u64; Self::COUNT] {
        self.numbers().map(|number| *number)
    }

    /// The statistics of [`Stats::to_array`].
    pub fn from_array(numbers: [u64; Self::COUNT]) -> Self {
        let mut stats = Self::default();
        stats.numbers().into_iter().zip(numbers).for_each(|(number, value)| *number = value);
        stats
    }

    fn numbers(&mut self) -> [&mut u64; Self::COUNT] {
        let Self {
            read_hit_pages,
            read_miss_pages,
            read_hole_pages,
            write_pages,
            copied_on_write,
            completed_ops,
            store_reads,
            store_read_sectors,
            store_writes,
            store_written_sectors,
            syncs,
            allocations,
            maps,
            flushes,
            range_operations,
            readahead_pages,
            readahead_used_pages,
            readahead_wasted_pages,
            evicted_pages,
            stalls,
            throttled,
            read_errors,
            write_errors,
            sync_errors,
            frames,
            frames_free,
            resident_pages,
            dirty_pages,
            dirty_limit_pages,
            metadata_bytes,
        } = self;
        [
            read_hit_pages,
            read_miss_pages,
            read_hole_pages,
            write_pages,
            copied_on_write,
            completed_ops,
            store_reads,
            store_read_sectors,
            store_writes,
            store_written_sectors,
            syncs,
            allocations,
            maps,
            flushes,
            range_operations,
            readahead_pages,
            readahead_used_pages,
            readahead_wasted_pages,
            evicted_pages,
            stalls,
            throttled,
            read_errors,
            write_errors,
            sync_errors,
            frames,
            frames_free,
            resident_pages,
            dirty_pages,
            dirty_limit_pages,
            metadata_bytes,
        ]
    }
}
