//! Waiting for descriptors with poll(2).

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use super::retry_eintr;

/// Sleeps until `fd` is readable or `timeout` has passed; returns whether it is readable.
///
/// => A signal may end the wait early with `false`: callers repeat it until their own deadline.
pub fn wait_readable(fd: RawFd, timeout: Duration) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let timeout_ms = libc::c_int::try_from(timeout.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: poll reads and writes one pollfd at the address given, and this one is a local.
    unsafe { libc::poll(&raw mut poll, 1, timeout_ms) > 0 }
}

/// Whether a write to `fd` would not block now.
pub fn is_writable(fd: RawFd) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
    // SAFETY: poll reads and writes one pollfd at the address given, and this one is a local.
    unsafe { libc::poll(&raw mut poll, 1, 0) > 0 }
}

/// Waits until at least one descriptor is readable or hung up; returns which ones are.
pub fn wait_any_readable<const N: usize>(descriptors: [&dyn AsRawFd; N]) -> io::Result<[bool; N]> {
    wait_any_readable_within(descriptors, -1)
}

/// Like [`wait_any_readable`], but at most for `timeout`.
pub fn wait_any_readable_for<const N: usize>(
    descriptors: [&dyn AsRawFd; N],
    timeout: Duration,
) -> io::Result<[bool; N]> {
    wait_any_readable_within(descriptors, libc::c_int::try_from(timeout.as_millis()).unwrap_or(libc::c_int::MAX))
}

fn wait_any_readable_within<const N: usize>(
    descriptors: [&dyn AsRawFd; N],
    timeout_ms: libc::c_int,
) -> io::Result<[bool; N]> {
    let mut polls = descriptors.map(|one| libc::pollfd { fd: one.as_raw_fd(), events: libc::POLLIN, revents: 0 });
    // SAFETY: poll reads and writes N pollfds at the address given, and `polls` has N.
    retry_eintr(|| unsafe { libc::poll(polls.as_mut_ptr(), N as libc::nfds_t, timeout_ms) })?;
    Ok(polls.map(|one| one.revents != 0))
}
