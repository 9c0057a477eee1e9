//! Mapped shared memory, without any knowledge of its layout.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use log::debug;

use crate::fault_injection::crash_point;
use crate::shared_memory::{self, FileChange};
use crate::sys::cgroup;
use crate::sys::file::{FallocateMode, fallocate};
use crate::sys::file_system::FileSystem;
use crate::sys::memory::exclude_from_dumps;
use crate::sys::racing;

/// Name in /proc of the memory of an arena without a path.
pub(super) const MEMFD_NAME: &CStr = c"genblk-cache";

/// Size of a huge page on x86-64 and on every architecture with base pages of 4 KiB.
pub(super) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A mapping of the beginning of a file.
#[derive(Debug)]
pub(super) struct Mapping {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: a mapping is an address range that lives as long as the value; the page cache decides which thread may touch
// which bytes.
unsafe impl Send for Mapping {}
// SAFETY: as above; every method that touches bytes either uses atomics or requires the caller to own the bytes.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `bytes` bytes of a file that is at least that long. The length is rounded up to whole blocks of
    /// the file system, because huge pages cannot be unmapped in part.
    ///
    /// => The mapping is aligned for huge pages ([`Mapping::collapse`]), and is not part of core dumps, because it
    ///    holds data of guests.
    ///
    /// # Errors
    /// Errors of mmap(2) and fstatfs(2).
    pub fn new(file: &File, bytes: usize) -> io::Result<Self> {
        Self::with_protection(file, bytes, libc::PROT_READ | libc::PROT_WRITE)
    }

    /// Like [`Mapping::new`], for a file that is open for reading only. A store to the mapping raises SIGSEGV.
    ///
    /// # Errors
    /// As [`Mapping::new`].
    pub fn for_reading(file: &File, bytes: usize) -> io::Result<Self> {
        Self::with_protection(file, bytes, libc::PROT_READ)
    }

    fn with_protection(file: &File, bytes: usize, protection: i32) -> io::Result<Self> {
        let file_system = FileSystem::of(file)?;
        let bytes = whole_blocks(&file_system, bytes)?;
        let alignment = file_system.block_bytes.max(HUGE_PAGE_BYTES);
        let reserved = bytes.checked_add(alignment).ok_or(io::ErrorKind::FileTooLarge)?;
        // Reserve addresses first: the kernel aligns a mapping for base pages only.
        // SAFETY: a new mapping at an address that the kernel chooses replaces no other mapping.
        let start =
            unsafe { map(ptr::null_mut(), reserved, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1) }?;
        let before = start.align_offset(alignment);
        let base = start.wrapping_add(before);
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: it replaces a part of the reservation above, which nothing else uses.
        let mapped = unsafe { map(base, bytes, protection, flags, file.as_raw_fd()) };
        // SAFETY: both ranges still belong to the reservation. (If map() failed, the range between them may be unmapped
        // already and belong to another mapping, so it is left alone.)
        unsafe {
            unmap(start, before);
            unmap(base.wrapping_add(bytes), reserved - before - bytes);
        }
        mapped?;
        if let Err(e) = exclude_from_dumps(base.addr()..base.addr() + bytes) {
            // The memory works without it; a kernel that lacks the advice was built without core dumps.
            debug!("cannot keep the cache's memory out of core dumps: {e}");
        }
        shared_memory::changed(file, FileChange::Mapped(base.addr(), bytes));
        Ok(Self { base, bytes })
    }

    /// The address of byte `at`.
    pub fn at(&self, at: usize) -> *mut u8 {
        assert!(at < self.bytes, "byte {at} is outside a mapping of {} bytes", self.bytes);
        // SAFETY: the offset was checked, so the address lies within the mapping.
        unsafe { self.base.add(at) }
    }

    /// The address of byte `at`, the first of `len` bytes within the mapping.
    fn range(&self, at: usize, len: usize) -> *mut u8 {
        assert!(
            len <= self.bytes && at <= self.bytes - len,
            "{len} bytes at {at} exceed a mapping of {} bytes",
            self.bytes
        );
        self.base.wrapping_add(at)
    }

    /// The word at byte `at`, a multiple of eight.
    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8), "byte {at} is not the first of a word");
        // SAFETY: eight aligned bytes of a mapping that outlives the reference. Words are accessed as atomics only,
        // except by `read`, which runs before the mapping is shared.
        unsafe { AtomicU64::from_ptr(self.range(at, 8).cast()) }
    }

    /// Loads the word at byte `at`, a multiple of eight.
    pub fn load(&self, at: usize) -> u64 {
        self.word(at).load(Ordering::Acquire)
    }

    /// Stores the word at byte `at`, a multiple of eight, after all earlier stores.
    pub fn store(&self, at: usize, value: u64) {
        shared_memory::store(self.word(at), value, Ordering::Release);
    }

    /// Length of the mapping.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Faults in up to `bytes` bytes, starting at byte `at`, a multiple of the page size, without changing them.
    ///
    /// # Errors
    /// Errors of madvise(2); EINVAL before Linux 5.14.
    pub fn populate(&self, at: usize, bytes: usize) -> io::Result<()> {
        let bytes = bytes.min(self.bytes - at);
        // SAFETY: the range lies within the mapping; the call faults its pages in and changes no byte.
        match unsafe { libc::madvise(self.range(at, bytes).cast(), bytes, libc::MADV_POPULATE_WRITE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Collapses the base pages of [`HUGE_PAGE_BYTES`] bytes, starting at byte `at`, a multiple of that, into one huge
    /// page. Addresses and bytes stay the same; address translation gets faster, for the CPU and for the kernel's
    /// transfers.
    ///
    /// # Errors
    /// Errors of madvise(2); EINVAL before Linux 6.1.
    pub fn collapse(&self, at: usize) -> io::Result<()> {
        assert!(at.is_multiple_of(HUGE_PAGE_BYTES), "byte {at} is not the first of a huge page");
        let first = self.range(at, HUGE_PAGE_BYTES);
        // SAFETY: the range lies within the mapping; the call changes neither an address nor a byte.
        match unsafe { libc::madvise(first.cast(), HUGE_PAGE_BYTES, libc::MADV_COLLAPSE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Copies bytes, starting at byte `at`, to `target`.
    ///
    /// => No other thread writes the bytes meanwhile.
    pub fn read(&self, at: usize, target: &mut [u8]) {
        let source = self.range(at, target.len());
        // SAFETY: the source lies within the mapping, and the target is a slice of that length outside it.
        unsafe { ptr::copy_nonoverlapping(source, target.as_mut_ptr(), target.len()) };
    }

    /// Copies `len` bytes from byte `source` to byte `target`; the two ranges do not overlap.
    ///
    /// => Guests may read and write both meanwhile: they get any mixture of old and new bytes.
    pub fn copy(&self, source: usize, target: usize, len: usize) {
        assert!(source.abs_diff(target) >= len, "the ranges at {source} and {target} overlap");
        crash_point();
        // SAFETY: both ranges lie within the mapping, of which no reference exists, and they do not overlap.
        unsafe { racing::copy(self.range(source, len), self.range(target, len), len, None) };
        self.trace_copied(target, len);
    }

    /// Fills `len` bytes with zeros, starting at byte `at`.
    ///
    /// => As [`Self::copy`].
    pub fn zero(&self, at: usize, len: usize) {
        crash_point();
        // SAFETY: the range lies within the mapping, of which no reference exists.
        unsafe { racing::zero(self.range(at, len), len) };
        self.trace_copied(at, len);
    }

    fn trace_copied(&self, at: usize, len: usize) {
        shared_memory::copied(self.range(at, len), || {
            let mut bytes = vec![0; len];
            self.read(at, &mut bytes);
            bytes
        });
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mapping made in new(); nothing uses it after the value is dropped.
        unsafe { unmap(self.base, self.bytes) };
    }
}

/// mmap(2), from the beginning of a file.
///
/// # Safety
/// With MAP_FIXED, the call replaces whatever is mapped there.
unsafe fn map(at: *mut u8, bytes: usize, protection: i32, flags: i32, fd: RawFd) -> io::Result<*mut u8> {
    // SAFETY: the caller guarantees that the range is valid.
    match unsafe { libc::mmap(at.cast(), bytes, protection, flags, fd, 0) } {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        base => Ok(base.cast()),
    }
}

/// munmap(2); does nothing for an empty range.
///
/// # Safety
/// Nothing uses the range.
unsafe fn unmap(at: *mut u8, bytes: usize) {
    if bytes > 0 {
        // SAFETY: the caller guarantees that the range is valid. The call fails only for an invalid range.
        unsafe { libc::munmap(at.cast(), bytes) };
    }
}

/// Extends a file in shared memory to at least `bytes` bytes, unless it is already that long, and allocates the memory
/// for these parts of it. Without that the kernel allocates at the first touch, and raises SIGBUS if there is no memory
/// left.
///
/// # Errors
/// Errors of fallocate(2) and fstatfs(2), and an error with the available memory of the host or a control group, if
/// that is less than the parts need.
pub(super) fn allocate(file: &File, bytes: usize, parts: &[Range<usize>]) -> io::Result<()> {
    // Devices start in parallel: memory that one has checked must still be available when it allocates.
    static ALLOCATING: Mutex<()> = Mutex::new(());
    let _allocating = ALLOCATING.lock();
    let file_system = FileSystem::of(file)?;
    let rounded = whole_blocks(&file_system, bytes)? as u64;
    if !file_system.is_hugetlbfs {
        let wanted = parts.iter().map(|part| part.len() as u64).fold(0, u64::saturating_add);
        check_available(wanted.next_multiple_of(file_system.block_bytes as u64))?;
    }
    // A sealed file must not shrink.
    if file.metadata()?.len() < rounded {
        set_length(file, bytes)?;
    }
    allocate_parts(file, parts)
}

/// Allocates the memory for parts of a file in shared memory that is long enough.
///
/// # Errors
/// Errors of fallocate(2) and fstatfs(2).
pub(super) fn allocate_parts(file: &File, parts: &[Range<usize>]) -> io::Result<()> {
    let file_system = FileSystem::of(file)?;
    for part in parts.iter().filter(|part| !part.is_empty()) {
        let first = part.start - part.start % file_system.block_bytes;
        let end = whole_blocks(&file_system, part.end)?;
        fallocate(file, FallocateMode::Reserve, first as u64, (end - first) as u64)?;
    }
    Ok(())
}

/// Frees the memory of a part of a file in shared memory. Neither the part nor anything behind its start is in use.
///
/// # Errors
/// Errors of fallocate(2) and fstatfs(2).
pub(super) fn free_part(file: &File, part: Range<usize>) -> io::Result<()> {
    let file_system = FileSystem::of(file)?;
    let (first, end) = (whole_blocks(&file_system, part.start)?, whole_blocks(&file_system, part.end)?);
    if first < end {
        crash_point();
        fallocate(file, FallocateMode::PunchHole, first as u64, (end - first) as u64)?;
        shared_memory::changed(file, FileChange::ZerosFrom(first as u64));
    }
    Ok(())
}

/// Truncates or extends a file in shared memory to `bytes` bytes, rounded up to whole blocks: hugetlbfs rejects a
/// length that is not a multiple of its page size.
///
/// # Errors
/// Errors of ftruncate(2) and fstatfs(2).
pub(super) fn set_length(file: &File, bytes: usize) -> io::Result<()> {
    let rounded = whole_blocks(&FileSystem::of(file)?, bytes)? as u64;
    crash_point();
    file.set_len(rounded)?;
    shared_memory::changed(file, FileChange::Length(rounded));
    Ok(())
}

/// Frees the memory behind the first `bytes` bytes of a file of base pages. The file keeps its length and reads as
/// zeros there.
///
/// # Errors
/// Errors of fallocate(2) and fstat(2).
pub(super) fn free_behind(file: &File, bytes: usize) -> io::Result<()> {
    let (first, end) = (bytes as u64, file.metadata()?.len());
    if first < end {
        crash_point();
        fallocate(file, FallocateMode::PunchHole, first, end - first)?;
        shared_memory::changed(file, FileChange::ZerosFrom(first));
    }
    Ok(())
}

/// `bytes` rounded up to a multiple of the file system's block size.
fn whole_blocks(file_system: &FileSystem, bytes: usize) -> io::Result<usize> {
    bytes.checked_next_multiple_of(file_system.block_bytes).ok_or_else(|| io::ErrorKind::FileTooLarge.into())
}

/// Share of a cache that its tables take, as a divisor: 3 percent, twice the limit that a test enforces.
const TABLES_DIVISOR: u64 = 32;

/// Fails if the host has less than `bytes` bytes of memory available, or a control group of this process allows less:
/// the kernel overcommits shared memory, and then kills processes.
pub(super) fn check_available(bytes: u64) -> io::Result<()> {
    if let Some(available) = available_bytes()
        && bytes > available
    {
        return Err(io::Error::other(format!("the host has {available} bytes available")));
    }
    match cgroup::tightest_memory_limit() {
        Some(limit) if bytes.saturating_add(bytes / TABLES_DIVISOR) > limit.available_bytes() => {
            let (file, max, used) = (limit.file.display(), limit.limit_bytes, limit.used_bytes);
            let why = format!("{file} limits memory to {max} bytes, of which {used} are in use");
            Err(io::Error::other(format!("{why}; raise it (MemoryMax= of a unit) or make the cache smaller")))
        }
        _ => Ok(()),
    }
}

/// Memory that the host can provide without swapping (MemAvailable of proc(5)); `None` if it does not report it.
fn available_bytes() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
