//! Extended attributes of open files (xattr(7)).

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::retry_eintr;

/// The value of an attribute; `None` if the file has no such attribute, or its file system has none at all.
///
/// # Errors
/// Those of fgetxattr(2) otherwise; ERANGE for a value of more than `max` bytes.
pub fn get(file: &File, name: &CStr, max: usize) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0; max];
    let (fd, buffer) = (file.as_raw_fd(), value.as_mut_ptr().cast());
    // SAFETY: the name is NUL-terminated; the call writes at most `max` bytes to `value`, which has as many.
    match retry_eintr(|| unsafe { libc::fgetxattr(fd, name.as_ptr(), buffer, max) }) {
        Ok(len) => {
            value.truncate(usize::try_from(len).expect("retry_eintr() returns no negative length"));
            Ok(Some(value))
        }
        // EPERM: the file is a device node, which has no attributes of users.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENODATA | libc::EOPNOTSUPP | libc::EPERM)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Sets an attribute.
///
/// # Errors
/// Those of fsetxattr(2): EOPNOTSUPP if the file system has no attributes, EPERM for a device node.
pub fn set(file: &File, name: &CStr, value: &[u8]) -> io::Result<()> {
    let (fd, bytes) = (file.as_raw_fd(), value.as_ptr().cast());
    // SAFETY: the name is NUL-terminated; the call reads `value.len()` bytes of `value`.
    retry_eintr(|| unsafe { libc::fsetxattr(fd, name.as_ptr(), bytes, value.len(), 0) }).map(drop)
}
