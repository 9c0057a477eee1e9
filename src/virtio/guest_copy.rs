//! Copies between the guest's memory and ours.
//!
//! A request's data is a list of guest ranges read as one stream of bytes. [`GuestCursor`] copies any stretch of that
//! stream to or from host memory and remembers where it stopped, so that reading on costs nothing and jumping costs the
//! number of ranges jumped over.
//!
//! The guest may write to its memory while we copy. No reference to guest memory is ever formed: all access is through
//! raw pointers, and bytes whose values steer the daemon are fetched with volatile reads ([`read_once`]), so that the
//! compiler can't fetch them a second time after they were checked.

use std::ptr;

use vm_memory::{Address, Bytes, GuestAddress};

use crate::virtio::{GuestRam, Status};

#[cfg(test)]
mod tests;

/// Bytes of a line of the processor's cache.
pub const CACHE_LINE_BYTES: usize = 64;

/// A run of guest memory, as the guest describes it: nothing is known of it but its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestRange {
    /// First byte.
    pub addr: GuestAddress,
    /// Length in bytes.
    pub len: u32,
}

/// A copy left the request's data or the guest's memory. Some bytes may have been copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadAddress;

/// Reads and writes the data of one request.
#[derive(Debug)]
pub struct GuestCursor<'a> {
    mem: &'a GuestRam,
    ranges: &'a [GuestRange],
    /// Range in the list where the cursor stands; not beyond the last one's successor.
    index: usize,
    /// Offset in the data of that range's first byte: the sum of the lengths of `ranges[..index]`.
    start: u64,
}

impl<'a> GuestCursor<'a> {
    /// A cursor at the start of the data.
    pub fn new(mem: &'a GuestRam, ranges: &'a [GuestRange]) -> Self {
        Self { mem, ranges, index: 0, start: 0 }
    }

    /// Copies `len` bytes at byte `offset` of the data from the guest to `target`.
    ///
    /// # Safety
    /// `target` is valid for writes of `len` bytes, is not guest memory, and nobody else uses it meanwhile.
    ///
    /// # Errors
    /// [`BadAddress`] when the stretch is not wholly in the data and in guest memory.
    pub unsafe fn copy_from_guest(&mut self, offset: u64, target: *mut u8, len: usize) -> Result<(), BadAddress> {
        self.each_piece(offset, len, |done, guest, count| {
            // SAFETY: `guest` is valid for `count` bytes of mapped guest memory (each_piece); `target` for `len` bytes,
            // of which this piece is `done..done + count` (caller); the two do not overlap (caller). The guest may
            // change the bytes meanwhile: they are disk content, any value will do.
            unsafe { ptr::copy_nonoverlapping(guest, target.add(done), count) };
        })
    }

    /// Copies `len` bytes from `source` to byte `offset` of the data in the guest. `next` is where the next such copy will
    /// read, if that is somewhere else: see [`copy_looking_ahead`].
    ///
    /// # Safety
    /// `source` is valid for reads of `len` bytes, is not guest memory, and nobody writes to it meanwhile.
    ///
    /// # Errors
    /// [`BadAddress`] when the stretch is not wholly in the data and in guest memory.
    pub unsafe fn copy_to_guest(
        &mut self,
        offset: u64,
        source: *const u8,
        len: usize,
        next: Option<*const u8>,
    ) -> Result<(), BadAddress> {
        self.each_piece(offset, len, |done, guest, count| match next {
            // SAFETY: as in copy_from_guest, with the roles exchanged.
            None => unsafe { ptr::copy_nonoverlapping(source.add(done), guest, count) },
            // SAFETY: the same.
            Some(next) => unsafe { copy_looking_ahead(source.add(done), guest, count, next.wrapping_add(done)) },
        })
    }

    /// Writes `bytes` to byte `offset` of the data in the guest.
    ///
    /// # Errors
    /// As [`Self::copy_to_guest`].
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), BadAddress> {
        // SAFETY: a shared slice is valid for reads of its length, and no Rust slice covers guest memory.
        unsafe { self.copy_to_guest(offset, bytes.as_ptr(), bytes.len(), None) }
    }

    /// Fills `bytes` from byte `offset` of the data, each byte fetched once.
    ///
    /// # Errors
    /// As [`Self::copy_from_guest`].
    pub fn read(&mut self, offset: u64, bytes: &mut [u8]) -> Result<(), BadAddress> {
        let target = bytes.as_mut_ptr();
        self.each_piece(offset, bytes.len(), |done, guest, count| {
            // SAFETY: `guest` is valid for `count` bytes (each_piece), `target` for the slice's length, of which this
            // piece is `done..done + count`; no Rust slice covers guest memory.
            unsafe { copy_volatile(guest, target.add(done), count) };
        })
    }

    /// Writes `len` zeros to byte `offset` of the data in the guest.
    ///
    /// # Errors
    /// As [`Self::copy_to_guest`].
    pub fn fill_zeros(&mut self, offset: u64, len: usize) -> Result<(), BadAddress> {
        self.each_piece(offset, len, |_, guest, count| {
            // SAFETY: `guest` is valid for writes of `count` bytes of mapped guest memory (each_piece).
            unsafe { ptr::write_bytes(guest, 0, count) };
        })
    }

    /// Calls `f(bytes done before, host address, length)` for each contiguous piece of the stretch, in order.
    ///
    /// => Each piece is mapped guest memory of that length, for the duration of the call.
    #[inline]
    fn each_piece(
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
            each_mapping(self.mem, addr, count, |inner, host, mapped| {
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

    /// Stands on the range that holds byte `offset` of the data.
    fn seek(&mut self, offset: u64) -> Result<(), BadAddress> {
        while offset < self.start {
            // The sum of no ranges is 0 and no offset is below it, so there is a range to step back over.
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

    /// Steps to the next range.
    ///
    /// => There is a current range.
    fn step(&mut self) {
        self.start += u64::from(self.ranges[self.index].len);
        self.index += 1;
    }
}

/// Calls `f(bytes done before, host address, length)` for each mapping behind `len` bytes at `addr`.
#[inline]
fn each_mapping(
    mem: &GuestRam,
    addr: GuestAddress,
    len: usize,
    mut f: impl FnMut(usize, *mut u8, usize),
) -> Result<(), BadAddress> {
    // Nearly always one region holds it all. Without xen's on-demand mappings the pointer guard is a plain pointer.
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

/// Calls for the line of the processor's cache that holds the byte at `place`, which need not be a valid address.
#[cfg_attr(not(target_arch = "x86_64"), allow(unused_variables, reason = "there is no portable way to say it"))]
pub fn prefetch(place: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint: it reads nothing that the program could see, and no address makes it fail.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(place.cast());
    };
}

/// Copies `len` bytes, and calls for as many at `next` meanwhile, line by line.
///
/// => A page that was not used lately is in no cache of the processor's, and its own prefetcher stops at the end of each
///    page: without this, every copy of a page begins with a wait for memory. (Measured on an EPYC: 185 ns for a page from
///    128 MiB, 245 ns with a hint for the next page's beginning alone, 270 ns with none; and no loss where all is in the
///    cache.)
///
/// # Safety
/// As for [`ptr::copy_nonoverlapping`]; `next` may be any address.
unsafe fn copy_looking_ahead(source: *const u8, target: *mut u8, len: usize, next: *const u8) {
    let mut done = 0;
    while len - done >= CACHE_LINE_BYTES {
        prefetch(next.wrapping_add(done));
        // SAFETY: within `len` bytes of both (loop condition).
        unsafe { ptr::copy_nonoverlapping(source.add(done), target.add(done), CACHE_LINE_BYTES) };
        done += CACHE_LINE_BYTES;
    }
    // SAFETY: the rest of both.
    unsafe { ptr::copy_nonoverlapping(source.add(done), target.add(done), len - done) };
}

/// Fills `target` from guest memory at `addr`, fetching each byte exactly once.
///
/// # Errors
/// [`BadAddress`] when the range is not wholly in guest memory.
pub fn read_once(mem: &GuestRam, addr: GuestAddress, target: &mut [u8]) -> Result<(), BadAddress> {
    let start = target.as_mut_ptr();
    each_mapping(mem, addr, target.len(), |done, guest, count| {
        // SAFETY: `guest` is valid for `count` bytes (each_mapping), `start` for the slice's length, of which this piece
        // is `done..done + count`; no Rust slice covers guest memory.
        unsafe { copy_volatile(guest, start.add(done), count) };
    })
}

/// Writes a request's status byte.
///
/// # Errors
/// [`BadAddress`] when the address is not in guest memory (any more).
pub fn write_status(mem: &GuestRam, addr: GuestAddress, status: Status) -> Result<(), BadAddress> {
    let place = mem.slice(addr, 1).ok_or(BadAddress)?;
    place.write_obj(status as u8, 0).map_err(|_| BadAddress)
}

/// Copies `len` bytes with volatile reads: eight at a time where the source allows.
///
/// # Safety
/// `source` is valid for reads and `target` for writes of `len` bytes, and they do not overlap.
unsafe fn copy_volatile(source: *const u8, target: *mut u8, len: usize) {
    let mut done = 0;
    if source.addr().is_multiple_of(8) {
        while len - done >= 8 {
            // SAFETY: within `len` bytes of both (loop condition); the source is aligned for u64 (checked, and `done` is
            // a multiple of 8), the target needs no alignment.
            unsafe {
                let word = ptr::read_volatile(source.add(done).cast::<u64>());
                ptr::write_unaligned(target.add(done).cast::<u64>(), word);
            }
            done += 8;
        }
    }
    while done < len {
        // SAFETY: within `len` bytes of both (loop condition); a byte needs no alignment.
        unsafe { ptr::write(target.add(done), ptr::read_volatile(source.add(done))) };
        done += 1;
    }
}
