//! Bounds the work of a turn, and the work that a worker has in progress, whatever guests send.
//!
//! A legal request can span 4 GiB in 1024 buffers, and a ring can hold a thousand of them. So a request is admitted to
//! the cache in *windows* of pages, a turn ends when its budget is spent, and a ring from which enough was taken waits.
//! No request fails for that: the rest of the work is done in a later turn, round robin.
//!
//! The bounds are in pages of data. Other work counts as the pages that take as long to copy.

use crate::units::{PAGE_BYTES, SECTORS_PER_PAGE};

/// The pages that can be copied in the time that it takes to parse a chain, without its buffers.
const PAGES_PER_CHAIN: u64 = 1;
/// The buffers of a chain that can be parsed in the time that it takes to copy a page.
const BUFFERS_PER_PAGE: u32 = 32;
/// The cost in pages of a part of a DISCARD or WRITE ZEROES: the cache looks up its pages, and the store is busy for
/// longer.
pub(super) const PAGES_PER_RANGE_PART: u64 = 64;
/// Most parts of one DISCARD or WRITE ZEROES that are admitted at a time: as many as the cache has in progress.
pub(super) const RANGE_PARTS_MAX: u64 = 4;
/// Most requests that a worker has in progress.
pub(super) const REQUESTS_MAX: usize = 4096;
/// Most buffers (of 16 bytes) of all requests that a worker has in progress, not counting the last request.
pub(super) const BUFFERS_MAX: usize = 1 << 17;
/// Buffers for which completed requests keep memory, so that the next ones allocate none.
pub(super) const BUFFERS_KEPT_MAX: usize = 1 << 16;

/// The bounds of a worker.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// New work in a turn. 4 MiB: a millisecond of copying, or a few into memory that the guest has never used.
    pub turn_pages: u64,
    /// Most pages of one request that are admitted and not yet copied, at least 1. With 1 MiB, a read of a slow image
    /// has at least one operation of the largest size in flight.
    pub window_pages: u64,
    /// Most pages of all requests that are admitted and not yet copied. 32 MiB: more than the store has in flight at
    /// full speed, and a few MiB of waiters, pieces and store operations.
    pub worker_pages: u64,
    /// The same for each worker of a device that shares its image with others: the operations that one has in flight
    /// delay the others at the disk. 4 MiB keep a disk busy.
    pub shared_pages: u64,
    /// A ring waits while the requests taken from it have more pages than its share of this
    /// (`ring_share`). So rings that are to stop have little left to complete.
    pub ring_pages: u64,
    /// A longer read or write is *long*: while one is in progress, nothing else is taken from its ring, and it is
    /// returned to the driver if the ring stops. 4 MiB: drivers send no more, because their systems limit requests to
    /// that or less.
    pub long_pages: u64,
    /// Zeroing this many pages counts as reading or writing one, and a WRITE ZEROES can be *long* too. 4: zeroing 16
    /// MiB, the most that a driver puts into a segment, is not long, and a ring has 128 MiB of zeros to complete when
    /// it stops. A disk without a command for zeros writes them all.
    pub zeroed_pages_per_page: u64,
    /// Most pages of a part of a DISCARD or WRITE ZEROES, unless a discard frees larger units only. The parts that the
    /// store has begun end before a ring stops. 32 MiB: a file system frees that much in some 25 ms even if each page
    /// is an extent of its own, and one operation for each 32 MiB costs little.
    pub range_part_pages: u64,
}

impl Default for Budget {
    fn default() -> Self {
        const MIB: u64 = (1 << 20) / PAGE_BYTES;
        Self {
            turn_pages: 4 * MIB,
            window_pages: MIB,
            worker_pages: 32 * MIB,
            shared_pages: 4 * MIB,
            ring_pages: 32 * MIB,
            long_pages: 4 * MIB,
            zeroed_pages_per_page: 4,
            range_part_pages: 32 * MIB,
        }
    }
}

impl Budget {
    /// The cost to a turn's budget of taking a request with this many pages and buffers, and of admitting its first
    /// window.
    pub(super) fn cost_of_taking(&self, pages: u64, buffers: u32) -> u64 {
        PAGES_PER_CHAIN + u64::from(buffers / BUFFERS_PER_PAGE) + pages.min(self.window_pages)
    }

    /// The load of a request, which counts against [`Budget::ring_pages`].
    pub(super) fn load_of(&self, pages: u64) -> u64 {
        if self.is_long(pages) { pages.max(self.ring_pages) } else { pages }
    }

    /// The share of a ring when this many rings of the worker have requests in progress. All of them together have
    /// little left to complete: the more there are, the less each has, but at least a window.
    pub(super) fn ring_share(&self, rings: usize) -> u64 {
        (self.ring_pages / rings.max(1) as u64).max(self.window_pages)
    }

    /// Whether a read or write of this many pages is long.
    pub fn is_long(&self, pages: u64) -> bool {
        pages > self.long_pages
    }

    /// The pages of data that count for a WRITE ZEROES of this many pages.
    pub fn pages_for_zeroes(&self, pages: u64) -> u64 {
        pages / self.zeroed_pages_per_page
    }

    /// Sectors of a part of a DISCARD or WRITE ZEROES on a disk whose discards free units of `unit` sectors.
    pub(super) fn range_part_sectors(&self, unit: u64) -> u64 {
        let sectors = self.range_part_pages * SECTORS_PER_PAGE;
        (sectors / unit * unit).max(unit)
    }

    /// The sector up to which a read or write is admitted, if it starts at sector `start` of the image, has `total`
    /// sectors, and `settled` of them are done.
    pub(super) fn window_end(&self, start: u64, total: u64, settled: u64) -> u64 {
        // A window ends at the end of a page: otherwise the cache would have to look up a page twice.
        let end = start.saturating_add(settled).saturating_add(self.window_pages * SECTORS_PER_PAGE);
        let end = end - end % SECTORS_PER_PAGE;
        end.saturating_sub(start).min(total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_share_the_budget_with_at_least_a_window_each() {
        let budget = Budget::default();
        let shares = [0, 1, 4, 16, 256].map(|rings| (budget.ring_share(rings) * PAGE_BYTES) >> 20);
        assert_eq!(shares, [32, 32, 8, 2, 1]);
    }

    #[test]
    fn a_window_ends_at_a_page_boundary_or_with_its_request() {
        let budget = Budget { window_pages: 2, ..Budget::default() };
        for (start, total, settled, end) in
            [(0, 100, 0, 16), (3, 100, 0, 13), (3, 100, 13, 29), (0, 5, 0, 5), (7, 9, 8, 9)]
        {
            assert_eq!(budget.window_end(start, total, settled), end, "{start} {total} {settled}");
        }
    }

    #[test]
    fn parts_of_a_discard_are_whole_units_of_the_disk() {
        let budget = Budget::default();
        let sectors = budget.range_part_pages * SECTORS_PER_PAGE;
        assert_eq!(budget.range_part_sectors(1), sectors);
        for unit in [8, 3000, 30_720, sectors - 1] {
            let part = budget.range_part_sectors(unit);
            assert!(part.is_multiple_of(unit) && part <= sectors && part > sectors - unit, "{unit}: {part}");
        }
        assert_eq!(budget.range_part_sectors(3 * sectors), 3 * sectors);
    }
}
