//! Finds the mapped memory that an address belongs to, for the handler of SIGBUS, which may not lock, allocate or read
//! /proc.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Memory whose file other processes can truncate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TruncatableMemory {
    /// The cache.
    Cache,
    /// An inflight region.
    Inflight,
}

/// Number of ranges of a kind that are recorded. A device has one range of each kind; the oldest entry is overwritten.
const SLOTS: usize = 256;

struct RangeTable {
    next: AtomicUsize,
    ranges: [(AtomicUsize, AtomicUsize); SLOTS],
}

impl RangeTable {
    const fn new() -> Self {
        Self { next: AtomicUsize::new(0), ranges: [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; SLOTS] }
    }

    fn register(&self, range: &Range<usize>) {
        let slot = self.next.fetch_add(1, Ordering::Relaxed) % SLOTS;
        let (start, end) = &self.ranges[slot];
        // The slot is empty meanwhile.
        end.store(0, Ordering::Release);
        start.store(range.start, Ordering::Release);
        end.store(range.end, Ordering::Release);
    }

    fn contains(&self, address: usize) -> bool {
        let load =
            |(start, end): &(AtomicUsize, AtomicUsize)| start.load(Ordering::Acquire)..end.load(Ordering::Acquire);
        self.ranges.iter().any(|slot| load(slot).contains(&address))
    }
}

static CACHE: RangeTable = RangeTable::new();
static INFLIGHT: RangeTable = RangeTable::new();

/// Records where memory of this kind is mapped.
pub fn register(region: TruncatableMemory, range: &Range<usize>) {
    match region {
        TruncatableMemory::Cache => CACHE.register(range),
        TruncatableMemory::Inflight => INFLIGHT.register(range),
    }
}

/// The kind of memory that an address belongs to, if that was recorded.
pub fn kind_of(address: usize) -> Option<TruncatableMemory> {
    if CACHE.contains(address) {
        return Some(TruncatableMemory::Cache);
    }
    INFLIGHT.contains(address).then_some(TruncatableMemory::Inflight)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_attributed_to_its_registered_range() {
        // Addresses that no mapping has.
        register(TruncatableMemory::Cache, &(16..32));
        register(TruncatableMemory::Inflight, &(32..40));
        assert_eq!(
            (kind_of(15), kind_of(16), kind_of(32), kind_of(40)),
            (None, Some(TruncatableMemory::Cache), Some(TruncatableMemory::Inflight), None)
        );
    }
}
