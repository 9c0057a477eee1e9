//! Waits with a deadline: no test waits forever, and no test relies on a sleep that is long enough.

use std::fs;
use std::os::fd::RawFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a reply or a completion may take on a loaded machine. After this time the test considers it lost.
pub const TIMEOUT: Duration = Duration::from_secs(8);

/// How long a test watches for an event that must *not* happen. Short, because no time would prove it.
pub const ABSENCE: Duration = Duration::from_millis(60);

/// Calls `probe` until it returns a value; `None` after `limit`.
pub fn try_poll<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = probe() {
            return Some(value);
        }
        if Instant::now() >= end {
            return None;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// Calls `probe` until it returns a value; after `limit` panics and names `what` it waited for.
#[track_caller]
pub fn poll_until<T>(what: &str, limit: Duration, probe: impl FnMut() -> Option<T>) -> T {
    match try_poll(limit, probe) {
        Some(value) => value,
        None => panic!("no success within {limit:?}: waited for {what}"),
    }
}

/// Waits until one of `descriptors` is readable; returns false after `limit`.
pub fn readable(descriptors: &[RawFd], limit: Duration) -> bool {
    let mut polled: Vec<libc::pollfd> =
        descriptors.iter().map(|&fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    let limit_ms = i32::try_from(limit.as_millis()).expect("a test waits for less than days");
    // SAFETY: `polled` is a live array of as many pollfd as the length says.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, limit_ms) };
    ready > 0
}

/// Whether a process listens on `socket`. Asks the kernel: a test connection would count as a front-end.
pub fn is_listening(socket: &Path) -> bool {
    const ACCEPTS_CONNECTIONS: u32 = 1 << 16;
    let table = fs::read_to_string("/proc/net/unix").expect("/proc is mounted");
    let socket = socket.to_str().expect("test paths are UTF-8");
    table.lines().filter(|line| line.ends_with(socket)).any(|line| {
        let flags = line.split_whitespace().nth(3).and_then(|flags| u32::from_str_radix(flags, 16).ok());
        flags.is_some_and(|flags| flags & ACCEPTS_CONNECTIONS != 0)
    })
}
