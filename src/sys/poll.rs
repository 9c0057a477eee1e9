//! Waiting for a descriptor with poll(2).

use std::os::fd::RawFd;
use std::time::Duration;

/// Sleeps until `fd` is readable or `timeout` has passed; returns whether it is readable.
///
/// => A signal may end the wait early with `false`: callers repeat it until their own deadline.
pub fn wait_readable(fd: RawFd, timeout: Duration) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let timeout_ms = libc::c_int::try_from(timeout.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: poll reads and writes one pollfd at the address given, and this one is a local.
    unsafe { libc::poll(&raw mut poll, 1, timeout_ms) > 0 }
}
