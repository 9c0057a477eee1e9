//! Descriptors that the process inherited.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::retry_eintr;

/// Takes ownership of a descriptor that the process inherited, given by number.
///
/// => Call this before the process receives descriptors through a socket. Until then only inherited descriptors lack
///    close-on-exec, because this process opens everything with that flag. Taking sets the flag, so a descriptor can be
///    taken only once.
///
/// # Errors
/// EBADF if there is no such descriptor, or if it is not inherited or was already taken.
pub fn take_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: a plain system call; it fails on a number that is no descriptor's.
    let flags = retry_eintr(|| unsafe { libc::fcntl(fd, libc::F_GETFD) })?;
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: a plain system call on a descriptor that is open.
    retry_eintr(|| unsafe { libc::fcntl(fd, libc::F_SETFD, flags | libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, it came through exec(), and its flag shows that nothing took it before.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Closes every descriptor that the process inherited, but the standard ones and `kept`.
///
/// => Call this before the process opens anything but `kept`.
///
/// # Errors
/// ENOSYS on Linux before 5.9.
pub fn close_inherited(kept: &OwnedFd) -> io::Result<()> {
    let kept = kept.as_raw_fd().cast_unsigned();
    for (first, last) in [(3, kept.saturating_sub(1)), (kept + 1, libc::c_uint::MAX)] {
        if first <= last {
            // SAFETY: nothing owns these descriptors, because the process has opened none but `kept`.
            retry_eintr(|| unsafe { libc::close_range(first, last, 0) })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn an_inherited_descriptor_is_taken_only_once() {
        let opened = File::open("/dev/null").unwrap();
        assert_eq!(take_inherited(opened.as_raw_fd()).unwrap_err().raw_os_error(), Some(libc::EBADF));
        let fd = opened.into_raw_fd();
        // SAFETY: a plain system call on an open descriptor; it then looks like an inherited one.
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }, 0);
        let taken = take_inherited(fd).unwrap();
        assert!(take_inherited(fd).is_err());
        drop(taken);
    }
}
