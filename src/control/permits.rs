//! How many connections and streams there are at a time. Clients that may change nothing, all together and each user by
//! itself, keep neither the operator nor each other out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// Most connections at a time.
pub const CONNECTIONS_MAX: usize = 16;
/// So many of them are for clients that may change something: others cannot keep the operator out.
const CONNECTIONS_RESERVED: usize = 4;
/// Most connections of one user who may change nothing.
const CONNECTIONS_OF_USER_MAX: usize = 8;
/// Most streams of users who may change nothing: replies that come until the client hangs up. Their other places are
/// for calls that end.
const STREAMS_MAX: usize = 8;
/// Most streams of one of them.
const STREAMS_OF_USER_MAX: usize = 4;

/// Who is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Caller {
    pub uid: u32,
    /// Root and the daemon's own user may change what the daemon does.
    pub may_change: bool,
}

impl Caller {
    /// Most connections, of all clients and of its user.
    pub fn places(self) -> (usize, usize) {
        match self.may_change {
            true => (CONNECTIONS_MAX, CONNECTIONS_MAX),
            false => (CONNECTIONS_MAX - CONNECTIONS_RESERVED, CONNECTIONS_OF_USER_MAX),
        }
    }

    fn streams(self) -> (usize, usize) {
        match self.may_change {
            true => (usize::MAX, usize::MAX),
            false => (STREAMS_MAX, STREAMS_OF_USER_MAX),
        }
    }
}

/// The permits that are taken: by users, and how many in all count for the bound of a caller.
#[derive(Debug, Default)]
pub(super) struct Permits {
    connections: Mutex<HashMap<Caller, usize>>,
    streams: Mutex<HashMap<Caller, usize>>,
}

impl std::hash::Hash for Caller {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.uid.hash(state);
    }
}

/// What a permit is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PermitKind {
    Connection,
    Stream,
}

impl Permits {
    fn taken(&self, kind: PermitKind) -> MutexGuard<'_, HashMap<Caller, usize>> {
        let taken = if kind == PermitKind::Connection { &self.connections } else { &self.streams };
        taken.lock().expect("no thread panics with the permits locked")
    }

    fn take(self: &Arc<Self>, caller: Caller, kind: PermitKind) -> Option<Permit> {
        let (all_max, own_max) = if kind == PermitKind::Connection { caller.places() } else { caller.streams() };
        let mut taken = self.taken(kind);
        let counts = |other: &Caller| kind == PermitKind::Connection || !other.may_change;
        let all: usize = taken.iter().filter(|(other, _)| counts(other)).map(|(_, count)| count).sum();
        let own = taken.get(&caller).copied().unwrap_or_default();
        if all >= all_max || own >= own_max {
            return None;
        }
        taken.insert(caller, own + 1);
        drop(taken);
        Some(Permit { permits: Arc::clone(self), caller, kind })
    }

    /// A place for a connection.
    pub fn connection(self: &Arc<Self>, caller: Caller) -> Option<Permit> {
        self.take(caller, PermitKind::Connection)
    }

    /// A place for a stream.
    pub fn stream(self: &Arc<Self>, caller: Caller) -> Option<Permit> {
        self.take(caller, PermitKind::Stream)
    }
}

/// A connection or stream that may be open. Dropping it makes room for another one.
#[derive(Debug)]
pub(super) struct Permit {
    permits: Arc<Permits>,
    caller: Caller,
    kind: PermitKind,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut taken = self.permits.taken(self.kind);
        if let Some(count) = taken.get_mut(&self.caller) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.caller);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::iter::from_fn;

    use super::*;

    const OPERATOR: Caller = Caller { uid: 0, may_change: true };

    fn user(uid: u32) -> Caller {
        Caller { uid, may_change: false }
    }

    #[test]
    fn places_are_kept_for_clients_that_may_change_something_and_for_other_users() {
        let permits = Arc::new(Permits::default());
        let held: Vec<_> = from_fn(|| permits.connection(user(1))).collect();
        assert_eq!(held.len(), CONNECTIONS_OF_USER_MAX);
        let others: Vec<_> = from_fn(|| permits.connection(user(2))).collect();
        assert_eq!(held.len() + others.len(), CONNECTIONS_MAX - CONNECTIONS_RESERVED);
        let operators: Vec<_> = from_fn(|| permits.connection(OPERATOR)).collect();
        assert_eq!(operators.len(), CONNECTIONS_RESERVED);
        drop(held);
        assert!(permits.connection(user(3)).is_some());
    }

    #[test]
    fn streams_of_users_who_may_change_nothing_leave_places_for_calls() {
        let permits = Arc::new(Permits::default());
        let operators: Vec<_> = (0..CONNECTIONS_MAX).map_while(|_| permits.stream(OPERATOR)).collect();
        assert_eq!(operators.len(), CONNECTIONS_MAX);
        let held: Vec<_> = from_fn(|| permits.stream(user(1))).collect();
        assert_eq!(held.len(), STREAMS_OF_USER_MAX);
        let others: Vec<_> = (2..9).flat_map(|uid| permits.stream(user(uid))).collect();
        assert_eq!(held.len() + others.len(), STREAMS_MAX);
        drop(held);
        assert!(permits.stream(user(1)).is_some());
        assert!(permits.streams.lock().unwrap().iter().all(|(_, count)| *count > 0), "no user is remembered for ever");
    }
}
