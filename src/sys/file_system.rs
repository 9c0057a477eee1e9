//! Properties of the file system that a file is on (statfs(2)).

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

use super::retry_eintr;

/// Properties of a file system.
#[derive(Clone, Copy, Debug)]
pub struct FileSystem {
    /// Block size in bytes, at least 1; on hugetlbfs the size of a huge page.
    pub block_bytes: usize,
    /// Whether it is hugetlbfs, whose memory was reserved in advance by the host's configuration.
    pub is_hugetlbfs: bool,
    /// Its magic number (statfs(2)).
    magic: i64,
    /// Bytes that this user may still allocate; the largest number for a tmpfs without a limit.
    pub available_bytes: u64,
}

/// Magic numbers of common file systems, with their names; those in memory come first.
const NAMES: &[(i64, &str)] = &[
    (0x0102_1994, "tmpfs"),
    (0x9584_58f6, "hugetlbfs"),
    (0x8584_58f6, "ramfs"),
    (0xef53, "ext4"),
    (0x5846_5342, "XFS"),
    (0x9123_683e, "btrfs"),
    (0x2fc1_2fc1, "ZFS"),
    (0xf2f5_2010, "F2FS"),
    (0x4d44, "FAT"),
    (0x2011_bab0, "exFAT"),
    (0x6969, "NFS"),
    (0xff53_4d42, "SMB"),
    (0xfe53_4d42, "SMB"),
    (0x00c3_6400, "Ceph"),
    (0x6573_5546, "FUSE"),
    (0x0102_1997, "9p"),
    (0x794c_7630, "overlayfs"),
    (0x6265_6570, "configfs"),
    (0x9fa0, "proc"),
    (0x6265_6572, "sysfs"),
];
/// Number of [`NAMES`] that are in memory.
const IN_MEMORY: usize = 3;
/// File systems whose server is another process or machine, which may not respond: NFS, SMB, Ceph, FUSE, 9p.
const REMOTE: [i64; 6] = [0x6969, 0xff53_4d42, 0xfe53_4d42, 0x00c3_6400, 0x6573_5546, 0x0102_1997];
/// File systems that punch holes: ext4, XFS, btrfs, tmpfs, F2FS.
const PUNCHES_HOLES: [i64; 5] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0xf2f5_2010];

/// File systems that keep the attributes of an open file (stat(2)) in memory: those in memory, ext4, XFS, btrfs, F2FS,
/// FAT, exFAT.
const LOCAL: [i64; 9] =
    [0x0102_1994, 0x9584_58f6, 0x8584_58f6, 0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010, 0x4d44, 0x2011_bab0];

impl FileSystem {
    /// The file system of a file.
    pub fn of(file: &File) -> io::Result<Self> {
        let mut found = MaybeUninit::<libc::statfs>::zeroed();
        // SAFETY: fstatfs fills at most the structure at the address given.
        retry_eintr(|| unsafe { libc::fstatfs(file.as_raw_fd(), found.as_mut_ptr()) })?;
        // SAFETY: all-zero bytes are a valid statfs, and the kernel wrote over them at most.
        let found = unsafe { found.assume_init() };
        let block_bytes = usize::try_from(found.f_bsize).unwrap_or(1).max(1);
        // A tmpfs without a limit reports no blocks.
        let available = if found.f_blocks == 0 { u64::MAX } else { found.f_bavail };
        Ok(Self {
            block_bytes,
            is_hugetlbfs: found.f_type == libc::HUGETLBFS_MAGIC,
            magic: found.f_type,
            available_bytes: available.saturating_mul(block_bytes as u64),
        })
    }

    /// Whether it keeps its files in memory.
    pub fn is_memory(&self) -> bool {
        NAMES[..IN_MEMORY].iter().any(|(magic, _)| *magic == self.magic)
    }

    /// Whether it keeps the attributes of an open file in memory: reading them never waits for a server or a device.
    pub fn is_local(&self) -> bool {
        LOCAL.contains(&self.magic)
    }

    /// Whether an access to its files may wait forever for another process or machine.
    pub fn may_hang(&self) -> bool {
        REMOTE.contains(&self.magic)
    }

    /// Its name, if it is a common file system; otherwise its magic number.
    pub fn name(&self) -> String {
        let known = NAMES.iter().find(|(magic, _)| *magic == self.magic);
        known.map_or_else(|| format!("a file system of type {:#x}", self.magic), |(_, name)| (*name).to_owned())
    }

    /// Whether the file system is known to support punching holes.
    pub fn punches_holes(&self) -> bool {
        PUNCHES_HOLES.contains(&self.magic)
    }
}
