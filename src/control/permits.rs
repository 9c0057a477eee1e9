//! Bounds on concurrent connections and streams. Clients without the right to change anything cannot lock out the
//! operator, and one such user cannot lock out another.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

/// Most connections at a time.
pub const CONNECTIONS_MAX: usize = 16;
/// Connections reserved for clients that may make changes, so that others cannot lock out the operator.
const CONNECTIONS_RESERVED: usize = 4;
/// Most connections of one user without the right to change anything.
const CONNECTIONS_OF_USER_MAX: usize = 8;
/// Most streams (replies until the client disconnects) of all users without that right. Their other connections remain
/// for calls that end.
const STREAMS_MAX: usize = 8;
/// Most streams of one such user.
const STREAMS_OF_USER_MAX: usize = 4;

/// The user of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Caller {
    pub uid: u32,
    /// Whether the user may make changes: root and the daemon's own user may.
    pub may_change: bool,
}

impl Caller {
    /// Most connections in total, and of this user.
    pub fn connection_limits(self) -> (usize, usize) {
        match self.may_change {
            true => (CONNECTIONS_MAX, CONNECTIONS_MAX),
            false => (CONNECTIONS_MAX - CONNECTIONS_RESERVED, CONNECTIONS_OF_USER_MAX),
        }
    }

    fn stream_limits(self) -> (usize, usize) {
        match self.may_change {
            true => (usize::MAX, usize::MAX),
            false => (STREAMS_MAX, STREAMS_OF_USER_MAX),
        }
    }
}

/// The permits in use, by caller.
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

/// The kinds of permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PermitKind {
    Connection,
    Stream,
}

impl Permits {
    fn counts(&self, kind: PermitKind) -> MutexGuard<'_, HashMap<Caller, usize>> {
        let counts = if kind == PermitKind::Connection { &self.connections } else { &self.streams };
        counts.lock().expect("no thread panics with the permits locked")
    }

    fn take(self: &Arc<Self>, caller: Caller, kind: PermitKind) -> Option<Permit> {
        let (all_max, own_max) =
            if kind == PermitKind::Connection { caller.connection_limits() } else { caller.stream_limits() };
        let mut counts = self.counts(kind);
        let is_limited = |other: &Caller| kind == PermitKind::Connection || !other.may_change;
        let all: usize = counts.iter().filter(|(other, _)| is_limited(other)).map(|(_, count)| count).sum();
        let own = counts.get(&caller).copied().unwrap_or_default();
        if all >= all_max || own >= own_max {
            return None;
        }
        counts.insert(caller, own + 1);
        drop(counts);
        Some(Permit { permits: Arc::clone(self), caller, kind })
    }

    /// A permit for a connection.
    pub fn connection(self: &Arc<Self>, caller: Caller) -> Option<Permit> {
        self.take(caller, PermitKind::Connection)
    }

    /// A permit for a stream.
    pub fn stream(self: &Arc<Self>, caller: Caller) -> Option<Permit> {
        self.take(caller, PermitKind::Stream)
    }
}

/// The permit of an open connection or stream. Dropping it frees its place.
#[derive(Debug)]
pub(super) struct Permit {
    permits: Arc<Permits>,
    caller: Caller,
    kind: PermitKind,
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut counts = self.permits.counts(self.kind);
        if let Some(count) = counts.get_mut(&self.caller) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.caller);
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
    fn connections_are_reserved_for_operators_and_for_other_users() {
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
    fn streams_of_read_only_users_leave_connections_for_calls() {
        let permits = Arc::new(Permits::default());
        let operators: Vec<_> = (0..CONNECTIONS_MAX).map_while(|_| permits.stream(OPERATOR)).collect();
        assert_eq!(operators.len(), CONNECTIONS_MAX);
        let held: Vec<_> = from_fn(|| permits.stream(user(1))).take(2 * STREAMS_MAX).collect();
        assert_eq!(held.len(), STREAMS_OF_USER_MAX);
        let others: Vec<_> = (2..9).flat_map(|uid| permits.stream(user(uid))).collect();
        assert_eq!(held.len() + others.len(), STREAMS_MAX);
        drop(held);
        assert!(permits.stream(user(1)).is_some());
        assert!(permits.streams.lock().unwrap().iter().all(|(_, count)| *count > 0), "no record of a user stays");
    }
}
