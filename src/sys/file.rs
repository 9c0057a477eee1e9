//! The system calls that std does not wrap, each behind one small function; an error is the system's `errno`.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

/// A piece of memory for a `Read` or `Write`: `len` bytes from `base`. Laid out as the system's `iovec`, so that a
/// request's segments are handed to the kernel as they are.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// First byte.
    pub base: *mut u8,
    /// Length in bytes.
    pub len: usize,
}

// SAFETY: a Segment is an address; who may touch the bytes is governed by the request that owns it (contract above).
unsafe impl Send for Segment {}

const _: () = assert!(
    size_of::<Segment>() == size_of::<libc::iovec>()
        && std::mem::offset_of!(Segment, base) == std::mem::offset_of!(libc::iovec, iov_base)
        && std::mem::offset_of!(Segment, len) == std::mem::offset_of!(libc::iovec, iov_len),
    "a Segment is an iovec"
);

// From <linux/fs.h>; libc does not carry these.
const BLKGETDISKSEQ: libc::Ioctl = 0x8008_1280;
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;

/// Whether an error number means that the host can't do this at all, as opposed to that it failed.
pub fn is_unsupported(errno: i32) -> bool {
    matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
}

/// The error number of `error`; EIO where the system gave none.
pub fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Runs a system call that returns a negative number on failure, again after each EINTR.
fn retried<T: PartialOrd + From<i8>>(mut call: impl FnMut() -> T) -> io::Result<T> {
    loop {
        let result = call();
        if result >= T::from(0) {
            return Ok(result);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINTR) {
            return Err(error);
        }
    }
}

/// A file offset as the system takes it.
fn off(bytes: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

/// One preadv or pwritev; may move less than asked.
///
/// # Safety
/// The segments must name memory that this thread may write (for `write == false`) or read.
pub unsafe fn transfer(file: &File, write: bool, segments: &[Segment], offset: u64) -> io::Result<u64> {
    let (fd, offset) = (file.as_raw_fd(), off(offset)?);
    let array = segments.as_ptr().cast::<libc::iovec>();
    let count = libc::c_int::try_from(segments.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let moved = retried(|| {
        if write {
            // SAFETY: a Segment is an iovec (asserted beside it); the caller vouches for the memory.
            unsafe { libc::pwritev(fd, array, count, offset) }
        } else {
            // SAFETY: as above.
            unsafe { libc::preadv(fd, array, count, offset) }
        }
    })?;
    Ok(u64::try_from(moved).expect("retried() returns no negative count"))
}

/// fallocate(2).
pub fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (off(offset)?, off(len)?);
    // SAFETY: a plain system call on an open descriptor; no memory is involved.
    retried(|| unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) }).map(drop)
}

/// lseek(2) with SEEK_DATA or SEEK_HOLE. It moves the file's position, which nothing here uses.
pub fn seek(file: &File, offset: u64, whence: i32) -> io::Result<u64> {
    let offset = off(offset)?;
    // SAFETY: a plain system call on an open descriptor; no memory is involved.
    let found = retried(|| unsafe { libc::lseek(file.as_raw_fd(), offset, whence) })?;
    Ok(u64::try_from(found).expect("retried() returns no negative offset"))
}

/// Size of a block device in bytes.
pub fn device_size(file: &File) -> io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 stores one u64 at the address given, which is ours.
    retried(|| unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) })?;
    Ok(size)
}

/// (logical block, physical block, optimal I/O) of a block device in bytes.
pub fn device_geometry(file: &File) -> io::Result<(u32, u32, u32)> {
    let query = |request: libc::Ioctl| {
        let mut value: libc::c_uint = 0;
        // SAFETY: each of these requests stores one 32-bit integer at the address given, which is ours.
        retried(|| unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) }).map(|_| value)
    };
    Ok((query(libc::BLKSSZGET)?, query(libc::BLKPBSZGET)?, query(libc::BLKIOOPT)?))
}

/// Discards a range of a block device.
pub fn device_discard(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two u64 from the address given, which is ours.
    retried(|| unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) }).map(drop)
}

/// (memory, offset) alignment of direct I/O on the file; (0, 0) where there is none, `None` where the kernel or the
/// file system does not say (before Linux 6.1).
pub fn direct_alignment(file: &File) -> Option<(u32, u32)> {
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is a constant NUL-terminated string; statx fills at most the structure at the address given.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, answer.as_mut_ptr())
    };
    // SAFETY: all-zero bytes are a valid statx, and the kernel wrote over them at most.
    let answer = unsafe { answer.assume_init() };
    (result == 0 && answer.stx_mask & libc::STATX_DIOALIGN != 0)
        .then_some((answer.stx_dio_mem_align, answer.stx_dio_offset_align))
}

/// When the file was born, in nanoseconds since 1970; 0 where the file system doesn't know.
pub fn birth_ns(file: &File) -> u64 {
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: as in direct_alignment().
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_BTIME, answer.as_mut_ptr())
    };
    // SAFETY: as there.
    let answer = unsafe { answer.assume_init() };
    if result != 0 || answer.stx_mask & libc::STATX_BTIME == 0 {
        return 0;
    }
    let seconds = u64::try_from(answer.stx_btime.tv_sec).unwrap_or(0);
    seconds.wrapping_mul(1_000_000_000).wrapping_add(u64::from(answer.stx_btime.tv_nsec))
}

/// The kernel's number of the disk behind a block device, never used again; 0 before Linux 5.15.
pub fn disk_sequence(file: &File) -> u64 {
    let mut number = 0u64;
    // SAFETY: BLKGETDISKSEQ stores one u64 at the address given, which is ours.
    let known = retried(|| unsafe { libc::ioctl(file.as_raw_fd(), BLKGETDISKSEQ, &raw mut number) });
    known.map_or(0, |_| number)
}

/// Switches O_DIRECT of an open file on or off.
pub fn set_direct(file: &File, direct: bool) -> io::Result<()> {
    // SAFETY: a plain system call on an open descriptor.
    let flags = retried(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) })?;
    let flags = if direct { flags | libc::O_DIRECT } else { flags & !libc::O_DIRECT };
    // SAFETY: as above.
    retried(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) }).map(drop)
}

/// An open-file-description lock command (F_OFD_SETLK, F_OFD_GETLK) on one byte; returns the lock's type afterwards.
pub fn lock_byte(file: &File, command: i32, kind: i32, byte: libc::off_t) -> io::Result<i32> {
    // SAFETY: all-zero bytes are a valid flock.
    let mut lock: libc::flock = unsafe { MaybeUninit::zeroed().assume_init() };
    let narrow = |n: i32| libc::c_short::try_from(n).expect("lock types and whences are small constants");
    lock.l_type = narrow(kind);
    lock.l_whence = narrow(libc::SEEK_SET);
    lock.l_start = byte;
    lock.l_len = 1;
    // SAFETY: the command reads and writes the one structure at the address given, which is ours.
    retried(|| unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) })?;
    Ok(i32::from(lock.l_type))
}

/// Sleeps until `fd` is readable or the time is over; returns whether it is readable.
pub fn wait_readable(fd: RawFd, timeout: Duration) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let timeout_ms = libc::c_int::try_from(timeout.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: poll reads and writes the one structure at the address given, which is ours. An EINTR reads as "not
    // yet": the callers look again until their own deadline.
    unsafe { libc::poll(&raw mut poll, 1, timeout_ms) > 0 }
}
