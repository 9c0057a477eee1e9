//! The split virtqueue (virtio 1.2, section 2.7): heads are taken from the available ring, elements are pushed onto the
//! used ring, and each side controls whether the other notifies it.
//!
//! The rings are looked up in the guest's regions once, when the queue starts or the memory changes; from then on they
//! are host addresses with a known length. virtio-queue, by contrast, looks up every word each time, and publishes
//! every used element separately: a guest that polls the used index loses its cache line once per request.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use virtio_bindings::virtio_ring::VRING_USED_F_NO_NOTIFY;
use vm_memory::GuestAddress;

use crate::shared_memory::store;
use crate::virtio::GuestRam;
use crate::virtio::notification::{self, RingWord};

#[cfg(test)]
mod tests;

// struct virtq_avail: le16 flags, le16 idx, le16 ring[size], le16 used_event. struct virtq_used: le16 flags, le16 idx,
// ring[size] of { le32 id, le32 len }, le16 avail_event.
/// Offsets in either ring.
const FLAGS: usize = 0;
const IDX: usize = 2;
const RING: usize = 4;
/// Length of an entry of the available ring, of one of the used ring, and of the event index after either.
const HEAD_BYTES: usize = 2;
const ELEMENT_BYTES: usize = 8;
const EVENT_BYTES: usize = 2;
/// Alignment of the queue's parts (section 2.7).
const TABLE_ALIGNMENT: u64 = 16;
const AVAIL_ALIGNMENT: usize = 2;
const USED_ALIGNMENT: usize = 4;
const DESCRIPTOR_BYTES: usize = 16;
/// How often an impossible available index is read again, some microseconds in all. A driver that does not store it in
/// one access, such as one in a scripting language, exposes a wrong value for nanoseconds, and a polling worker can
/// read it.
///
/// => The number is per queue, not per read: a driver that always exposes wrong indices does not delay the worker. Each
///    valid index restores one reread.
const INDEX_REREADS: u32 = 500;

/// The location of a queue in guest memory, and its negotiated features. Addresses are guest-physical.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLayout {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// Address of the descriptor table.
    pub desc_table: u64,
    /// Address of the available ring.
    pub avail_ring: u64,
    /// Address of the used ring.
    pub used_ring: u64,
    /// Whether VIRTIO_RING_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
}

/// The device's position in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePosition {
    /// Index of the next available entry to take; wraps at 65536.
    pub next_avail: u16,
    /// Index of the next used element to fill; wraps at 65536.
    pub next_used: u16,
}

/// The driver has made more heads available than the queue has descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overrun;

impl fmt::Display for Overrun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("more heads are available than the queue has descriptors")
    }
}

impl std::error::Error for Overrun {}

/// The device's side of a split virtqueue.
#[derive(Debug)]
pub struct SplitQueue {
    layout: QueueLayout,
    rings: Rings,
    next: QueuePosition,
    /// The used index that is visible to the driver.
    published: u16,
    /// How often an impossible index may be read again.
    rereads_left: u32,
}

impl SplitQueue {
    /// A queue that continues at `next`. `None` if its size is not a power of two, a part is misaligned or not in guest
    /// memory, or two parts overlap.
    ///
    /// => Each ring must be in one region of guest memory, as for every device that looks it up once. The descriptor
    ///    table may cross regions: see [`DescriptorTable`](super::chain::DescriptorTable).
    pub fn new(memory: &Arc<GuestRam>, layout: QueueLayout, next: QueuePosition) -> Option<Self> {
        let rings = Rings::find(memory, &layout)?;
        Some(Self { layout, rings, next, published: next.next_used, rereads_left: INDEX_REREADS })
    }

    /// The device's position.
    pub fn position(&self) -> QueuePosition {
        self.next
    }

    /// Continues at `next`, with everything before it published.
    pub fn set_position(&mut self, next: QueuePosition) {
        (self.next, self.published) = (next, next.next_used);
    }

    /// The used index in guest memory, which the previous daemon may have published.
    pub fn used_idx(&self) -> u16 {
        u16::from_le(self.rings.used.le16(IDX).load(Ordering::Acquire))
    }

    /// Whether there are available heads that were not taken.
    pub fn has_available(&self) -> bool {
        self.avail_idx() != self.next.next_avail
    }

    /// Appends the next heads to `heads`, in order and at most `max`. They are unchecked values of the guest: any
    /// number is possible. [`SplitQueue::advance`] takes them.
    ///
    /// # Errors
    /// [`Overrun`].
    pub fn peek(&mut self, max: usize, heads: &mut Vec<u16>) -> Result<(), Overrun> {
        let mut available = self.avail_idx().wrapping_sub(self.next.next_avail);
        if available <= self.layout.size {
            self.rereads_left = (self.rereads_left + 1).min(INDEX_REREADS);
        }
        while available > self.layout.size {
            self.rereads_left = self.rereads_left.checked_sub(1).ok_or(Overrun)?;
            std::hint::spin_loop();
            available = self.avail_idx().wrapping_sub(self.next.next_avail);
        }
        heads.extend((0..available).take(max).map(|nth| self.head_at(self.next.next_avail.wrapping_add(nth))));
        Ok(())
    }

    /// Takes the next `count` heads, which [`SplitQueue::peek`] has returned.
    pub fn advance(&mut self, count: u16) {
        self.next.next_avail = self.next.next_avail.wrapping_add(count);
    }

    /// Returns the last head that was taken to the driver: it is available again. False: it was not `head`.
    pub fn return_head(&mut self, head: u16) -> bool {
        let last = self.next.next_avail.wrapping_sub(1);
        let is_last = self.next.next_avail != self.next.next_used && self.head_at(last) == head;
        if is_last {
            self.next.next_avail = last;
        }
        is_last
    }

    /// The entry of the available ring at an index.
    fn head_at(&self, index: u16) -> u16 {
        u16::from_le(self.rings.avail.le16(RING + self.entry(index) * HEAD_BYTES).load(Ordering::Relaxed))
    }

    /// Fills the next used element: the chain at `head`, with `len` bytes written to it. [`SplitQueue::publish`] makes
    /// it visible to the driver.
    pub fn push_used(&mut self, head: u16, len: u32) {
        let element = RING + self.entry(self.next.next_used) * ELEMENT_BYTES;
        store(self.rings.used.le32(element), u32::from(head).to_le(), Ordering::Relaxed);
        store(self.rings.used.le32(element + size_of::<u32>()), len.to_le(), Ordering::Relaxed);
        self.next.next_used = self.next.next_used.wrapping_add(1);
    }

    /// Whether there are used elements that were not published.
    pub fn has_unpublished(&self) -> bool {
        self.next.next_used != self.published
    }

    /// Makes all used elements visible to the driver. Returns whether it requests an interrupt for them (section
    /// 2.7.7.2).
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next.next_used);
        self.published = new;
        let event_idx = self.layout.event_idx;
        let wanted = if event_idx { RING + usize::from(self.layout.size) * HEAD_BYTES } else { FLAGS };
        notification::publish(self.rings.used.le16(IDX), self.rings.avail.le16(wanted), event_idx, old, new)
    }

    /// Disables the driver's kicks. With EVENT_IDX the driver does not kick while avail_event stays behind, so there is
    /// nothing to do; otherwise a flag is set.
    pub fn disable_notification(&mut self) {
        if !self.layout.event_idx {
            let flags = u16::try_from(VRING_USED_F_NO_NOTIFY).expect("it is 1");
            store(self.rings.used.le16(FLAGS), flags.to_le(), Ordering::Relaxed);
        }
    }

    /// Enables the driver's kicks. Returns whether heads became available meanwhile, for which it may not have kicked.
    pub fn enable_notification(&mut self) -> bool {
        let event_idx = self.layout.event_idx;
        let wanted = if event_idx { RING + usize::from(self.layout.size) * ELEMENT_BYTES } else { FLAGS };
        let (available, wanted) = (self.rings.avail.le16(IDX), self.rings.used.le16(wanted));
        notification::enable(available, wanted, event_idx, self.next.next_avail)
    }

    fn avail_idx(&self) -> u16 {
        u16::from_le(self.rings.avail.le16(IDX).load(Ordering::Acquire))
    }

    /// The position of an index in a ring.
    fn entry(&self, index: u16) -> usize {
        usize::from(index & (self.layout.size - 1))
    }
}

impl RingWord for AtomicU16 {
    #[inline]
    fn load(&self, order: Ordering) -> u16 {
        u16::from_le(Self::load(self, order))
    }

    #[inline]
    fn store(&self, value: u16, order: Ordering) {
        store(self, value.to_le(), order);
    }
}

/// The two rings in guest memory, which stays mapped as long as this lives.
#[derive(Debug)]
struct Rings {
    avail: RingMemory,
    used: RingMemory,
    _memory: Arc<GuestRam>,
}

impl Rings {
    fn find(memory: &Arc<GuestRam>, layout: &QueueLayout) -> Option<Self> {
        let size = usize::from(layout.size);
        if !layout.size.is_power_of_two() {
            return None;
        }
        let ring = |address, bytes, alignment| RingMemory::find(memory, GuestAddress(address), bytes, alignment);
        if !memory.contains(GuestAddress(layout.desc_table), size * DESCRIPTOR_BYTES)
            || !layout.desc_table.is_multiple_of(TABLE_ALIGNMENT)
        {
            return None;
        }
        // Without the event index at the end of each: a driver without EVENT_IDX does not use it.
        let parts = [
            (layout.desc_table, size * DESCRIPTOR_BYTES),
            (layout.avail_ring, RING + size * HEAD_BYTES),
            (layout.used_ring, RING + size * ELEMENT_BYTES),
        ];
        let ends_before = |(start, bytes): (u64, usize), other: u64| start.saturating_add(bytes as u64) <= other;
        for (one, other) in [(0, 1), (0, 2), (1, 2)] {
            let (one, other) = (parts[one], parts[other]);
            if !ends_before(one, other.0) && !ends_before(other, one.0) {
                return None;
            }
        }
        let avail = ring(layout.avail_ring, RING + size * HEAD_BYTES + EVENT_BYTES, AVAIL_ALIGNMENT)?;
        let used = ring(layout.used_ring, RING + size * ELEMENT_BYTES + EVENT_BYTES, USED_ALIGNMENT)?;
        Some(Self { avail, used, _memory: Arc::clone(memory) })
    }
}

/// The memory of one ring, mapped as long as its [`Rings`] live.
#[derive(Debug)]
struct RingMemory {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: the memory belongs to no thread, and is only accessed as atomics.
unsafe impl Send for RingMemory {}

impl RingMemory {
    fn find(memory: &GuestRam, address: GuestAddress, bytes: usize, alignment: usize) -> Option<Self> {
        // The guard is a plain pointer, valid as long as the memory, because vm-memory's Xen mappings are not used.
        let base = memory.slice(address, bytes)?.ptr_guard_mut().as_ptr();
        base.addr().is_multiple_of(alignment).then_some(Self { base, bytes })
    }

    #[inline]
    fn le16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: the word is in the ring, which is mapped as long as `self` (see the type). It is aligned: the ring
        // is, and its words are at the offsets of the specification. Here it is only accessed as an atomic. Accesses of
        // another kind can happen at the same time, all by the guest's doing:
        // (1) The guest itself accesses the word. It is another process.
        // (2) The guest names ring memory as the data buffer of a request: another worker may memcpy to or from the
        // word.
        // (3) The guest places the rings of two queues so that they overlap: the word may be accessed as a part of a
        // u32 as well.
        // By the letter (2) and (3) are races. All of these accesses are plain loads and stores on every target, so the
        // word has some value, and no value of a word is trusted.
        unsafe { AtomicU16::from_ptr(self.word(offset)) }
    }

    #[inline]
    fn le32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as in le16().
        unsafe { AtomicU32::from_ptr(self.word(offset)) }
    }

    /// The address of the word of type `T` at `offset`.
    #[inline]
    fn word<T>(&self, offset: usize) -> *mut T {
        assert!(offset + size_of::<T>() <= self.bytes, "a word is within its ring");
        let word = self.base.wrapping_add(offset).cast::<T>();
        debug_assert!(word.is_aligned());
        word
    }
}
