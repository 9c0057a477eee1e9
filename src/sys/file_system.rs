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
    /// Whether it is hugetlbfs, whose memory was reserved when the host was configured.
    pub is_hugetlbfs: bool,
}

impl FileSystem {
    /// The file system of a file.
    pub fn of(file: &File) -> io::Result<Self> {
        let mut found = MaybeUninit::<libc::statfs>::zeroed();
        // SAFETY: fstatfs fills at most the structure at the address given.
        retry_eintr(|| unsafe { libc::fstatfs(file.as_raw_fd(), found.as_mut_ptr()) })?;
        // SAFETY: all-zero bytes are a valid statfs, and the kernel wrote over them at most.
        let found = unsafe { found.assume_init() };
        let block_bytes = usize::try_from(found.f_bsize).unwrap_or(1).max(1);
        Ok(Self { block_bytes, is_hugetlbfs: found.f_type == libc::HUGETLBFS_MAGIC })
    }
}
