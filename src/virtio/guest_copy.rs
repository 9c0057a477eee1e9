//! Copies between guest memory and host memory.
//!
//! A request's data is a list of guest ranges, read as one stream of bytes. [`GuestCursor`] copies any section of that
//! stream to or from host memory and keeps its position: finding the next section costs nothing, and finding another
//! one costs a step for each range in between.
//!
//! # Races
//!
//! The guest may write to its memory during a copy, and two requests for the same sectors may be copied to and from the
//! same frame at the same time, by two workers. Both are allowed. The bytes are disk content: any value is valid, and a
//! reader gets a mixture of old and new bytes, as from any disk under overlapping requests.
//!
//! No reference to guest memory or to a frame is ever formed; all access is through raw pointers. Bulk data is copied
//! without interpreting it, by instructions for which a race is harmless (`sys::racing`). Bytes that control the daemon
//! are fetched with volatile reads ([`read_once`]), so that the compiler cannot fetch them again after they were
//! checked.

use std::fmt;
use std::ptr;

use vm_memory::{Address, Bytes, GuestAddress};

use crate::fault_injection::crash_point;
use crate::sys::racing;
use crate::virtio::{GuestRam, Status};

#[cfg(test)]
mod tests;

/// A range of guest memory as given in a descriptor, unchecked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// First byte.
    pub addr: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// A copy would have left the request's data or guest memory. Some bytes may have been copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadAddress;

impl fmt::Display for BadAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an address outside the request's data or guest memory")
    }
}

impl std::error::Error for BadAddress {}

/// Copies from and to the data of one request.
#[derive(Debug)]
pub struct GuestCursor<'a> {
    mem: &'a GuestRam,
    ranges: &'a [GuestRange],
    /// The current range; `ranges.len()` at the end of the data.
    index: usize,
    /// Offset in the data of the current range's first byte: the sum of the lengths of `ranges[..index]`.
    start: u64,
}

impl<'a> GuestCursor<'a> {
    /// A cursor at the start of the data.
    pub fn new(mem: &'a GuestRam, ranges: &'a [GuestRange]) -> Self {
        Self { mem, ranges, index: 0, start: 0 }
    }

    /// Copies `len` bytes at byte `offset` of the data from the guest to `target`. `next`, if given, is the target of
    /// the next copy, whose start is prefetched meanwhile.
    ///
    /// # Safety
    /// `target` is valid for writes of `len` bytes, is not guest memory, and no reference covers it. Others may read or
    /// write the same bytes through raw pointers at the same time; each of them must accept any mixture of old and new
    /// bytes.
    ///
    /// # Errors
    /// [`BadAddress`] if part of the section is outside the data or outside guest memory.
    pub unsafe fn copy_from_guest(
        &mut self,
        offset: u64,
        target: *mut u8,
        len: usize,
        next: Option<*const u8>,
    ) -> Result<(), BadAddress> {
        self.for_each_chunk(offset, len, |done, guest, count| {
            crash_point();
            // SAFETY: `guest` is valid for `count` bytes of mapped guest memory (for_each_chunk), `target` for `len`
            // bytes, of which this chunk is `done..done + count` (caller). They do not overlap (caller). Others may
            // access both at the same time: see the module.
            unsafe { racing::copy(guest, target.add(done), count, next.filter(|_| done == 0)) };
        })
    }

    /// Copies `len` bytes from `source` to byte `offset` of the data in the guest. `next`, if given, is the source of
    /// the next copy, whose start is prefetched meanwhile.
    ///
    /// # Safety
    /// `source` is valid for reads of `len` bytes, is not guest memory, and no mutable reference covers it. Others may
    /// read or write the same bytes through raw pointers at the same time; the guest gets any mixture of old and new
    /// bytes.
    ///
    /// # Errors
    /// As [`Self::copy_from_guest`].
    pub unsafe fn copy_to_guest(
        &mut self,
        offset: u64,
        source: *const u8,
        len: usize,
        next: Option<*const u8>,
    ) -> Result<(), BadAddress> {
        self.for_each_chunk(offset, len, |done, guest, count| {
            // SAFETY: as in copy_from_guest, with source and target exchanged.
            unsafe { racing::copy(source.add(done), guest, count, next.filter(|_| done == 0)) };
        })
    }

    /// Writes `bytes` to byte `offset` of the data in the guest.
    ///
    /// # Errors
    /// As [`Self::copy_to_guest`].
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), BadAddress> {
        // SAFETY: a shared slice is valid for reads of its length, and is never guest memory.
        unsafe { self.copy_to_guest(offset, bytes.as_ptr(), bytes.len(), None) }
    }

    /// Fills `bytes` from byte `offset` of the data, fetching each byte exactly once.
    ///
    /// # Errors
    /// As [`Self::copy_from_guest`].
    pub fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<(), BadAddress> {
        let target = bytes.as_mut_ptr();
        self.for_each_chunk(offset, bytes.len(), |done, guest, count| {
            // SAFETY: `guest` is valid for `count` bytes (for_each_chunk), `target` for the slice's length, of which
            // this chunk is `done..done + count`. A slice is never guest memory.
            unsafe { copy_volatile(guest, target.add(done), count) };
        })
    }

    /// Writes `len` zeros to byte `offset` of the data in the guest.
    ///
    /// # Errors
    /// As [`Self::copy_to_guest`].
    pub fn fill_zeros(&mut self, offset: u64, len: usize) -> Result<(), BadAddress> {
        self.for_each_chunk(offset, len, |_, guest, count| {
            // SAFETY: `guest` is valid for writes of `count` bytes of mapped guest memory (for_each_chunk).
            unsafe { racing::zero(guest, count) };
        })
    }

    /// Calls `f(bytes before it, host address, length)` for each chunk of the section that is contiguous in the host,
    /// in order.
    ///
    /// => Each chunk is mapped guest memory of that length for the duration of the call.
    #[inline]
    fn for_each_chunk(
        &mut self,
        offset: u64,
        len: usize,
        mut f: impl FnMut(usize, *mut u8, usize),
    ) -> Result<(), BadAddress> {
        if len == 0 {
            return Ok(());
        }
        self.seek(offset)?;
        let mut done = 0;
        let mut skip = offset - self.start;
        loop {
            let range = self.ranges.get(self.index).ok_or(BadAddress)?;
            let left = usize::try_from(u64::from(range.len) - skip).map_err(|_| BadAddress)?;
            let count = left.min(len - done);
            let addr = range.addr.checked_add(skip).ok_or(BadAddress)?;
            for_each_mapping(self.mem, addr, count, |inner, host, mapped| {
                f(done + inner, host, mapped);
            })?;
            done += count;
            if count == left {
                self.step();
            }
            if done == len {
                return Ok(());
            }
            skip = 0;
        }
    }

    /// Makes the range that holds byte `offset` of the data the current one.
    fn seek(&mut self, offset: u64) -> Result<(), BadAddress> {
        while offset < self.start {
            // At the first range `start` is 0, and no offset is below 0; so there is a range to step back to.
            self.index = self.index.checked_sub(1).ok_or(BadAddress)?;
            let len = self.ranges.get(self.index).ok_or(BadAddress)?.len;
            self.start = self.start.checked_sub(u64::from(len)).ok_or(BadAddress)?;
        }
        loop {
            let range = self.ranges.get(self.index).ok_or(BadAddress)?;
            if offset - self.start < u64::from(range.len) {
                return Ok(());
            }
            self.step();
        }
    }

    /// Moves on to the next range.
    ///
    /// => There is a current range.
    fn step(&mut self) {
        self.start += u64::from(self.ranges[self.index].len);
        self.index += 1;
    }
}

/// Calls `f(bytes before it, host address, length)` for each region's part of the `len` bytes at `addr`, in order.
#[inline]
fn for_each_mapping(
    mem: &GuestRam,
    addr: GuestAddress,
    len: usize,
    mut f: impl FnMut(usize, *mut u8, usize),
) -> Result<(), BadAddress> {
    // One region nearly always holds the whole range. The guard is a plain pointer, because vm-memory's Xen mappings
    // are not used.
    if let Some(slice) = mem.slice(addr, len) {
        f(0, slice.ptr_guard_mut().as_ptr(), len);
        return Ok(());
    }
    let mut done = 0;
    for slice in mem.slices(addr, len) {
        let slice = slice.ok_or(BadAddress)?;
        f(done, slice.ptr_guard_mut().as_ptr(), slice.len());
        done += slice.len();
    }
    if done == len { Ok(()) } else { Err(BadAddress) }
}

/// Fills `target` from guest memory at `addr`, fetching each byte exactly once.
///
/// # Errors
/// [`BadAddress`] if part of the range is outside guest memory.
pub fn read_once(mem: &GuestRam, addr: GuestAddress, target: &mut [u8]) -> Result<(), BadAddress> {
    let start = target.as_mut_ptr();
    for_each_mapping(mem, addr, target.len(), |done, guest, count| {
        // SAFETY: `guest` is valid for `count` bytes (for_each_mapping), `start` for the slice's length, of which this
        // chunk is `done..done + count`. A slice is never guest memory.
        unsafe { copy_volatile(guest, start.add(done), count) };
    })
}

/// Writes a request's status byte to `addr`.
///
/// # Errors
/// [`BadAddress`] if the address is not, or no longer, in guest memory.
pub fn write_status(mem: &GuestRam, addr: GuestAddress, status: Status) -> Result<(), BadAddress> {
    let byte = mem.slice(addr, 1).ok_or(BadAddress)?;
    crash_point();
    byte.write_obj(status as u8, 0).map_err(|_| BadAddress)
}

/// Copies `len` bytes with volatile reads, eight bytes at a time if the source is aligned.
///
/// # Safety
/// `source` is valid for reads and `target` for writes of `len` bytes, and they do not overlap.
unsafe fn copy_volatile(source: *const u8, target: *mut u8, len: usize) {
    let mut done = 0;
    if source.addr().is_multiple_of(8) {
        while len - done >= 8 {
            // SAFETY: within `len` bytes of both (loop condition). The source is aligned for u64 (checked above, and
            // `done` is a multiple of 8); the target needs no alignment.
            unsafe {
                let word = ptr::read_volatile(source.add(done).cast::<u64>());
                ptr::write_unaligned(target.add(done).cast::<u64>(), word);
            }
            done += 8;
        }
    }
    while done < len {
        // SAFETY: within `len` bytes of both (loop condition).
        unsafe { ptr::write(target.add(done), ptr::read_volatile(source.add(done))) };
        done += 1;
    }
}
