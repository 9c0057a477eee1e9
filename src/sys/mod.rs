//! System calls that std does not wrap, each behind one small function. Errors carry the system's errno.
//!
//! This module is independent of disks, caches and guests: any other module may use it, and it uses none.

pub mod block;
pub mod cgroup;
pub mod clock;
pub mod dir;
pub mod fd;
pub mod file;
pub mod file_system;
pub mod guarded;
pub mod memfd;
pub mod memory;
pub mod poll;
pub mod privileges;
pub mod process;
pub mod racing;
pub mod random;
pub mod regions;
pub mod shared_words;
pub mod signal;
pub mod socket;
pub mod stream;
pub mod syscalls;
#[cfg(debug_assertions)]
pub mod trespass;
pub mod unix_diag;
pub mod violation;
pub mod xattr;

use std::io;

/// Whether an error number means that the host lacks the operation, as opposed to a failed operation.
pub fn is_unsupported(errno: i32) -> bool {
    matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY)
}

/// The error number of `error`; EIO if it has none.
pub fn errno_of(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// Runs a system call that returns a negative number on failure; repeats it while it fails with EINTR.
fn retry_eintr<T: PartialOrd + From<i8>>(mut call: impl FnMut() -> T) -> io::Result<T> {
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
