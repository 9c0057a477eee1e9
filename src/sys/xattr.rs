//! Extended attributes of open files (xattr(7)).

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::retry_eintr;

/// The value of an attribute; `None` if the file has none of this name.
///
/// => Fails with E2BIG or ERANGE if it is longer than `bytes_max`.
pub fn get(file: &File, name: &CStr, bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0; bytes_max];
    let (fd, target) = (file.as_raw_fd(), value.as_mut_ptr().cast());
    // SAFETY: the call stores at most `bytes_max` bytes in `value`, whose length that is.
    match retry_eintr(|| unsafe { libc::fgetxattr(fd, name.as_ptr(), target, bytes_max) }) {
        Ok(length) => {
            value.truncate(usize::try_from(length).expect("retry_eintr() returns no negative length"));
            Ok(Some(value))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENODATA) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sets an attribute, whether or not the file already has it.
pub fn set(file: &File, name: &CStr, value: &[u8]) -> io::Result<()> {
    let (fd, source) = (file.as_raw_fd(), value.as_ptr().cast());
    // SAFETY: the call reads `value.len()` bytes of `value`, and a NUL-terminated name.
    retry_eintr(|| unsafe { libc::fsetxattr(fd, name.as_ptr(), source, value.len(), 0) }).map(drop)
}

#[cfg(test)]
/// Removes an attribute; no error if the file has none of this name.
pub fn remove(file: &File, name: &CStr) -> io::Result<()> {
    // SAFETY: the call reads a NUL-terminated name; no other memory is involved.
    match retry_eintr(|| unsafe { libc::fremovexattr(file.as_raw_fd(), name.as_ptr()) }) {
        Err(error) if error.raw_os_error() != Some(libc::ENODATA) => Err(error),
        _ => Ok(()),
    }
}
