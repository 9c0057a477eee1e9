//! ioctls of block devices.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::retry_eintr;

// From <linux/fs.h>; libc lacks these.
const BLKGETDISKSEQ: libc::Ioctl = 0x8008_1280;
const BLKROGET: libc::Ioctl = 0x125e;
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4c05;
/// Size of struct loop_info64: 232 bytes.
const LOOP_INFO_WORDS: usize = 29;

/// Sizes that a block device reports, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// Logical block: the unit of addressing (BLKSSZGET).
    pub logical: u32,
    /// Physical block: the unit that the device writes without a read-modify-write (BLKPBSZGET).
    pub physical: u32,
    /// Preferred I/O size; 0 if the device reports none (BLKIOOPT).
    pub optimal_io: u32,
}

/// Size of a block device in bytes.
pub fn size_bytes(file: &File) -> io::Result<u64> {
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 stores one u64 at the address given, and `size` is one.
    retry_eintr(|| unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) })?;
    Ok(size)
}

/// Whether the device is read-only (BLKROGET): it can be opened for writing, but then fails every write.
pub fn is_read_only(file: &File) -> io::Result<bool> {
    let mut read_only: libc::c_int = 0;
    // SAFETY: BLKROGET stores one int at the address given, and `read_only` is one.
    retry_eintr(|| unsafe { libc::ioctl(file.as_raw_fd(), BLKROGET, &raw mut read_only) })?;
    Ok(read_only != 0)
}

/// Block and I/O sizes of a block device.
pub fn block_sizes(file: &File) -> io::Result<BlockSizes> {
    let query = |request: libc::Ioctl| {
        let mut value: libc::c_uint = 0;
        // SAFETY: each of these requests stores one 32-bit integer at the address given, and `value` is one.
        retry_eintr(|| unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) }).map(|_| value)
    };
    Ok(BlockSizes {
        logical: query(libc::BLKSSZGET)?,
        physical: query(libc::BLKPBSZGET)?,
        optimal_io: query(libc::BLKIOOPT)?,
    })
}

/// Discards a range of a block device (BLKDISCARD).
pub fn discard(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two u64 from the address given, and `range` holds two.
    retry_eintr(|| unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) }).map(drop)
}

/// The kernel's sequence number of the disk behind a block device, which it never reuses; 0 before Linux 5.15.
pub fn disk_sequence(file: &File) -> u64 {
    let mut number = 0u64;
    // SAFETY: BLKGETDISKSEQ stores one u64 at the address given, and `number` is one.
    let known = retry_eintr(|| unsafe { libc::ioctl(file.as_raw_fd(), BLKGETDISKSEQ, &raw mut number) });
    known.map_or(0, |_| number)
}

/// The file behind a loop device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopFile {
    /// Device number of its file system.
    pub device: u64,
    /// Its inode number.
    pub inode: u64,
    /// Where in the file the device begins, in bytes.
    pub offset: u64,
    /// Most bytes of the device; 0: up to the end of the file.
    pub size_limit: u64,
}

/// The file behind a loop device or a partition of one; `None` for any other device.
pub fn loop_file(file: &File) -> Option<LoopFile> {
    // struct loop_info64 of <linux/loop.h>: lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit, and more.
    let mut info = [0u64; LOOP_INFO_WORDS];
    // SAFETY: LOOP_GET_STATUS64 stores one struct loop_info64 at the address given, and `info` has its size.
    retry_eintr(|| unsafe { libc::ioctl(file.as_raw_fd(), LOOP_GET_STATUS64, info.as_mut_ptr()) }).ok()?;
    let [device, inode, _, offset, size_limit, ..] = info;
    Some(LoopFile { device, inode, offset, size_limit })
}
