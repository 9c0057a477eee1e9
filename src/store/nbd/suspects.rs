//! Writes that a dead connection may still carry out.
//!
//! A server that outlives a connection may execute a request after the client has repeated it on another connection,
//! and after the client has written something newer. The repetition has the same bytes, so it may be sent immediately.
//! A newer write must wait until the old request can no longer be executed: the *quarantine*. It begins when the server
//! has answered again, because one that is stopped or suspended executes what it had received only when it continues.
//! All queues of an image share the list.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A broken connection.
pub(super) type BreakId = u64;

/// Breaks of connections that no queue of this process replaces.
pub(super) const EARLIER: BreakId = 0;

/// A range that an old request may still change.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Suspect {
    range: Range<u64>,
    cause: BreakId,
    quarantine: Duration,
    /// The end of the quarantine; `None` before the server has answered again.
    until: Option<Duration>,
}

impl Suspect {
    fn has_ended(&self, now: Duration) -> bool {
        self.until.is_some_and(|until| until <= now)
    }
}

/// See the documentation of the module. Times count from when the image was opened.
#[derive(Debug, Default)]
pub(super) struct Suspects {
    list: Mutex<Vec<Suspect>>,
    /// The list may have entries.
    any: AtomicBool,
}

impl Suspects {
    /// A request on `range` may be executed for `quarantine` after the server has answered again, because of the break
    /// `cause`.
    pub fn add(&self, range: Range<u64>, quarantine: Duration, cause: BreakId, now: Duration) {
        let mut list = self.list.lock().expect("no thread panics with the list locked");
        list.retain(|suspect| !suspect.has_ended(now));
        if !quarantine.is_zero() {
            list.push(Suspect { range, cause, quarantine, until: None });
        }
        self.any.store(!list.is_empty(), Ordering::Release);
    }

    /// The server has answered since the break `cause`.
    pub fn answered(&self, cause: BreakId, now: Duration) {
        let mut list = self.list.lock().expect("no thread panics with the list locked");
        for suspect in list.iter_mut().filter(|suspect| suspect.cause == cause) {
            suspect.until.get_or_insert(now + suspect.quarantine);
        }
    }

    /// The queue of the break `cause` gets no further connection: that of any other queue counts in its place.
    pub fn disown(&self, cause: BreakId) {
        let mut list = self.list.lock().expect("no thread panics with the list locked");
        list.iter_mut().filter(|suspect| suspect.cause == cause).for_each(|suspect| suspect.cause = EARLIER);
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

    /// Until when a new change of `range` must wait: [`Duration::MAX`] before the server has answered again. `None`: it
    /// may be sent.
    pub fn blocked_until(&self, range: &Range<u64>, now: Duration) -> Option<Duration> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        let mut list = self.list.lock().expect("no thread panics with the list locked");
        list.retain(|suspect| !suspect.has_ended(now));
        self.any.store(!list.is_empty(), Ordering::Release);
        let overlaps = |suspect: &&Suspect| suspect.range.start < range.end && range.start < suspect.range.end;
        list.iter().filter(overlaps).map(|suspect| suspect.until.unwrap_or(Duration::MAX)).max()
    }

    /// For how long after the server's next answer old requests may be executed.
    pub fn longest(&self, now: Duration) -> Duration {
        let list = self.list.lock().expect("no thread panics with the list locked");
        let left = |suspect: &Suspect| suspect.until.map_or(suspect.quarantine, |until| until.saturating_sub(now));
        list.iter().map(left).max().unwrap_or(Duration::ZERO)
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
        (1..=2).for_each(|cause| suspects.answered(cause, S(0)));
        assert_eq!(suspects.blocked_until(&(0..512), S(1)), Some(S(5)));
        assert_eq!(suspects.blocked_until(&(0..4096), S(1)), Some(S(7)));
        assert_eq!(suspects.blocked_until(&(8192..9000), S(1)), None);
        suspects.release(2);
        assert_eq!(suspects.blocked_until(&(0..4096), S(1)), Some(S(5)));
        suspects.release(1);
        assert_eq!(suspects.blocked_until(&(0..4096), S(1)), None);
        suspects.add(0..512, S(4), 3, S(1));
        suspects.answered(3, S(1));
        assert!(suspects.has_any(S(4)) && !suspects.has_any(S(5)));
    }

    #[test]
    fn a_quarantine_begins_when_the_server_answers_again() {
        let suspects = Suspects::default();
        suspects.add(0..512, S(5), 1, S(0));
        suspects.add(0..512, S(5), 2, S(0));
        assert_eq!(suspects.blocked_until(&(0..512), S(60)), Some(Duration::MAX));
        assert_eq!(suspects.longest(S(60)), S(5));
        suspects.answered(1, S(60));
        suspects.answered(1, S(62));
        assert_eq!(suspects.blocked_until(&(0..512), S(62)), Some(Duration::MAX), "because of the other break");
        // Its queue is gone.
        suspects.disown(2);
        suspects.answered(EARLIER, S(62));
        assert_eq!((suspects.blocked_until(&(0..512), S(62)), suspects.longest(S(62))), (Some(S(67)), S(5)));
        assert_eq!(suspects.blocked_until(&(0..512), S(67)), None);
    }
}
