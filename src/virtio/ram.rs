//! The guest's memory, as the front-end maps it into this process.
//!
//! vm-memory maps it and keeps each region behind a pointer of its own. A request asks where its header, its data and its
//! status lie, and what a look-up needs to know of the regions lies side by side here.

use std::sync::Arc;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice};

/// Guest memory; mapped as long as this lives.
#[derive(Debug, Default)]
pub struct GuestRam {
    memory: Arc<GuestMemoryMmap<()>>,
    /// In the order of their addresses.
    regions: Box<[Region]>,
}

/// A region of guest memory, and where it is mapped.
#[derive(Debug)]
struct Region {
    first: GuestAddress,
    bytes: usize,
    host: *mut u8,
}

// SAFETY: the mapping belongs to no thread; what is done with its bytes is told by the slices of it.
unsafe impl Send for Region {}
// SAFETY: the same.
unsafe impl Sync for Region {}

impl GuestRam {
    /// The memory that vm-memory has mapped.
    pub fn new(memory: Arc<GuestMemoryMmap<()>>) -> Self {
        let whole = |region: &vm_memory::GuestRegionMmap<()>| {
            let slice = region.as_volatile_slice().expect("a region that is mapped");
            // Without xen's on-demand mappings the guard is a plain pointer, good as long as the memory.
            Region { first: region.start_addr(), bytes: slice.len(), host: slice.ptr_guard_mut().as_ptr() }
        };
        let regions = memory.iter().map(whole).collect();
        Self { memory, regions }
    }

    /// `len` bytes at `addr`, if one region holds them all: nearly always.
    #[inline]
    pub fn slice(&self, addr: GuestAddress, len: usize) -> Option<VolatileSlice<'_>> {
        let after = self.regions.partition_point(|region| region.first <= addr);
        let region = self.regions[..after].last()?;
        let offset = usize::try_from(addr.unchecked_offset_from(region.first)).ok()?;
        let left = region.bytes.checked_sub(offset).filter(|&left| left > 0)?;
        // SAFETY: the bytes lie in the region, whose mapping lives as long as `self.memory`, which the slice borrows.
        (len <= left).then(|| unsafe { VolatileSlice::new(region.host.add(offset), len) })
    }

    /// The slices that `len` bytes at `addr` lie in, in order; the last one is `None` where guest memory ends before.
    pub fn slices(&self, addr: GuestAddress, len: usize) -> impl Iterator<Item = Option<VolatileSlice<'_>>> {
        GuestMemoryBackend::get_slices(&*self.memory, addr, len).map(Result::ok)
    }

    /// Whether all of `len` bytes at `addr` are guest memory, in one region or several.
    pub fn holds(&self, addr: GuestAddress, len: usize) -> bool {
        self.memory.check_range(addr, len)
    }
}

/// What the tests write to guest memory and read from it goes another way than the code they test.
#[cfg(test)]
impl std::ops::Deref for GuestRam {
    type Target = GuestMemoryMmap<()>;
    fn deref(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{END, HIGH, HOLE, SEAM, ram};

    /// Around every border, and of every length that matters there, a slice is what vm-memory finds.
    #[test]
    fn a_slice_is_what_vm_memory_finds() {
        let mem = ram();
        let borders = [0, SEAM, HOLE, HIGH, END, u64::MAX];
        let around = |border: u64| [-9i64, -8, -1, 0, 1, 8].map(|by| border.wrapping_add_signed(by));
        for addr in borders.into_iter().flat_map(around).map(GuestAddress) {
            for len in [0, 1, 8, 9, 0xffff, 0x1_0000, 0x1_0001, usize::MAX] {
                let expected = mem.get_slice(addr, len).ok().map(|slice| (slice.ptr_guard().as_ptr(), slice.len()));
                let found = mem.slice(addr, len).map(|slice| (slice.ptr_guard().as_ptr(), slice.len()));
                assert_eq!(found, expected, "{len} bytes at {addr:?}");
            }
        }
        assert!(GuestRam::default().slice(GuestAddress(0), 1).is_none());
    }
}
