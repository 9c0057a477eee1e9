//! The guest's memory, which the front-end shares with this process.
//!
//! vm-memory maps it, and keeps each region behind a separate pointer. Every request looks up its header, its data and
//! its status; so this copy has the fields that a lookup needs adjacent in memory.

use std::sync::Arc;

use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileArrayRef, VolatileMemory,
    VolatileSlice,
};

use crate::sys::regions::{BusErrorRecord, Registration, register};

/// Guest memory, mapped as long as this lives.
#[derive(Debug, Default)]
pub struct GuestRam {
    /// Dropped first: while a range is registered, it is mapped.
    _registrations: Box<[Registration]>,
    memory: Arc<GuestMemoryMmap<()>>,
    /// The largest region. Nearly all addresses are in it.
    largest: GuestRegion,
    /// In order of their addresses.
    regions: Box<[GuestRegion]>,
}

/// A region of guest memory and its mapping; by default, an empty one.
#[derive(Clone, Copy, Debug)]
struct GuestRegion {
    first: GuestAddress,
    bytes: usize,
    host: *mut u8,
}

// SAFETY: the mapping belongs to no thread, and its bytes are only accessed through raw pointers and volatile slices.
unsafe impl Send for GuestRegion {}
// SAFETY: as above.
unsafe impl Sync for GuestRegion {}

impl Default for GuestRegion {
    fn default() -> Self {
        Self { first: GuestAddress(0), bytes: 0, host: std::ptr::null_mut() }
    }
}

impl GuestRegion {
    /// The offset of an address in the region; `None` if it is outside.
    #[inline]
    fn offset_of(&self, addr: GuestAddress) -> Option<usize> {
        let offset = usize::try_from(addr.0.wrapping_sub(self.first.0)).ok()?;
        (offset < self.bytes).then_some(offset)
    }
}

/// All ones if `offset < bytes`, otherwise 0, computed without a branch (Linux: array_index_mask_nospec).
#[inline]
pub(super) fn in_bounds_mask(offset: usize, bytes: usize) -> usize {
    #[cfg_attr(miri, allow(unused_mut, reason = "Miri does not support assembler"))]
    let mut offset = offset;
    // SAFETY: no instructions. The block only hides from the compiler that the caller has checked the offset: otherwise
    // it would optimise the mask away.
    #[cfg(not(miri))]
    unsafe {
        std::arch::asm!("/* {0} */", inout(reg) offset, options(pure, nomem, nostack, preserves_flags));
    }
    // Neither value is above isize::MAX, so the sign is the borrow.
    (offset.wrapping_sub(bytes).cast_signed() >> (usize::BITS - 1)).cast_unsigned()
}

impl GuestRam {
    /// The memory that vm-memory has mapped.
    pub fn new(memory: Arc<GuestMemoryMmap<()>>) -> Self {
        let whole = |region: &vm_memory::GuestRegionMmap<()>| {
            let slice = region.as_volatile_slice().expect("a region is mapped");
            // The guard is a plain pointer, valid as long as the memory, as vm-memory's Xen mappings are not used.
            GuestRegion { first: region.start_addr(), bytes: slice.len(), host: slice.ptr_guard_mut().as_ptr() }
        };
        let regions: Box<[GuestRegion]> = memory.iter().map(whole).collect();
        let largest = regions.iter().max_by_key(|region| region.bytes).copied().unwrap_or_default();
        Self { _registrations: Box::default(), memory, largest, regions }
    }

    /// The same memory; the handler of SIGBUS writes `record` if the access was to it.
    pub fn registered(self, record: BusErrorRecord) -> Self {
        let range = |region: &GuestRegion| region.host.addr()..region.host.addr() + region.bytes;
        let registrations = self.regions.iter().map(|region| register(&range(region), record)).collect();
        Self { _registrations: registrations, ..self }
    }

    /// The `len` bytes at `addr`, if they are in one region, as is nearly always the case.
    #[inline]
    pub fn slice(&self, addr: GuestAddress, len: usize) -> Option<VolatileSlice<'_>> {
        let (region, offset) = match self.largest.offset_of(addr) {
            Some(offset) => (&self.largest, offset),
            None => {
                let after = self.regions.partition_point(|region| region.first <= addr);
                let region = self.regions[..after].last()?;
                (region, region.offset_of(addr)?)
            }
        };
        // The guest chooses the address. If the processor mispredicts the check, it must not load from an arbitrary
        // address: the effect of the loaded bytes on its caches could reveal them to the guest (Spectre, variant 1).
        let offset = offset & in_bounds_mask(offset, region.bytes);
        // SAFETY: the bytes are in the region, which is mapped as long as `self.memory` lives, and the slice borrows
        // `self`. The mask changes nothing, because the offset is in the region.
        (len <= region.bytes - offset).then(|| unsafe { VolatileSlice::new(region.host.add(offset), len) })
    }

    /// The `len` bytes at `addr` as one slice per region, in order. The last is `None` if guest memory ends before
    /// them.
    pub fn slices(&self, addr: GuestAddress, len: usize) -> impl Iterator<Item = Option<VolatileSlice<'_>>> {
        GuestMemoryBackend::get_slices(&*self.memory, addr, len).map(Result::ok)
    }

    /// Whether the first `bytes` of each region read as zeros.
    pub fn is_blank(&self, bytes: usize) -> bool {
        self.regions.iter().all(|region| {
            let words = region.bytes.min(bytes) / size_of::<u64>();
            let slice = self.slice(region.first, words * size_of::<u64>());
            slice.is_some_and(|slice| {
                let words: VolatileArrayRef<'_, u64> =
                    slice.get_array_ref(0, words).expect("the words are in the slice");
                (0..words.len()).all(|index| words.load(index) == 0)
            })
        })
    }

    /// Whether all of the `len` bytes at `addr` are in guest memory, in one region or several.
    pub fn contains(&self, addr: GuestAddress, len: usize) -> bool {
        self.memory.check_range(addr, len)
    }
}

/// Tests write to guest memory and read it through vm-memory itself, not through the code that they test.
#[cfg(test)]
impl std::ops::Deref for GuestRam {
    type Target = GuestMemoryMmap<()>;
    fn deref(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::virtio::testing::{END, HIGH, HOLE, SEAM, ram};

    /// At every border of a region, for every relevant length.
    #[test]
    fn guest_slices_agree_with_vm_memory() {
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

    #[test]
    fn an_offset_outside_its_region_is_masked() {
        for (offset, bytes) in [(0, 1), (4095, 4096), (0, usize::MAX >> 1)] {
            assert_eq!(in_bounds_mask(offset, bytes), usize::MAX);
        }
        for (offset, bytes) in [(1, 1), (4096, 4096), (usize::MAX >> 1, 4096), (0, 0)] {
            assert_eq!(in_bounds_mask(offset, bytes), 0);
        }
    }

    #[test]
    fn guest_memory_is_blank_until_its_start_is_written() {
        let mem = ram();
        assert!(mem.is_blank(usize::MAX) && mem.is_blank(0));
        mem.write_obj(1u8, GuestAddress(HIGH + 4095)).unwrap();
        assert!(mem.is_blank(4088) && !mem.is_blank(4096));
    }
}
