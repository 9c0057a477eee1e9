//! What a ring has taken and not yet answered, in memory that outlives the daemon (vhost-user specification, "Inflight
//! I/O tracking", split virtqueues).
//!
//! A ring answers out of order, so its used index alone does not tell a successor which requests are still owed. For each
//! descriptor there is a mark, set when the chain that begins there is taken and cleared when it has been answered, and
//! a counter that keeps the order in which chains were taken. A list of the last batch of answers closes the gap between
//! the used ring and the marks: a daemon that dies between the two has answered those chains, mark or no mark.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use vm_memory::{AtomicInteger, MmapRegion, VolatileMemory};

/// Offsets within a ring's part (QueueRegionSplit).
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const DESCRIPTORS: usize = 16;
/// Offsets within a descriptor's state (DescStateSplit), and its length.
const MARK: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;
const DESCRIPTOR_BYTES: usize = 16;
/// The layout's version.
const LAYOUT: u16 = 1;
/// Parts are laid out at multiples of this, as the front-ends' own library does.
const PART_ALIGNMENT: usize = 64;

/// Bytes of the part of a ring with `size` descriptors.
pub fn ring_bytes(size: u16) -> usize {
    (DESCRIPTORS + usize::from(size) * DESCRIPTOR_BYTES).next_multiple_of(PART_ALIGNMENT)
}

/// One ring's part of the inflight region.
#[derive(Clone, Debug)]
pub struct InflightTracker {
    memory: Arc<MmapRegion>,
    offset: usize,
    size: u16,
    counter: u64,
    /// Chains on the used ring that the guest was not shown yet.
    batch: u16,
}

impl InflightTracker {
    /// The part at `offset` of the region, for a ring with `size` descriptors; the region is long enough.
    pub fn new(memory: Arc<MmapRegion>, offset: usize, size: u16) -> Self {
        Self { memory, offset, size, counter: 0, batch: 0 }
    }

    /// Whether a ring has kept its marks here before (version 0 "indicates an uninitialized region").
    pub fn is_kept(&self) -> bool {
        self.field::<AtomicU16>(VERSION).load(Ordering::Acquire) != 0
    }

    /// Makes the part right for a ring whose used index is `used`: what is still owed, in the order in which it was taken.
    /// `None`: no ring has kept its marks here before.
    pub fn recover(&mut self, used: u16) -> Option<Vec<u16>> {
        if !self.is_kept() {
            (0..self.size).for_each(|head| self.mark(head).store(0, Ordering::Relaxed));
            self.field::<AtomicU16>(DESC_NUM).store(self.size, Ordering::Relaxed);
            self.field::<AtomicU16>(USED_IDX).store(used, Ordering::Relaxed);
            self.field::<AtomicU16>(VERSION).store(LAYOUT, Ordering::Release);
            return None;
        }
        // What a predecessor put on the used ring last may still bear its marks.
        let known = self.field::<AtomicU16>(USED_IDX).load(Ordering::Acquire);
        self.settle_batch(used.wrapping_sub(known), used);
        let mut owed: Vec<(u64, u16)> = (0..self.size)
            .filter(|&head| self.mark(head).load(Ordering::Acquire) != 0)
            .map(|head| (self.taken_as(head).load(Ordering::Relaxed), head))
            .collect();
        owed.sort_unstable();
        self.counter = owed.last().map_or(0, |&(counter, _)| counter.wrapping_add(1));
        Some(owed.into_iter().map(|(_, head)| head).collect())
    }

    /// The chain at `head` was taken: from now on it is owed.
    pub fn taken(&mut self, head: u16) {
        if head < self.size {
            self.taken_as(head).store(self.counter, Ordering::Relaxed);
            self.mark(head).store(1, Ordering::Release);
            self.counter = self.counter.wrapping_add(1);
        }
    }

    /// The chain at `head` is on the used ring; the guest will see it with the next [`InflightTracker::answered`].
    pub fn begin_completion(&mut self, head: u16) {
        if head < self.size {
            let last = self.field::<AtomicU16>(LAST_BATCH_HEAD);
            self.next(head).store(last.load(Ordering::Relaxed), Ordering::Relaxed);
            last.store(head, Ordering::Release);
            self.batch += 1;
        }
    }

    /// The guest was shown all of them: the used ring's index is now `used`.
    pub fn end_completion(&mut self, used: u16) {
        let batch = std::mem::take(&mut self.batch);
        self.settle_batch(batch, used);
    }

    /// Takes the marks off the last `count` chains that were put on the used ring, whose index is `used`.
    ///
    /// => The front-end can write to the region: the list is followed no further than it can be long.
    fn settle_batch(&self, count: u16, used: u16) {
        let mut head = self.field::<AtomicU16>(LAST_BATCH_HEAD).load(Ordering::Acquire);
        for _ in 0..count.min(self.size) {
            if head >= self.size {
                break;
            }
            self.mark(head).store(0, Ordering::Release);
            head = self.next(head).load(Ordering::Relaxed);
        }
        self.field::<AtomicU16>(USED_IDX).store(used, Ordering::Release);
    }

    fn mark(&self, head: u16) -> &AtomicU8 {
        self.field(DESCRIPTORS + usize::from(head) * DESCRIPTOR_BYTES + MARK)
    }

    /// The chain that was put on the used ring before the one at `head`.
    fn next(&self, head: u16) -> &AtomicU16 {
        self.field(DESCRIPTORS + usize::from(head) * DESCRIPTOR_BYTES + NEXT)
    }

    fn taken_as(&self, head: u16) -> &AtomicU64 {
        self.field(DESCRIPTORS + usize::from(head) * DESCRIPTOR_BYTES + COUNTER)
    }

    fn field<T: AtomicInteger>(&self, at: usize) -> &T {
        self.memory.get_atomic_ref(self.offset + at).expect("a ring's part lies in its region, aligned")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn track(memory: &Arc<MmapRegion>) -> InflightTracker {
        InflightTracker::new(Arc::clone(memory), ring_bytes(8), 8)
    }

    #[test]
    fn what_is_owed_is_found_in_the_order_in_which_it_was_taken() {
        let memory = Arc::new(MmapRegion::new(2 * ring_bytes(8)).unwrap());
        let mut first = track(&memory);
        assert_eq!(first.recover(40), None);
        [5, 1, 7, 2].into_iter().for_each(|head| first.taken(head));
        first.begin_completion(1);
        first.end_completion(41);
        let mut second = track(&memory);
        assert_eq!(second.recover(41).unwrap(), [5, 7, 2]);
        second.taken(0);
        assert_eq!(track(&memory).recover(41).unwrap(), [5, 7, 2, 0], "what is taken later comes later");
    }

    #[test]
    fn answers_that_were_cut_off_are_on_the_used_ring_or_they_are_owed() {
        let memory = Arc::new(MmapRegion::new(2 * ring_bytes(8)).unwrap());
        let mut first = track(&memory);
        first.recover(0);
        [3, 4, 6, 1].into_iter().for_each(|head| first.taken(head));
        first.begin_completion(4);
        first.end_completion(1);
        first.begin_completion(6);
        first.begin_completion(3);
        assert_eq!(track(&memory).recover(1).unwrap(), [3, 6, 1], "died before the used ring had them");
        assert_eq!(track(&memory).recover(3).unwrap(), [1], "died after the used ring had them");
        assert_eq!(track(&memory).recover(3).unwrap(), [1], "and that is known from now on");
    }

    #[test]
    fn a_list_that_somebody_bent_into_a_loop_ends() {
        let memory = Arc::new(MmapRegion::new(2 * ring_bytes(8)).unwrap());
        let mut first = track(&memory);
        first.recover(0);
        first.taken(2);
        first.begin_completion(2);
        first.next(2).store(2, Ordering::Relaxed);
        assert!(track(&memory).recover(60_000).unwrap().is_empty());
    }

    #[test]
    fn a_head_or_an_index_that_is_no_descriptor_harms_nothing() {
        let memory = Arc::new(MmapRegion::new(2 * ring_bytes(8)).unwrap());
        let mut first = track(&memory);
        first.recover(0);
        first.taken(8);
        first.begin_completion(u16::MAX);
        assert!(track(&memory).recover(9).unwrap().is_empty());
    }
}
