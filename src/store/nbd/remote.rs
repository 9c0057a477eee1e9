//! The state that the queues of one export share: its name, the export as it was opened, and broken connections.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::client::SharedLists;
use super::suspects::{BreakId, EARLIER};
use super::wire::Export;

/// After a timeout the network may still hold requests: their quarantine is longer by this factor.
const TIMEOUT_FACTOR: u32 = 6;

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct Remote {
    /// The prefix of log lines.
    pub label: String,
    /// The export when the image was opened.
    pub promised: Export,
    /// How long a server that answers again may still execute requests of a connection that has broken.
    pub quarantine: Duration,
    pub shared: SharedLists,
    opened: Instant,
    breaks: AtomicU64,
    /// A change was submitted on any connection.
    has_changed: AtomicBool,
}

impl Remote {
    pub fn new(label: String, promised: Export, quarantine: Duration) -> Self {
        Self {
            label,
            promised,
            quarantine,
            shared: SharedLists::default(),
            opened: Instant::now(),
            breaks: AtomicU64::new(0),
            has_changed: AtomicBool::new(false),
        }
    }

    /// The time since the image was opened.
    pub fn now(&self) -> Duration {
        self.opened.elapsed()
    }

    /// Records that the image is being changed.
    pub fn mark_changed(&self) {
        if !self.has_changed.load(Ordering::Relaxed) {
            self.has_changed.store(true, Ordering::Release);
        }
    }

    /// Whether a restarted server may have lost a completed change.
    pub fn has_changed(&self) -> bool {
        self.has_changed.load(Ordering::Acquire)
    }

    /// An ID for a connection that has broken, and for how long a server that answers again may still execute its
    /// requests.
    pub fn record_break(&self, timed_out: bool) -> (BreakId, Duration) {
        let factor = if timed_out { TIMEOUT_FACTOR } else { 1 };
        (self.breaks.fetch_add(1, Ordering::AcqRel) + 1, self.quarantine * factor)
    }

    /// For this long after it answers, the server may execute requests of an earlier process, on any range.
    pub fn quarantine_earlier_writes(&self, for_how_long: Duration) {
        self.shared.suspects.add(0..self.promised.size_bytes, for_how_long, EARLIER, self.now());
    }

    /// For how long after the server's next answer it may execute requests of broken connections.
    pub fn quarantined_for(&self) -> Duration {
        self.shared.suspects.longest(self.now())
    }
}

/// Whether a connection broke because the other end, or the network, did not respond.
pub(super) fn is_timeout(error: &io::Error) -> bool {
    let timed_out = [libc::ETIMEDOUT, libc::EHOSTUNREACH, libc::ENETUNREACH, libc::EHOSTDOWN];
    error.raw_os_error().is_some_and(|errno| timed_out.contains(&errno))
}
