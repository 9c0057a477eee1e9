//! Waits with a deadline: nothing in the tests waits for ever, and nothing sleeps and hopes.

use std::fs;
use std::os::fd::RawFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a single reply or completion may take on a loaded machine before the test calls it lost.
pub const PATIENCE: Duration = Duration::from_secs(8);

/// How long a test watches for something that must *not* happen. Short: an absence can only be sampled.
pub const ABSENCE: Duration = Duration::from_millis(60);

/// Probes until `probe` gives a value; `None` when `limit` has passed without one.
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

/// Probes until `probe` gives a value; panics with `what` when `limit` has passed without one.
#[track_caller]
pub fn poll_until<T>(what: &str, limit: Duration, probe: impl FnMut() -> Option<T>) -> T {
    match try_poll(limit, probe) {
        Some(value) => value,
        None => panic!("waited {limit:?} in vain for {what}"),
    }
}

/// Waits until one of `descriptors` is readable; false when `limit` passed first.
pub fn readable(descriptors: &[RawFd], limit: Duration) -> bool {
    let mut polled: Vec<libc::pollfd> =
        descriptors.iter().map(|&fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    let limit_ms = i32::try_from(limit.as_millis()).expect("a wait of days is not a wait");
    // SAFETY: `polled` is a live array of as many pollfd as the length says.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, limit_ms) };
    ready > 0
}

/// True if a live process listens on `socket` (asked of the kernel, so that no connection is spent on the question).
pub fn is_listening(socket: &Path) -> bool {
    const ACCEPTS_CONNECTIONS: u32 = 1 << 16;
    let table = fs::read_to_string("/proc/net/unix").expect("/proc is mounted");
    let socket = socket.to_str().expect("test paths are UTF-8");
    table.lines().filter(|line| line.ends_with(socket)).any(|line| {
        let flags = line.split_whitespace().nth(3).and_then(|flags| u32::from_str_radix(flags, 16).ok());
        flags.is_some_and(|flags| flags & ACCEPTS_CONNECTIONS != 0)
    })
}
