//! The inflight region records which requests a ring has taken and not completed, in memory that outlives the daemon
//! (vhost-user specification, "Inflight I/O tracking", split virtqueues).
//!
//! A ring completes requests out of order, so its used index alone does not show which requests are still in flight.
//! Each descriptor has a flag, set when the chain that begins there is taken and cleared when it has completed, and a
//! counter that records the order in which chains were taken.
//!
//! Publishing the used index and clearing the flags are two steps, between which a daemon can die. So the chains of the
//! batch that is being completed form a list. If the used index is ahead of the recorded one, the batch was published:
//! the next daemon clears its flags.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use vm_memory::{AtomicInteger, MmapRegion, VolatileMemory};

use crate::shared_memory::store;
use crate::sys::regions::Registration;

/// Offsets in a ring's part of the region (QueueRegionSplit).
const VERSION: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
const DESCRIPTORS: usize = 16;
/// Offsets in the state of a descriptor (DescStateSplit), and its length.
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;
const DESCRIPTOR_BYTES: usize = 16;
/// The version of this layout. Version 0 "indicates an uninitialized region".
const LAYOUT_VERSION: u16 = 1;
/// Parts begin at multiples of this, as in libvhost-user.
const PART_ALIGNMENT: usize = 64;

/// Length in bytes of the part of a ring with `size` descriptors.
pub fn ring_bytes(size: u16) -> usize {
    (DESCRIPTORS + usize::from(size) * DESCRIPTOR_BYTES).next_multiple_of(PART_ALIGNMENT)
}

/// One ring's part of the inflight region.
#[derive(Clone, Debug)]
pub struct InflightTracker {
    /// Dropped first: while the region is registered, it is mapped.
    _registration: Option<Arc<Registration>>,
    memory: Arc<MmapRegion>,
    offset: usize,
    size: u16,
    /// The counter of the next chain.
    counter: u64,
    /// Number of chains that are on the used ring and not yet published.
    batch: u16,
}

impl InflightTracker {
    /// The part at `offset` of the region, for a ring with `size` descriptors. The region must be large enough.
    pub fn new(memory: Arc<MmapRegion>, offset: usize, size: u16) -> Self {
        Self { _registration: None, memory, offset, size, counter: 0, batch: 0 }
    }

    /// The same part of a region that stays registered for the handler of SIGBUS as long as a ring uses it.
    pub fn registered(self, registration: Option<Arc<Registration>>) -> Self {
        Self { _registration: registration, ..self }
    }

    /// Whether a ring has used this part before.
    pub fn is_initialized(&self) -> bool {
        self.field::<AtomicU16>(VERSION).load(Ordering::Acquire) != 0
    }

    /// Prepares the part for a ring whose used index is `used`. Returns the heads that are still in flight, in the
    /// order in which they were taken; `None`: no ring has used this part before.
    pub fn recover(&mut self, used: u16) -> Option<Vec<u16>> {
        if !self.is_initialized() {
            (0..self.size).for_each(|head| store(self.inflight(head), 0, Ordering::Relaxed));
            store(self.field::<AtomicU16>(DESC_NUM), self.size, Ordering::Relaxed);
            store(self.field::<AtomicU16>(USED_IDX), used, Ordering::Relaxed);
            store(self.field::<AtomicU16>(VERSION), LAYOUT_VERSION, Ordering::Release);
            return None;
        }
        // The previous daemon may have died after publishing its last batch and before clearing the batch's flags.
        let recorded = self.field::<AtomicU16>(USED_IDX).load(Ordering::Acquire);
        self.clear_in_flight_flags(used.wrapping_sub(recorded), used);
        let mut in_flight: Vec<(u64, u16)> = (0..self.size)
            .filter(|&head| self.inflight(head).load(Ordering::Acquire) != 0)
            .map(|head| (self.counter_of(head).load(Ordering::Relaxed), head))
            .collect();
        in_flight.sort_unstable();
        self.counter = in_flight.last().map_or(0, |&(counter, _)| counter.wrapping_add(1));
        Some(in_flight.into_iter().map(|(_, head)| head).collect())
    }

    /// Records that the chain at `head` was taken.
    pub fn take(&mut self, head: u16) {
        if head < self.size {
            store(self.counter_of(head), self.counter, Ordering::Relaxed);
            store(self.inflight(head), 1, Ordering::Release);
            self.counter = self.counter.wrapping_add(1);
        }
    }

    /// Records that the chain at `head` was returned to the driver.
    pub fn return_head(&mut self, head: u16) {
        if head < self.size {
            store(self.inflight(head), 0, Ordering::Release);
        }
    }

    /// Records that the chain at `head` is on the used ring, which is not yet published.
    ///
    /// => Call [`InflightTracker::end_completion`] when it is published.
    pub fn begin_completion(&mut self, head: u16) {
        if head < self.size {
            let last = self.field::<AtomicU16>(LAST_BATCH_HEAD);
            store(self.next(head), last.load(Ordering::Relaxed), Ordering::Relaxed);
            store(last, head, Ordering::Release);
            self.batch += 1;
        }
    }

    /// Records that the used index was published as `used`, and with it the chains of the batch.
    pub fn end_completion(&mut self, used: u16) {
        let batch = std::mem::take(&mut self.batch);
        self.clear_in_flight_flags(batch, used);
    }

    /// Clears the flags of the last `count` chains that were pushed onto the used ring, whose index is `used`.
    ///
    /// => The front-end can write to the region, so the list may contain a loop: at most `size` entries are followed.
    fn clear_in_flight_flags(&self, count: u16, used: u16) {
        let mut head = self.field::<AtomicU16>(LAST_BATCH_HEAD).load(Ordering::Acquire);
        for _ in 0..count.min(self.size) {
            if head >= self.size {
                break;
            }
            store(self.inflight(head), 0, Ordering::Release);
            head = self.next(head).load(Ordering::Relaxed);
        }
        store(self.field::<AtomicU16>(USED_IDX), used, Ordering::Release);
    }

    /// Whether the chain at `head` is in flight: 1 or 0.
    fn inflight(&self, head: u16) -> &AtomicU8 {
        self.field(DESCRIPTORS + usize::from(head) * DESCRIPTOR_BYTES + INFLIGHT)
    }

    /// The head that was pushed onto the used ring before `head`.
    fn next(&self, head: u16) -> &AtomicU16 {
        self.field(DESCRIPTORS + usize::from(head) * DESCRIPTOR_BYTES + NEXT)
    }

    fn counter_of(&self, head: u16) -> &AtomicU64 {
        self.field(DESCRIPTORS + usize::from(head) * DESCRIPTOR_BYTES + COUNTER)
    }

    fn field<T: AtomicInteger>(&self, at: usize) -> &T {
        self.memory.get_atomic_ref(self.offset + at).expect("a ring's part is in the region and aligned")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn track(memory: &Arc<MmapRegion>) -> InflightTracker {
        InflightTracker::new(Arc::clone(memory), ring_bytes(8), 8)
    }

    #[test]
    fn heads_in_flight_are_found_in_the_order_in_which_they_were_taken() {
        let memory = Arc::new(MmapRegion::new(2 * ring_bytes(8)).unwrap());
        let mut first = track(&memory);
        assert_eq!(first.recover(40), None);
        [5, 1, 7, 2].into_iter().for_each(|head| first.take(head));
        first.begin_completion(1);
        first.end_completion(41);
        let mut second = track(&memory);
        assert_eq!(second.recover(41).unwrap(), [5, 7, 2]);
        second.take(0);
        assert_eq!(track(&memory).recover(41).unwrap(), [5, 7, 2, 0], "a head taken later comes later");
    }

    #[test]
    fn each_chain_is_on_the_used_ring_or_in_flight_after_a_crash() {
        let memory = Arc::new(MmapRegion::new(2 * ring_bytes(8)).unwrap());
        let mut first = track(&memory);
        first.recover(0);
        [3, 4, 6, 1].into_iter().for_each(|head| first.take(head));
        first.begin_completion(4);
        first.end_completion(1);
        first.begin_completion(6);
        first.begin_completion(3);
        assert_eq!(track(&memory).recover(1).unwrap(), [3, 6, 1], "died before the batch was published");
        assert_eq!(track(&memory).recover(3).unwrap(), [1], "died after the batch was published");
        assert_eq!(track(&memory).recover(3).unwrap(), [1], "recovering twice changes nothing");
    }

    #[test]
    fn a_list_with_a_loop_ends() {
        let memory = Arc::new(MmapRegion::new(2 * ring_bytes(8)).unwrap());
        let mut first = track(&memory);
        first.recover(0);
        first.take(2);
        first.begin_completion(2);
        first.next(2).store(2, Ordering::Relaxed);
        assert!(track(&memory).recover(60_000).unwrap().is_empty());
    }

    #[test]
    fn heads_beyond_the_descriptor_table_are_ignored() {
        let memory = Arc::new(MmapRegion::new(2 * ring_bytes(8)).unwrap());
        let mut first = track(&memory);
        first.recover(0);
        first.take(8);
        first.begin_completion(u16::MAX);
        assert!(track(&memory).recover(9).unwrap().is_empty());
    }
}
