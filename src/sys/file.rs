//! System calls on files: positioned vectored I/O, holes, O_DIRECT, locks on bytes.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

use super::retry_eintr;

/// A piece of memory for a transfer: `len` bytes from `base`. It has the layout of the system's `iovec`, so that an
/// array of them can be passed to the kernel directly.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// First byte.
    pub base: *mut u8,
    /// Length in bytes.
    pub len: usize,
}

// SAFETY: a Segment is an address and a length. Access to the bytes is governed by the request that owns the segment.
unsafe impl Send for Segment {}

const _: () = assert!(
    size_of::<Segment>() == size_of::<libc::iovec>()
        && std::mem::offset_of!(Segment, base) == std::mem::offset_of!(libc::iovec, iov_base)
        && std::mem::offset_of!(Segment, len) == std::mem::offset_of!(libc::iovec, iov_len),
    "a Segment is an iovec"
);

/// Whether a process has the regular file open for writing, according to the kernel: this requests a read lease
/// (fcntl(2)) on `file`, which is open for reading, and returns the lease immediately.
pub fn is_open_for_writing(file: &File) -> bool {
    let lease = |kind: libc::c_int| {
        // SAFETY: the call takes an integer, and changes nothing but the lease of the open file.
        retry_eintr(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) })
    };
    let refused = lease(libc::F_RDLCK).err().and_then(|error| error.raw_os_error());
    let _ = lease(libc::F_UNLCK);
    refused == Some(libc::EAGAIN)
}

/// Whether the file has no file type, as eventfds and other anonymous inodes of the kernel have none. Never waits for
/// the server of a file system (FUSE, NFS).
///
/// # Errors
/// The error of statx(2).
pub fn is_anonymous_inode(file: &File) -> io::Result<bool> {
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: the path is a C string, and the call fills at most the structure at the address given.
    retry_eintr(|| unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_TYPE, found.as_mut_ptr())
    })?;
    // SAFETY: all-zero bytes are a valid statx, and the kernel wrote over them at most.
    let mode = u32::from(unsafe { found.assume_init() }.stx_mode);
    Ok(mode & libc::S_IFMT == 0)
}

/// Whether a transfer reads from the file or writes to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the file to memory.
    Read,
    /// From memory to the file.
    Write,
}

/// Modes of fallocate(2); none of them changes the file's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FallocateMode {
    /// Reserves space for the range; its data is unchanged.
    Reserve,
    /// Frees the range, which then reads as zeros.
    PunchHole,
    /// Makes the range read as zeros and keeps its space.
    ZeroRange,
}

impl FallocateMode {
    /// The flags of the mode for fallocate(2).
    pub fn flags(self) -> libc::c_int {
        let mode = match self {
            Self::Reserve => 0,
            Self::PunchHole => libc::FALLOC_FL_PUNCH_HOLE,
            Self::ZeroRange => libc::FALLOC_FL_ZERO_RANGE,
        };
        mode | libc::FALLOC_FL_KEEP_SIZE
    }
}

/// Alignment in bytes that direct I/O on a file requires; a zero `offset` means that the file has no direct I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectAlignment {
    /// Alignment of memory addresses.
    pub memory: u32,
    /// Alignment of file offsets and of segment lengths.
    pub offset: u32,
}

/// A file offset or length in the system's type.
fn off(bytes: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

/// One preadv(2) or pwritev(2); may move fewer bytes than requested. Returns the number of bytes moved.
///
/// # Safety
/// The segments must name memory that this thread may write (for [`Direction::Read`]) or read.
pub unsafe fn transfer(file: &File, direction: Direction, segments: &[Segment], offset: u64) -> io::Result<u64> {
    let (fd, offset) = (file.as_raw_fd(), off(offset)?);
    let array = segments.as_ptr().cast::<libc::iovec>();
    let count = libc::c_int::try_from(segments.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    let moved = retry_eintr(|| match direction {
        // SAFETY: a Segment is an iovec (asserted next to it); the caller guarantees that the memory is valid.
        Direction::Read => unsafe { libc::preadv(fd, array, count, offset) },
        // SAFETY: as above.
        Direction::Write => unsafe { libc::pwritev(fd, array, count, offset) },
    })?;
    Ok(u64::try_from(moved).expect("retry_eintr() returns no negative count"))
}

/// fallocate(2).
pub fn fallocate(file: &File, mode: FallocateMode, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (off(offset)?, off(len)?);
    // SAFETY: a plain system call on an open descriptor; no memory is involved.
    retry_eintr(|| unsafe { libc::fallocate(file.as_raw_fd(), mode.flags(), offset, len) }).map(drop)
}

/// The first byte of data at or after `offset`; ENXIO if there is none before the end of the file.
pub fn seek_data(file: &File, offset: u64) -> io::Result<u64> {
    seek(file, offset, libc::SEEK_DATA)
}

/// The first byte at or after `offset` that lies in a hole; the end of the file counts as a hole.
pub fn seek_hole(file: &File, offset: u64) -> io::Result<u64> {
    seek(file, offset, libc::SEEK_HOLE)
}

/// lseek(2). It moves the file's position, which positioned I/O does not use.
fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<u64> {
    let offset = off(offset)?;
    // SAFETY: a plain system call on an open descriptor; no memory is involved.
    let found = retry_eintr(|| unsafe { libc::lseek(file.as_raw_fd(), offset, whence) })?;
    Ok(u64::try_from(found).expect("retry_eintr() returns no negative offset"))
}

/// Alignment of direct I/O on the file; `None` if the kernel or the file system does not report it (before Linux 6.1).
pub fn direct_alignment(file: &File) -> Option<DirectAlignment> {
    statx(file, libc::STATX_DIOALIGN)
        .map(|found| DirectAlignment { memory: found.stx_dio_mem_align, offset: found.stx_dio_offset_align })
}

/// When the file was created, in nanoseconds since 1970; 0 if the file system does not record it.
pub fn birth_ns(file: &File) -> u64 {
    statx(file, libc::STATX_BTIME).map_or(0, |found| {
        let seconds = u64::try_from(found.stx_btime.tv_sec).unwrap_or(0);
        seconds.wrapping_mul(1_000_000_000).wrapping_add(u64::from(found.stx_btime.tv_nsec))
    })
}

/// Size of a file in bytes and its number of names, as cached by the kernel: never waits for a file server. `None` if
/// they are not cached.
pub fn cached_size_and_links(file: &File) -> Option<(u64, u32)> {
    statx_with(file, libc::STATX_SIZE | libc::STATX_NLINK, libc::AT_STATX_DONT_SYNC)
        .map(|found| (found.stx_size, found.stx_nlink))
}

/// statx(2) on an open file; `None` if the result lacks the fields that `mask` requests.
fn statx(file: &File, mask: libc::c_uint) -> Option<libc::statx> {
    statx_with(file, mask, 0)
}

/// Like [`statx`], with more flags.
fn statx_with(file: &File, mask: libc::c_uint, flags: libc::c_int) -> Option<libc::statx> {
    let mut answer = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is a constant NUL-terminated string; statx fills at most the structure at the address given.
    let result =
        unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH | flags, mask, answer.as_mut_ptr()) };
    // SAFETY: all-zero bytes are a valid statx, and the kernel wrote over them at most.
    let answer = unsafe { answer.assume_init() };
    (result == 0 && answer.stx_mask & mask == mask).then_some(answer)
}

/// Sets or clears O_DIRECT of an open file.
pub fn set_direct(file: &File, direct: bool) -> io::Result<()> {
    // SAFETY: a plain system call on an open descriptor.
    let flags = retry_eintr(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) })?;
    let flags = if direct { flags | libc::O_DIRECT } else { flags & !libc::O_DIRECT };
    // SAFETY: as above.
    retry_eintr(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) }).map(drop)
}

/// Takes a shared lock on one byte for the open file description; EAGAIN or EACCES if another opener holds an exclusive
/// one.
pub fn lock_byte(file: &File, byte: u64) -> io::Result<()> {
    ofd_lock(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte).map(drop)
}

/// Releases the lock that [`lock_byte`] took; no error if there is none.
pub fn unlock_byte(file: &File, byte: u64) -> io::Result<()> {
    ofd_lock(file, libc::F_OFD_SETLK, libc::F_UNLCK, byte).map(drop)
}

/// Whether another open file description holds a lock on one byte.
pub fn is_byte_locked(file: &File, byte: u64) -> io::Result<bool> {
    ofd_lock(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte).map(|found| found != libc::F_UNLCK)
}

/// A command for an open-file-description lock (F_OFD_SETLK, F_OFD_GETLK) on one byte; returns the type of lock that
/// the kernel left in the structure.
fn ofd_lock(file: &File, command: libc::c_int, kind: libc::c_int, byte: u64) -> io::Result<libc::c_int> {
    // SAFETY: all-zero bytes are a valid flock.
    let mut lock: libc::flock = unsafe { MaybeUninit::zeroed().assume_init() };
    let narrow = |n: libc::c_int| libc::c_short::try_from(n).expect("lock types and whences are small constants");
    lock.l_type = narrow(kind);
    lock.l_whence = narrow(libc::SEEK_SET);
    lock.l_start = off(byte)?;
    lock.l_len = 1;
    // SAFETY: the command reads and writes one flock at the address given, and `lock` is one.
    retry_eintr(|| unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) })?;
    Ok(libc::c_int::from(lock.l_type))
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;

    use vmm_sys_util::epoll::Epoll;

    use super::*;
    use crate::sys::memfd;

    #[test]
    fn only_anonymous_inodes_have_no_file_type() {
        let epoll = Epoll::new().unwrap();
        // SAFETY: the descriptor stays open.
        let anonymous = unsafe { std::os::fd::BorrowedFd::borrow_raw(epoll.as_raw_fd()) };
        assert!(is_anonymous_inode(&File::from(anonymous.try_clone_to_owned().unwrap())).unwrap());
        let socket = File::from(OwnedFd::from(UnixStream::pair().unwrap().0));
        for file in
            [socket, memfd::create(c"test").unwrap(), File::open("/").unwrap(), File::open("/dev/null").unwrap()]
        {
            assert!(!is_anonymous_inode(&file).unwrap(), "{file:?}");
        }
    }
}
