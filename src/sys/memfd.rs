//! Anonymous shared memory (memfd_create(2)) and seals on its size.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::retry_eintr;

/// Creates an empty memfd that can be sealed; /proc shows `name`.
pub fn create(name: &CStr) -> io::Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: the name is NUL-terminated; the call reads no other memory.
    let fd = retry_eintr(|| unsafe { libc::memfd_create(name.as_ptr(), flags) })?;
    // SAFETY: memfd_create returned a new descriptor, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// Seals a memfd against shrinking: access to truncated memory would raise SIGBUS in every process that maps it.
pub fn forbid_shrinking(file: &File) -> io::Result<()> {
    add_seals(file, libc::F_SEAL_SHRINK)
}

/// Seals the size and the seals of a memfd against changes.
pub fn freeze_size(file: &File) -> io::Result<()> {
    add_seals(file, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL)
}

fn add_seals(file: &File, seals: libc::c_int) -> io::Result<()> {
    // SAFETY: a plain system call on an open descriptor.
    retry_eintr(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) }).map(drop)
}
