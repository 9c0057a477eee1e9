//! The memory behind FrameIds: one memfd mapping, cut into 4 KiB frames.
//!
//! The arena hands out addresses; who may touch a frame's bytes is decided by the page cache's references (pins, store
//! operations, residency), never here.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr;

use crate::error::{Error, ErrorKind, Result};
use crate::units::{FrameId, PAGE_SIZE, SECTOR_SIZE, SectorMask};

/// A mapping of `frames` times 4096 bytes.
#[derive(Debug)]
pub struct Arena {
    base: *mut u8,
    frames: usize,
    // The mapping keeps the memory alive; the descriptor names it (in /proc, and for a later hand-over).
    _memfd: File,
}

// SAFETY: the arena is an address range that lives as long as the value. Its users agree on who touches which frame
// through the page cache's references, so sharing the address between threads is sound.
unsafe impl Send for Arena {}
// SAFETY: as above; no method of the arena itself reads or writes frames but those marked unsafe.
unsafe impl Sync for Arena {}

impl Arena {
    /// Reserves `frames` frames of zeroed memory.
    ///
    /// # Errors
    /// [`ErrorKind::Memory`] when the host refuses, or has less memory available than that; the memory is reserved now,
    /// so that a guest's request never meets a shortage later.
    pub fn new(frames: usize) -> Result<Self> {
        let bytes = frames.checked_mul(PAGE_SIZE).ok_or_else(|| {
            Error::new(ErrorKind::Memory, format!("a cache of {frames} pages overflows the address space"))
        })?;
        let refused = |e: io::Error| Error::io(ErrorKind::Memory, format!("no memory for a cache of {bytes} bytes"), e);
        // Shared memory can be over-committed until the kernel starts to kill processes: ask before taking it.
        if let Some(available) = available_memory_bytes()
            && bytes as u64 > available
        {
            let context = format!("no memory for a cache of {bytes} bytes: the host has {available} available");
            return Err(Error::new(ErrorKind::Memory, context));
        }
        // SAFETY: a plain system call with a constant NUL-terminated name.
        let fd = unsafe { libc::memfd_create(c"genblk-cache".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(refused(io::Error::last_os_error()));
        }
        // SAFETY: memfd_create returned a new descriptor that nobody else owns.
        let memfd = unsafe { File::from_raw_fd(fd) };
        let length = libc::off_t::try_from(bytes).map_err(|_| {
            Error::new(ErrorKind::Memory, format!("a cache of {bytes} bytes is larger than a file can be"))
        })?;
        memfd.set_len(bytes as u64).map_err(refused)?;
        // Shared memory is allocated at the first touch, and a shortage then is SIGBUS: allocate it now instead.
        // SAFETY: a plain system call on our own descriptor.
        if unsafe { libc::fallocate(memfd.as_raw_fd(), 0, 0, length) } != 0 {
            return Err(refused(io::Error::last_os_error()));
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                memfd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(refused(io::Error::last_os_error()));
        }
        Ok(Self { base: base.cast(), frames, _memfd: memfd })
    }

    /// Number of frames.
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// First byte of a frame.
    ///
    /// # Panics
    /// If `frame` is not of this arena: the page cache's bookkeeping is broken.
    pub fn frame(&self, frame: FrameId) -> *mut u8 {
        assert!(frame.index() < self.frames, "{frame:?} is outside the arena");
        // SAFETY: the index was checked, so the address lies within the mapping.
        unsafe { self.base.add(frame.index() * PAGE_SIZE) }
    }

    /// Copies the sectors of `mask` from one frame to the same places of another.
    pub fn copy_sectors(&self, source: FrameId, target: FrameId, mask: SectorMask) {
        let (source, target) = (self.frame(source), self.frame(target));
        each_run(mask, |offset, len| {
            // SAFETY: both frames lie in the arena and are distinct pages; the caller (the page cache, under its lock)
            // owns the target's sectors.
            unsafe { ptr::copy_nonoverlapping(source.add(offset), target.add(offset), len) };
        });
    }

    /// Fills the sectors of `mask` with zeros.
    pub fn zero_sectors(&self, frame: FrameId, mask: SectorMask) {
        let target = self.frame(frame);
        each_run(mask, |offset, len| {
            // SAFETY: the frame lies in the arena; the caller owns those sectors.
            unsafe { ptr::write_bytes(target.add(offset), 0, len) };
        });
    }
}

/// What the host can give without swapping (MemAvailable of proc(5)); `None` where it doesn't say.
fn available_memory_bytes() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mapping made in new(); nothing uses it after the value is gone.
        unsafe { libc::munmap(self.base.cast(), self.frames * PAGE_SIZE) };
    }
}

/// Calls `f(offset, length)` in bytes for each run of sectors in `mask`.
fn each_run(mut mask: SectorMask, mut f: impl FnMut(usize, usize)) {
    let sector = SECTOR_SIZE;
    while let Some((first, count)) = mask.first_run() {
        f(usize::from(first) * sector, usize::from(count) * sector);
        mask = mask.without(SectorMask::run(first, count));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_are_copied_and_zeroed_by_mask_only() {
        let arena = Arena::new(2).unwrap();
        let (a, b) = (FrameId(0), FrameId(1));
        // SAFETY: both frames belong to this test alone.
        unsafe {
            ptr::write_bytes(arena.frame(a), 7, PAGE_SIZE);
            ptr::write_bytes(arena.frame(b), 9, PAGE_SIZE);
        }
        arena.copy_sectors(a, b, SectorMask(0b0010_0110));
        arena.zero_sectors(b, SectorMask(0b1000_0000));
        let expected = [9, 7, 7, 9, 9, 7, 9, 0];
        for (sector, want) in expected.into_iter().enumerate() {
            for byte in 0..512 {
                // SAFETY: within the frame.
                assert_eq!(unsafe { *arena.frame(b).add(sector * 512 + byte) }, want);
            }
        }
    }

    #[test]
    fn an_arena_beyond_memory_is_refused_with_a_clear_error() {
        for frames in [1 << 40, usize::MAX / 2] {
            assert_eq!(Arena::new(frames).unwrap_err().kind(), ErrorKind::Memory);
        }
    }
}
