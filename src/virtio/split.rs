//! The split virtqueue's own memory (virtio 1.2, section 2.7): available heads come out, used elements go in, and each side
//! says when it wants to be told.
//!
//! The rings are looked up among the guest's regions once, when the queue starts or the memory changes; then they are host
//! addresses of a known length. virtio-queue looks up each word again, and publishes each used element by itself, which
//! takes the line of the used index away from a guest that polls it once a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use virtio_bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};
use vm_memory::GuestAddress;

use crate::virtio::GuestRam;

#[cfg(test)]
mod tests;

/// struct virtq_avail: le16 flags, le16 idx, le16 ring\[size\], le16 used_event. struct virtq_used: le16 flags, le16 idx,
/// elements of le32 id and le32 len, le16 avail_event.
const IDX: usize = 2;
const RING: usize = 4;
const HEAD_BYTES: usize = 2;
const ELEMENT_BYTES: usize = 8;
const EVENT_BYTES: usize = 2;
/// Alignment of the parts (section 2.7).
const TABLE_ALIGNMENT: u64 = 16;
const AVAIL_ALIGNMENT: usize = 2;
const USED_ALIGNMENT: usize = 4;
const DESCRIPTOR_BYTES: usize = 16;

/// Where a queue lies and what was negotiated for it; addresses are the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLayout {
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// Descriptor table.
    pub desc_table: u64,
    /// Available ring.
    pub avail_ring: u64,
    /// Used ring.
    pub used_ring: u64,
    /// VIRTIO_RING_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
}

/// Where the device stands in a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueuePosition {
    /// Index of the next available entry to take.
    pub next_avail: u16,
    /// Index of the next used element to fill.
    pub next_used: u16,
}

/// The guest has made more available than there are descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overrun;

/// A split virtqueue, from the device's side.
#[derive(Debug)]
pub struct SplitQueue {
    layout: QueueLayout,
    rings: Rings,
    next: QueuePosition,
    /// The used index that the guest sees.
    published: u16,
}

impl SplitQueue {
    /// A queue that goes on there; `None` if it does not lie in guest memory as it must.
    ///
    /// => Each ring must lie in one region of guest memory, as in every device that looks it up once. The descriptor table
    ///    need not: see [`DescriptorTable`](super::chain::DescriptorTable).
    pub fn new(memory: &Arc<GuestRam>, layout: QueueLayout, next: QueuePosition) -> Option<Self> {
        let rings = Rings::find(memory, &layout)?;
        Some(Self { layout, rings, next, published: next.next_used })
    }

    /// Where the device stands.
    pub fn position(&self) -> QueuePosition {
        self.next
    }

    /// Goes on there.
    pub fn set_position(&mut self, next: QueuePosition) {
        (self.next, self.published) = (next, next.next_used);
    }

    /// The used index in guest memory: what a predecessor has published last.
    pub fn used_idx(&self) -> u16 {
        u16::from_le(self.rings.used.le16(IDX).load(Ordering::Acquire))
    }

    /// Whether the guest has made something available that was not taken.
    pub fn has_available(&self) -> bool {
        self.avail_idx() != self.next.next_avail
    }

    /// Takes up to `most` heads, in their order. They are what the guest wrote: any number.
    ///
    /// # Errors
    /// [`Overrun`]: nothing is taken.
    pub fn take(&mut self, most: usize, heads: &mut Vec<u16>) -> Result<(), Overrun> {
        let available = self.avail_idx().wrapping_sub(self.next.next_avail);
        if available > self.layout.size {
            return Err(Overrun);
        }
        for _ in 0..most.min(usize::from(available)) {
            let head = self.rings.avail.le16(RING + self.place(self.next.next_avail) * HEAD_BYTES);
            heads.push(u16::from_le(head.load(Ordering::Relaxed)));
            self.next.next_avail = self.next.next_avail.wrapping_add(1);
        }
        Ok(())
    }

    /// Fills the next used element: the chain at `head`, with `len` bytes written. The guest sees it when it is published.
    pub fn push_used(&mut self, head: u16, len: u32) {
        let element = RING + self.place(self.next.next_used) * ELEMENT_BYTES;
        self.rings.used.le32(element).store(u32::from(head).to_le(), Ordering::Relaxed);
        self.rings.used.le32(element + size_of::<u32>()).store(len.to_le(), Ordering::Relaxed);
        self.next.next_used = self.next.next_used.wrapping_add(1);
    }

    /// Whether there are used elements that the guest does not see.
    pub fn has_unpublished(&self) -> bool {
        self.next.next_used != self.published
    }

    /// Shows the guest what has been used. Whether it wants a call for that (section 2.7.7.2).
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.published, self.next.next_used);
        self.rings.used.le16(IDX).store(new.to_le(), Ordering::Release);
        self.published = new;
        // The guest writes what it wants before it looks at the index for the last time: one of us sees the other's.
        fence(Ordering::SeqCst);
        if self.layout.event_idx {
            let used_event = RING + usize::from(self.layout.size) * HEAD_BYTES;
            let event = u16::from_le(self.rings.avail.le16(used_event).load(Ordering::Relaxed));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            let flags = u16::from_le(self.rings.avail.le16(0).load(Ordering::Relaxed));
            u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// The guest need not kick: with EVENT_IDX that is so as long as the event index is behind, else by a flag.
    pub fn disable_notification(&mut self) {
        if !self.layout.event_idx {
            let flags = u16::try_from(VRING_USED_F_NO_NOTIFY).expect("it is 1");
            self.rings.used.le16(0).store(flags.to_le(), Ordering::Relaxed);
        }
    }

    /// The guest is to kick from now on. True: something came meanwhile, for which it may not have kicked.
    pub fn enable_notification(&mut self) -> bool {
        if self.layout.event_idx {
            let avail_event = RING + usize::from(self.layout.size) * ELEMENT_BYTES;
            self.rings.used.le16(avail_event).store(self.next.next_avail.to_le(), Ordering::Relaxed);
        } else {
            self.rings.used.le16(0).store(0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.has_available()
    }

    fn avail_idx(&self) -> u16 {
        u16::from_le(self.rings.avail.le16(IDX).load(Ordering::Acquire))
    }

    /// The place of an index in its ring.
    fn place(&self, index: u16) -> usize {
        usize::from(index & (self.layout.size - 1))
    }
}

/// The two rings in the guest's memory, which is held.
#[derive(Debug)]
struct Rings {
    avail: Part,
    used: Part,
    _memory: Arc<GuestRam>,
}

impl Rings {
    fn find(memory: &Arc<GuestRam>, layout: &QueueLayout) -> Option<Self> {
        let size = usize::from(layout.size);
        if !layout.size.is_power_of_two() {
            return None;
        }
        let part = |address, bytes, alignment| Part::find(memory, GuestAddress(address), bytes, alignment);
        if !memory.holds(GuestAddress(layout.desc_table), size * DESCRIPTOR_BYTES)
            || !layout.desc_table.is_multiple_of(TABLE_ALIGNMENT)
        {
            return None;
        }
        let avail = part(layout.avail_ring, RING + size * HEAD_BYTES + EVENT_BYTES, AVAIL_ALIGNMENT)?;
        let used = part(layout.used_ring, RING + size * ELEMENT_BYTES + EVENT_BYTES, USED_ALIGNMENT)?;
        Some(Self { avail, used, _memory: Arc::clone(memory) })
    }
}

/// A piece of guest memory that is mapped as long as its [`Rings`] live.
#[derive(Debug)]
struct Part {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: the memory belongs to no thread; it is only accessed as atomics.
unsafe impl Send for Part {}

impl Part {
    fn find(memory: &GuestRam, address: GuestAddress, bytes: usize, alignment: usize) -> Option<Self> {
        // Without xen's on-demand mappings the guard is a plain pointer, good as long as the memory.
        let base = memory.slice(address, bytes)?.ptr_guard_mut().as_ptr();
        base.addr().is_multiple_of(alignment).then_some(Self { base, bytes })
    }

    #[inline]
    fn le16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: the word lies in the part, which is mapped as long as `self` (see the type), and is aligned: parts are, and
        // their words follow each other as the specification lays them out. We access it as an atomic only; what the guest
        // does to it at the same time is done by another process.
        unsafe { AtomicU16::from_ptr(self.place(offset)) }
    }

    #[inline]
    fn le32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: as in le16().
        unsafe { AtomicU32::from_ptr(self.place(offset)) }
    }

    /// The address of a word of type `T`.
    #[inline]
    fn place<T>(&self, offset: usize) -> *mut T {
        assert!(offset + size_of::<T>() <= self.bytes, "a word of the ring lies in it");
        let place = self.base.wrapping_add(offset).cast::<T>();
        debug_assert!(place.is_aligned());
        place
    }
}
