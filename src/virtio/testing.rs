//! Guest memory, and descriptors in it, for the tests of this module.

use std::sync::Arc;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::virtio::GuestRam;

// VIRTQ_DESC_F_* (section 2.7.5); virtio-bindings has them as u32.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// The border between the two adjacent regions of [`ram`].
pub(crate) const SEAM: u64 = 0x1_0000;
/// The end of the second region; nothing is mapped from here up to [`HIGH`].
pub(crate) const HOLE: u64 = 0x2_0000;
/// The start of the third region.
pub(crate) const HIGH: u64 = 0x4_0000;
/// The end of the third region, and of guest memory.
pub(crate) const END: u64 = 0x5_0000;

/// Guest memory of two adjacent regions, a hole, and a third region.
pub(crate) fn ram() -> GuestRam {
    let at = |start: u64, len: usize| (GuestAddress(start), len);
    let regions = [at(0, 0x1_0000), at(SEAM, 0x1_0000), at(HIGH, 0x1_0000)];
    GuestRam::new(Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap()))
}

/// Writes descriptor `index` of the table at `table`.
pub(crate) fn put(mem: &GuestRam, table: u64, index: u16, (addr, len, flags, next): (u64, u32, u16, u16)) {
    let descriptor = Descriptor::new(addr, len, flags, next);
    mem.write_obj(descriptor, GuestAddress(table + u64::from(index) * 16)).unwrap();
}

/// Writes a chain of (address, length, WRITE or 0) to the table at `table`, from index 0 on.
pub(crate) fn put_chain(mem: &GuestRam, table: u64, buffers: &[(u64, u32, u16)]) {
    for (index, &(addr, len, flags)) in (0u16..).zip(buffers) {
        let last = usize::from(index) + 1 == buffers.len();
        put(mem, table, index, (addr, len, flags | if last { 0 } else { NEXT }, index + 1));
    }
}
