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

/// Whether a file is on tmpfs (a memfd is) or hugetlbfs: only those have seals. The file system of any other file is
/// not asked, which may not respond.
pub fn is_on_memory_fs(file: &File) -> bool {
    // SAFETY: a plain system call on an open descriptor.
    retry_eintr(|| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) }).is_ok()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memfds_and_files_on_tmpfs_are_on_a_memory_file_system() {
        let path = format!("/dev/shm/genblk-seals-{}", std::process::id());
        let on_tmpfs = File::create(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        assert!(is_on_memory_fs(&create(c"test").unwrap()) && is_on_memory_fs(&on_tmpfs));
        for path in ["/proc/self/maps", "/dev/zero", env!("CARGO_MANIFEST_DIR")] {
            assert!(!is_on_memory_fs(&File::open(path).unwrap()), "{path}");
        }
    }
}
