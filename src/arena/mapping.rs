//! Shared memory, mapped: the bytes and nothing about what they mean.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

/// A huge page of x86-64, and of others with small pages of 4 KiB.
pub(super) const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A mapping of the beginning of a file.
#[derive(Debug)]
pub(super) struct Mapping {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: a mapping is an address range that lives as long as the value; who touches which bytes is agreed elsewhere.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method reads or writes bytes but through atomics or in functions that say who owns them.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `bytes` bytes of a file that is at least that long, in whole blocks of its file system: huge pages
    /// are unmapped whole or not at all.
    ///
    /// => Lies so that it can be mapped in huge pages ([`Mapping::collapse`]).
    pub fn new(file: &File, bytes: usize) -> io::Result<Self> {
        let on = FileSystem::of(file)?;
        let bytes = on.whole_blocks(bytes)?;
        let alignment = on.block_bytes.max(HUGE_PAGE_BYTES);
        let reserved = bytes.checked_add(alignment).ok_or(io::ErrorKind::FileTooLarge)?;
        // Addresses first: the kernel chooses them as if small pages were all there is.
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours.
        let start =
            unsafe { map(ptr::null_mut(), reserved, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1) }?;
        let before = start.align_offset(alignment);
        let base = start.wrapping_add(before);
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
        // SAFETY: it replaces a part of what was reserved above, which nobody knows of.
        let mapped = unsafe { map(base, bytes, protection, flags, file.as_raw_fd()) };
        // SAFETY: what lies before and behind is as it was reserved. (What lies between is left alone where it could not be
        // mapped: that may have unmapped it all the same, and it may be somebody else's by now.)
        unsafe {
            unmap(start, before);
            unmap(base.wrapping_add(bytes), reserved - before - bytes);
        }
        mapped.map(|_| Self { base, bytes })
    }

    /// The address of byte `at`.
    pub fn at(&self, at: usize) -> *mut u8 {
        assert!(at < self.bytes, "byte {at} is outside a mapping of {}", self.bytes);
        // SAFETY: the offset was checked, so the address lies within the mapping.
        unsafe { self.base.add(at) }
    }

    /// The word at byte `at`, a multiple of eight.
    pub fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.bytes, "byte {at} begins no word");
        // SAFETY: eight aligned bytes of a mapping that outlives the reference; words are only touched as atomics, but
        // by `read` and `write`, which run before anybody shares the mapping.
        unsafe { AtomicU64::from_ptr(self.base.add(at).cast()) }
    }

    /// Length of the mapping.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Makes up to `bytes` bytes from byte `at` on, a multiple of the page size, ready for use, without changing them.
    pub fn populate(&self, at: usize, bytes: usize) -> io::Result<()> {
        let bytes = bytes.min(self.bytes - at);
        // SAFETY: the range lies within the mapping; the call faults its pages in and touches no byte.
        match unsafe { libc::madvise(self.at(at).cast(), bytes, libc::MADV_POPULATE_WRITE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes one huge page of those that hold the [`HUGE_PAGE_BYTES`] bytes from byte `at` on, a multiple of that, without
    /// changing them: the processor looks up its addresses faster, and so does the kernel for a transfer.
    ///
    /// # Errors
    /// The kernel's. Linux has had it since 6.1.
    pub fn collapse(&self, at: usize) -> io::Result<()> {
        assert!(at.is_multiple_of(HUGE_PAGE_BYTES) && at + HUGE_PAGE_BYTES <= self.bytes, "byte {at} begins no page");
        // SAFETY: the range lies within the mapping; the call moves its bytes, and no address or byte changes.
        match unsafe { libc::madvise(self.at(at).cast(), HUGE_PAGE_BYTES, libc::MADV_COLLAPSE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Copies out the first `N` bytes of a mapping that nobody else uses yet.
    pub fn read<const N: usize>(&self) -> [u8; N] {
        assert!(N <= self.bytes);
        let mut bytes = [0; N];
        // SAFETY: the range lies within the mapping, and the target is ours.
        unsafe { ptr::copy_nonoverlapping(self.base, bytes.as_mut_ptr(), N) };
        bytes
    }

    /// Fills the first bytes of a mapping that nobody else uses yet; its first word comes last.
    pub fn write(&self, bytes: &[u8], first_word: u64) {
        assert!(bytes.len() <= self.bytes);
        // SAFETY: the range lies within the mapping.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.base, bytes.len()) };
        self.word(0).store(first_word, Ordering::Release);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and length are those of the mapping made in new(); nothing uses it after the value is gone.
        unsafe { unmap(self.base, self.bytes) };
    }
}

/// mmap(2), from the beginning of a file.
///
/// # Safety
/// With MAP_FIXED: what is mapped there may go.
unsafe fn map(at: *mut u8, bytes: usize, protection: i32, flags: i32, fd: RawFd) -> io::Result<*mut u8> {
    // SAFETY: it is up to the caller.
    match unsafe { libc::mmap(at.cast(), bytes, protection, flags, fd, 0) } {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        base => Ok(base.cast()),
    }
}

/// munmap(2); of no bytes, nothing.
///
/// # Safety
/// Nobody uses the range any more.
unsafe fn unmap(at: *mut u8, bytes: usize) {
    if bytes > 0 {
        // SAFETY: it is up to the caller. The call fails only for a range that can't be.
        unsafe { libc::munmap(at.cast(), bytes) };
    }
}

/// Memory without a name, that can be sealed.
pub(super) fn memfd() -> io::Result<File> {
    // SAFETY: a plain system call with a constant NUL-terminated name.
    let fd = unsafe { libc::memfd_create(c"genblk-cache".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: memfd_create returned a new descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

/// Gives a file in shared memory `bytes` bytes and the memory for them: it is allocated at the first touch otherwise, and
/// a shortage then is SIGBUS.
pub(super) fn allocate(file: &File, bytes: usize) -> io::Result<()> {
    let on = FileSystem::of(file)?;
    let rounded = on.whole_blocks(bytes)?;
    if !on.reserves {
        available(rounded)?;
    }
    let length = libc::off_t::try_from(rounded).map_err(|_| io::ErrorKind::FileTooLarge)?;
    file.set_len(rounded as u64)?;
    // SAFETY: a plain system call on our own descriptor.
    if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// What matters of the file system that a file is on.
struct FileSystem {
    block_bytes: usize,
    /// Its memory was set aside when the host was set up (hugetlbfs), and is not taken from what is available.
    reserves: bool,
}

impl FileSystem {
    fn of(file: &File) -> io::Result<Self> {
        // SAFETY: an all-zero statfs is a valid value for the kernel to fill.
        let mut about: libc::statfs = unsafe { std::mem::zeroed() };
        // SAFETY: a plain system call on our own descriptor that fills our own structure.
        if unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut about) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let block_bytes = usize::try_from(about.f_bsize).unwrap_or(1).max(1);
        Ok(Self { block_bytes, reserves: about.f_type == libc::HUGETLBFS_MAGIC })
    }

    fn whole_blocks(&self, bytes: usize) -> io::Result<usize> {
        bytes.checked_next_multiple_of(self.block_bytes).ok_or_else(|| io::ErrorKind::FileTooLarge.into())
    }
}

/// Shared memory can be over-committed until the kernel starts to kill processes: ask before taking it.
fn available(bytes: usize) -> io::Result<()> {
    match available_bytes() {
        Some(available) if bytes as u64 > available => {
            Err(io::Error::other(format!("the host has {available} bytes available")))
        }
        _ => Ok(()),
    }
}

/// What the host can give without swapping (MemAvailable of proc(5)); `None` where it doesn't say.
fn available_bytes() -> Option<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
