//! Accesses files relative to an open directory (openat(2)), because the directory's path may lead elsewhere meanwhile.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use super::retry_eintr;

/// How to open a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenMode {
    /// For reading.
    Read,
    /// For reading and writing.
    ReadWrite,
    /// For reading and writing; a missing file is created, and only this user may use it.
    Create,
    /// Like [`OpenMode::Create`], but an existing file is an error.
    CreateNew,
    /// For writing at the end.
    Append,
}

fn name_of(name: &OsStr) -> io::Result<CString> {
    CString::new(name.as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Opens a file in a directory. Follows no symbolic link, and does not wait for the other end of a FIFO.
pub fn open_at(dir: &File, name: &OsStr, access: OpenMode) -> io::Result<File> {
    let name = name_of(name)?;
    let access = match access {
        OpenMode::Read => libc::O_RDONLY,
        OpenMode::ReadWrite => libc::O_RDWR,
        OpenMode::Create => libc::O_RDWR | libc::O_CREAT,
        OpenMode::CreateNew => libc::O_RDWR | libc::O_CREAT | libc::O_EXCL,
        OpenMode::Append => libc::O_WRONLY | libc::O_APPEND,
    };
    let flags = access | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    // SAFETY: the name is NUL-terminated; the call reads no other memory.
    let fd = retry_eintr(|| unsafe { libc::openat(dir.as_raw_fd(), name.as_ptr(), flags, 0o600) })?;
    // SAFETY: openat returned a new descriptor, which nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// Removes a file from a directory.
pub fn unlink_at(dir: &File, name: &OsStr) -> io::Result<()> {
    let name = name_of(name)?;
    // SAFETY: the name is NUL-terminated; the call reads no other memory.
    retry_eintr(|| unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), 0) }).map(drop)
}

/// Renames a file within a directory, over another one if the new name exists.
pub fn rename_at(dir: &File, old: &OsStr, new: &OsStr) -> io::Result<()> {
    let (dir, old, new) = (dir.as_raw_fd(), name_of(old)?, name_of(new)?);
    // SAFETY: the names are NUL-terminated; the call reads no other memory.
    retry_eintr(|| unsafe { libc::renameat(dir, old.as_ptr(), dir, new.as_ptr()) }).map(drop)
}

/// The file that a name in a directory leads to, as (device number, inode number, mode); a symbolic link is not
/// followed.
pub fn stat_at(dir: &File, name: &OsStr) -> io::Result<(u64, u64, u32)> {
    let name = name_of(name)?;
    let mut found = MaybeUninit::<libc::stat>::zeroed();
    let (fd, flags) = (dir.as_raw_fd(), libc::AT_SYMLINK_NOFOLLOW);
    // SAFETY: the name is NUL-terminated; fstatat fills at most the structure at the address given.
    retry_eintr(|| unsafe { libc::fstatat(fd, name.as_ptr(), found.as_mut_ptr(), flags) })?;
    // SAFETY: all-zero bytes are a valid stat, and the kernel wrote over them at most.
    let found = unsafe { found.assume_init() };
    Ok((found.st_dev, found.st_ino, found.st_mode))
}

/// Checks that this user may create files in a directory (access(2) with the effective user).
pub fn may_create_in(path: &std::path::Path) -> io::Result<()> {
    let path = name_of(path.as_os_str())?;
    let mode = libc::W_OK | libc::X_OK;
    // SAFETY: the path is NUL-terminated; the call reads no other memory.
    retry_eintr(|| unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), mode, libc::AT_EACCESS) }).map(drop)
}
