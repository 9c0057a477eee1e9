//! A walk along a descriptor chain of the split ring (virtio 1.2, section 2.7).
//!
//! virtio-queue's own iterator reports a broken chain as its end, so a request cut short by a loop or a wild index looks
//! like a complete one. This walk tells the two apart, takes each descriptor once, and has the table looked up in guest
//! memory once for many chains.

use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, GuestAddress, VolatileMemory, VolatileSlice};

use crate::virtio::GuestRam;
use crate::virtio::guest_copy::{GuestRange, prefetch, read_once};

#[cfg(test)]
mod tests;

/// Most descriptors of one chain, in the ring and in an indirect table together.
///
/// The device may set a reasonable limit (section 2.7.4.1). 1024 is what QEMU takes (and IOV_MAX), eight times what
/// [`SEG_MAX`](crate::virtio::SEG_MAX) asks for; Linux sends chains longer than a small queue through an indirect table,
/// so the queue's size alone would be too strict. It bounds a request's memory to 16 KiB whatever the guest says.
pub const CHAIN_DESCRIPTORS_MAX: u32 = 1024;

/// Most entries of an indirect table: the largest queue size there is (section 2.7), and a chain must not be longer
/// than the queue (section 2.7.5.3.1). The table is never copied, so this costs no memory; it refuses nonsense early.
const INDIRECT_ENTRIES_MAX: u32 = 32768;

const DESCRIPTOR_BYTES: u32 = 16;

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Where it lies.
    pub range: GuestRange,
    /// Whether it is for the device to write, else to read.
    pub writable: bool,
}

/// The chain can't be followed to its end: a loop, an index or a table out of range, a table in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BrokenChain;

/// The walk. Ends after the last buffer or the first error.
///
/// => At most [`CHAIN_DESCRIPTORS_MAX`] buffers.
#[derive(Debug)]
pub struct DescriptorChain<'a> {
    mem: &'a GuestRam,
    table: DescriptorTable<'a>,
    next: Option<u16>,
    /// Descriptors that the current table can still give without repeating one.
    table_left: u32,
    /// Descriptors that the chain can still have.
    chain_left: u32,
    indirect: bool,
}

impl<'a> DescriptorChain<'a> {
    /// The chain that starts at descriptor `head` of the ring's table.
    pub fn new(mem: &'a GuestRam, table: DescriptorTable<'a>, head: u16) -> Self {
        let (table_left, chain_left) = (table.entries, CHAIN_DESCRIPTORS_MAX);
        Self { mem, table, next: Some(head), table_left, chain_left, indirect: false }
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
        self.table_left = self.table_left.checked_sub(1).ok_or(BrokenChain)?;
        self.chain_left = self.chain_left.checked_sub(1).ok_or(BrokenChain)?;
        self.table.read(self.mem, index).ok_or(BrokenChain)
    }

    /// Goes on in the indirect table that `descriptor` names (section 2.7.5.3).
    ///
    /// => Its WRITE flag is ignored, as the device must. NEXT beside INDIRECT is forbidden to the driver, and devices
    ///    differ in what they make of it: refused.
    fn enter_indirect(&mut self, descriptor: &Descriptor) -> Result<(), BrokenChain> {
        let entries = descriptor.len() / DESCRIPTOR_BYTES;
        let whole = descriptor.len().is_multiple_of(DESCRIPTOR_BYTES);
        if self.indirect || descriptor.has_next() || !whole || entries == 0 || entries > INDIRECT_ENTRIES_MAX {
            return Err(BrokenChain);
        }
        // The descriptor that names the table is no buffer of the chain.
        self.chain_left += 1;
        self.table = DescriptorTable::new(self.mem, descriptor.addr(), entries);
        self.table_left = entries;
        self.indirect = true;
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
    /// The table's memory, where one region holds it all.
    slice: Option<VolatileSlice<'a>>,
}

impl<'a> DescriptorTable<'a> {
    /// A table at `base`: a ring's, or an indirect one.
    ///
    /// => It need not lie in guest memory as a whole; a chain that leaves that memory is broken.
    pub fn new(mem: &'a GuestRam, base: GuestAddress, entries: u32) -> Self {
        // 32768 entries of 16 bytes at most: far below a usize.
        let slice = mem.slice(base, (entries * DESCRIPTOR_BYTES) as usize);
        Self { base, entries, slice }
    }

    /// Calls for what the chains at `heads` begin with: the first descriptor, and the header or indirect table that it points
    /// to. The guest's processor has just written both. Of one chain after the other, each waits for its lines by itself;
    /// here the processor waits for those of several at a time.
    pub fn prefetch_heads(&self, mem: &GuestRam, heads: &[u16]) {
        for descriptor in heads.iter().filter_map(|&head| self.read(mem, head)) {
            if let Some(first) = mem.slice(descriptor.addr(), 1) {
                prefetch(first.ptr_guard().as_ptr());
            }
        }
    }

    /// The descriptor at `index`, read once; `None` when it is outside the table or guest memory.
    #[inline]
    fn read(&self, mem: &GuestRam, index: u16) -> Option<Descriptor> {
        if u32::from(index) >= self.entries {
            return None;
        }
        let offset = u32::from(index) * DESCRIPTOR_BYTES;
        if let Some(slice) = &self.slice {
            return Some(slice.get_ref::<Descriptor>(offset as usize).ok()?.load());
        }
        // The table crosses a border between regions, or leaves guest memory past the entries in use.
        let mut raw = [0; DESCRIPTOR_BYTES as usize];
        read_once(mem, self.base.checked_add(u64::from(offset))?, &mut raw).ok()?;
        let [a, b, c, d, e, f, g, h, len @ .., f0, f1, n0, n1] = raw;
        Some(Descriptor::new(
            u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            u32::from_le_bytes(len),
            u16::from_le_bytes([f0, f1]),
            u16::from_le_bytes([n0, n1]),
        ))
    }
}
