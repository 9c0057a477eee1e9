//! Walks the descriptor chains of a split virtqueue (virtio 1.2, section 2.7).
//!
//! virtio-queue's iterator reports a broken chain as its end, so a request truncated by a loop or an index out of range
//! looks like a complete one. This iterator distinguishes the two, reads each descriptor once, and needs only one
//! lookup of the table in guest memory for many chains.

use std::fmt;

use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, GuestAddress, VolatileMemory, VolatileSlice};

use crate::sys::racing::prefetch;
use crate::virtio::GuestRam;
use crate::virtio::guest_copy::{GuestRange, read_once};
use crate::virtio::ram::in_bounds_mask;

#[cfg(test)]
mod tests;

/// Most descriptors of one chain, including those in an indirect table.
///
/// A device may set a reasonable limit (section 2.7.4.1). 1024 is QEMU's limit (and IOV_MAX), and eight times
/// [`SEG_MAX`](crate::virtio::SEG_MAX). The size of the queue would be too strict: Linux sends chains that are longer
/// than a small queue through an indirect table. The limit bounds the memory of a request to 16 KiB, whatever the guest
/// does.
pub const CHAIN_DESCRIPTORS_MAX: u32 = 1024;

/// Most entries of an indirect table: the largest size of a queue (section 2.7), which a chain must not exceed (section
/// 2.7.5.3.1). The table is never copied, so a large one costs no memory.
const INDIRECT_ENTRIES_MAX: u32 = 32768;

const DESCRIPTOR_BYTES: u32 = 16;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Its guest memory.
    pub range: GuestRange,
    /// Whether the device writes it; otherwise the device reads it.
    pub writable: bool,
}

/// The chain cannot be followed to its end: it has a loop, an index or a table out of range, or a table in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokenChain;

impl fmt::Display for BrokenChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the descriptor chain cannot be followed to its end")
    }
}

impl std::error::Error for BrokenChain {}

/// The buffers of one chain. The iterator ends after the last buffer or the first error.
///
/// => At most [`CHAIN_DESCRIPTORS_MAX`] buffers.
#[derive(Debug)]
pub struct DescriptorChain<'a> {
    mem: &'a GuestRam,
    table: DescriptorTable<'a>,
    next: Option<u16>,
    /// Number of descriptors that were read.
    read: u32,
    /// Most descriptors to read: the chain is then too long, or has a loop in the current table.
    read_max: u32,
    /// The current table is an indirect one.
    in_indirect: bool,
}

impl<'a> DescriptorChain<'a> {
    /// The chain that starts at descriptor `head` of the ring's table.
    pub fn new(mem: &'a GuestRam, table: DescriptorTable<'a>, head: u16) -> Self {
        let read_max = table.entries.min(CHAIN_DESCRIPTORS_MAX);
        Self { mem, table, next: Some(head), read: 0, read_max, in_indirect: false }
    }

    /// Number of buffers of the chain that were read.
    pub fn buffers(&self) -> u32 {
        self.read
    }

    fn advance(&mut self, index: u16) -> Result<Buffer, BrokenChain> {
        let mut descriptor = self.take(index)?;
        if descriptor.refers_to_indirect_table() {
            self.enter_indirect(&descriptor)?;
            descriptor = self.take(0)?;
            if descriptor.refers_to_indirect_table() {
                return Err(BrokenChain);
            }
        }
        self.next = descriptor.has_next().then(|| descriptor.next());
        Ok(Buffer {
            range: GuestRange { addr: descriptor.addr(), len: descriptor.len() },
            writable: u32::from(descriptor.flags()) & VRING_DESC_F_WRITE != 0,
        })
    }

    fn take(&mut self, index: u16) -> Result<Descriptor, BrokenChain> {
        if self.read == self.read_max {
            return Err(BrokenChain);
        }
        self.read += 1;
        self.table.read(self.mem, index).ok_or(BrokenChain)
    }

    /// Continues in the indirect table that `descriptor` refers to (section 2.7.5.3).
    ///
    /// => Its WRITE flag is ignored, as the specification requires. NEXT together with INDIRECT is forbidden to
    ///    drivers, and devices interpret it differently: here the chain is broken.
    fn enter_indirect(&mut self, descriptor: &Descriptor) -> Result<(), BrokenChain> {
        let entries = descriptor.len() / DESCRIPTOR_BYTES;
        let whole = descriptor.len().is_multiple_of(DESCRIPTOR_BYTES);
        if self.in_indirect || descriptor.has_next() || !whole || entries == 0 || entries > INDIRECT_ENTRIES_MAX {
            return Err(BrokenChain);
        }
        // The descriptor that refers to the table is not a buffer of the chain.
        self.read -= 1;
        self.read_max = CHAIN_DESCRIPTORS_MAX.min(self.read + entries);
        self.table = DescriptorTable::new(self.mem, descriptor.addr(), entries);
        self.in_indirect = true;
        Ok(())
    }
}

impl Iterator for DescriptorChain<'_> {
    type Item = Result<Buffer, BrokenChain>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let index = self.next.take()?;
        Some(self.advance(index))
    }
}

/// A descriptor table in guest memory.
#[derive(Clone, Debug)]
pub struct DescriptorTable<'a> {
    base: GuestAddress,
    entries: u32,
    /// The table's memory, if it is in one region.
    slice: Option<VolatileSlice<'a>>,
}

impl<'a> DescriptorTable<'a> {
    /// The table at `base`: a ring's, or an indirect one.
    ///
    /// => It may be partly outside guest memory. A chain with a descriptor there is broken.
    pub fn new(mem: &'a GuestRam, base: GuestAddress, entries: u32) -> Self {
        // At most 32768 entries of 16 bytes.
        let slice = mem.slice(base, (entries * DESCRIPTOR_BYTES) as usize);
        Self { base, entries, slice }
    }

    /// Prefetches the start of the chains at `heads`: the first descriptor, and the header or indirect table that it
    /// refers to. The guest's processor has just written both. Without the prefetch, the chains would wait for these
    /// cache lines one after the other; with it, the waits overlap.
    pub fn prefetch_heads(&self, mem: &GuestRam, heads: &[u16]) {
        for descriptor in heads.iter().filter_map(|&head| self.read(mem, head)) {
            if let Some(first) = mem.slice(descriptor.addr(), 1) {
                prefetch(first.ptr_guard().as_ptr());
            }
        }
    }

    /// The descriptor at `index`, read once; `None` if it is outside the table or guest memory.
    #[inline]
    fn read(&self, mem: &GuestRam, index: u16) -> Option<Descriptor> {
        if u32::from(index) >= self.entries {
            return None;
        }
        let offset = usize::from(index) * DESCRIPTOR_BYTES as usize;
        if let Some(slice) = &self.slice {
            // The guest chooses the index: see `GuestRam::slice`.
            let offset = offset & in_bounds_mask(offset, slice.len());
            return Some(slice.get_ref::<Descriptor>(offset).ok()?.load());
        }
        // The table crosses regions, or is partly outside guest memory.
        let mut raw = [0; DESCRIPTOR_BYTES as usize];
        read_once(mem, self.base.checked_add(offset as u64)?, &mut raw).ok()?;
        let [a, b, c, d, e, f, g, h, len @ .., f0, f1, n0, n1] = raw;
        Some(Descriptor::new(
            u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            u32::from_le_bytes(len),
            u16::from_le_bytes([f0, f1]),
            u16::from_le_bytes([n0, n1]),
        ))
    }
}
