//! Writes that a dead connection may still carry out.
//!
//! A server that outlives a connection may execute a request after the client has repeated it on another connection,
//! and after the client has written something newer. The repetition has the same bytes, so it may be sent immediately.
//! A newer write must wait until the old request can no longer be executed: the *quarantine*. All queues of an image
//! share the list.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A broken connection.
pub(super) type BreakId = u64;

/// A range that an old request may still change.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Suspect {
    range: Range<u64>,
    until: Duration,
    cause: BreakId,
}

/// See the documentation of the module. Times count from when the image was opened.
#[derive(Debug, Default)]
pub(super) struct Suspects {
    list: Mutex<Vec<Suspect>>,
    /// The list may have entries.
    any: AtomicBool,
}

impl Suspects {
    /// A request on `range` may be executed until `until`, because of the break `cause`.
    pub fn add(&self, range: Range<u64>, until: Duration, cause: BreakId, now: Duration) {
        let mut list = self.list.lock().expect("no thread panics with the list locked");
        list.retain(|suspect| suspect.until > now);
        if until > now {
            list.push(Suspect { range, until, cause });
        }
        self.any.store(!list.is_empty(), Ordering::Release);
    }

    /// Requests that were sent before that break can no longer be executed.
    pub fn release(&self, cause: BreakId) {
        let mut list = self.list.lock().expect("no thread panics with the list locked");
        list.retain(|suspect| suspect.cause != cause);
        self.any.store(!list.is_empty(), Ordering::Release);
    }

    /// Whether an old request may still be executed.
    pub fn has_any(&self, now: Duration) -> bool {
        self.blocked_until(&(0..u64::MAX), now).is_some()
    }

    /// Until when a new change of `range` must wait; `None`: it may be sent.
    pub fn blocked_until(&self, range: &Range<u64>, now: Duration) -> Option<Duration> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        let mut list = self.list.lock().expect("no thread panics with the list locked");
        list.retain(|suspect| suspect.until > now);
        self.any.store(!list.is_empty(), Ordering::Release);
        let overlaps = |suspect: &&Suspect| suspect.range.start < range.end && range.start < suspect.range.end;
        list.iter().filter(overlaps).map(|suspect| suspect.until).max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    #[test]
    fn a_change_waits_for_every_overlapping_suspect() {
        let suspects = Suspects::default();
        suspects.add(0..4096, S(5), 1, S(0));
        suspects.add(2048..8192, S(7), 2, S(0));
        assert_eq!(suspects.blocked_until(&(0..512), S(1)), Some(S(5)));
        assert_eq!(suspects.blocked_until(&(0..4096), S(1)), Some(S(7)));
        assert_eq!(suspects.blocked_until(&(8192..9000), S(1)), None);
        suspects.release(2);
        assert_eq!(suspects.blocked_until(&(0..4096), S(1)), Some(S(5)));
        suspects.release(1);
        assert_eq!(suspects.blocked_until(&(0..4096), S(1)), None);
        suspects.add(0..512, S(5), 3, S(1));
        assert!(suspects.has_any(S(4)) && !suspects.has_any(S(5)));
    }
}
