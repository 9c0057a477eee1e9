//! Broken connections of an image, and whether the cache knows that they may have lost data.
//!
//! Several servers may answer at one address, each with a write cache of its own, and a restart of one of them breaks
//! only its connections. So a loss concerns the whole image: once a connection breaks, every queue connects again, and
//! the first Sync after that fails with [`Fault::Lost`](crate::units::Fault::Lost), whichever queue it is sent through.
//!
//! => A Sync succeeds only if no connection broke after its submission, every connection was requested after the last
//!    break, and the cache has been told of it. So everything that it covers was completed on living connections.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::notifier::Notifier;
use crate::fault_injection::{PlantedBug, planted};

/// See the documentation of the module.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Number of breaks, except those of connections that an earlier break made obsolete.
    breaks: AtomicU64,
    /// At the last of them, the server or the network did not respond.
    was_timeout: AtomicBool,
    /// Number of possible losses of data.
    count: AtomicU64,
    /// How many of them the cache has been told.
    told: AtomicU64,
    members: Mutex<Members>,
}

#[derive(Debug, Default)]
struct Members {
    joined: u64,
    list: Vec<Member>,
}

/// A queue.
#[derive(Debug)]
struct Member {
    id: u64,
    /// The number of breaks when its last connection was requested.
    breaks: u64,
    /// Wakes its worker.
    wake: Option<Notifier>,
}

impl Losses {
    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().expect("no thread panics with the list locked")
    }

    /// Number of breaks so far.
    pub fn breaks(&self) -> u64 {
        self.breaks.load(Ordering::Acquire)
    }

    /// Whether the break of a connection counts as a timeout: also that of one that a timeout of another queue made
    /// obsolete, because the network may hold requests of both. To be called before [`Losses::broken`].
    pub fn is_timeout(&self, is_obsolete: bool, timed_out: bool) -> bool {
        if is_obsolete {
            return timed_out || self.was_timeout.load(Ordering::Acquire);
        }
        self.was_timeout.store(timed_out, Ordering::Release);
        timed_out
    }

    /// Number of possible losses so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// A queue, which has no connection yet; returns its ID.
    pub fn join(&self, wake: Option<Notifier>) -> u64 {
        let mut members = self.members();
        members.joined += 1;
        let member = Member { id: members.joined, breaks: u64::MAX, wake };
        members.list.push(member);
        members.joined
    }

    pub fn leave(&self, id: u64) {
        self.members().list.retain(|member| member.id != id);
    }

    /// The queue's connection was requested after this many breaks.
    pub fn connected(&self, id: u64, breaks: u64) {
        let mut members = self.members();
        members.list.iter_mut().filter(|member| member.id == id).for_each(|member| member.breaks = breaks);
    }

    /// The connection of a queue has broken. If it was not obsolete, those of all other queues are now.
    pub fn broken(&self, id: u64) {
        let members = self.members();
        let breaks = self.breaks();
        if !members.list.iter().any(|member| member.id == id && member.breaks == breaks) {
            return;
        }
        self.add();
        self.breaks.fetch_add(1, Ordering::AcqRel);
        members
            .list
            .iter()
            .filter(|member| member.id != id)
            .filter_map(|member| member.wake.as_ref())
            .for_each(Notifier::notify);
    }

    /// Data may be lost.
    pub fn add(&self) {
        if !planted(PlantedBug::RestartNotReported) {
            self.count.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Whether no queue has an obsolete connection.
    pub fn is_settled(&self) -> bool {
        let breaks = self.breaks();
        self.members().list.iter().all(|member| member.breaks >= breaks)
    }

    /// Whether the cache does not know of a loss.
    pub fn is_untold(&self) -> bool {
        self.count() > self.told.load(Ordering::Acquire)
    }

    /// The cache has been told of this many losses.
    pub fn tell(&self, count: u64) {
        self.told.fetch_max(count, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_timeout_of_one_connection_is_one_of_all_that_it_makes_obsolete() {
        let losses = Losses::default();
        assert!(losses.is_timeout(false, true) && losses.is_timeout(true, false));
        assert!(!losses.is_timeout(false, false) && !losses.is_timeout(true, false));
        assert!(losses.is_timeout(true, true));
    }

    use super::*;

    #[test]
    fn a_break_makes_the_connections_of_all_queues_obsolete_once() {
        let losses = Losses::default();
        let [one, other] = [(); 2].map(|()| losses.join(None));
        [one, other].iter().for_each(|id| losses.connected(*id, losses.breaks()));
        assert!(losses.is_settled() && !losses.is_untold());
        losses.broken(one);
        // It was obsolete.
        losses.broken(other);
        assert_eq!((losses.breaks(), losses.count(), losses.is_settled()), (1, 1, false));
        losses.connected(one, 1);
        assert!(!losses.is_settled());
        losses.leave(other);
        assert!(losses.is_settled() && losses.is_untold());
        losses.tell(1);
        assert!(!losses.is_untold());
    }
}
