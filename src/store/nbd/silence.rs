//! Whether the other end of a TCP connection, or the network, is dead while data waits for it.
//!
//! A server that is slow, or stopped, is not: its kernel acknowledges data and answers probes. The kernel's own timeout
//! (TCP_USER_TIMEOUT) does not make that distinction: it ends the connection if a server accepts no data for some time.

use std::time::Duration;

use crate::sys::stream::Acknowledgement;

/// How long a peer may acknowledge nothing.
const SILENCE_MAX: Duration = Duration::from_secs(11);
/// How many probes it may leave unanswered.
const PROBES_MAX: u8 = 3;

/// See the documentation of the module.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Silence {
    /// Since when data has waited for an acknowledgement of any data.
    since: Option<Duration>,
}

impl Silence {
    /// Whether the peer is dead, by the state of the connection at time `now`. To be called about once a second while
    /// data may be unacknowledged.
    pub fn is_dead(&mut self, state: &Acknowledgement, now: Duration) -> bool {
        if state.unacknowledged == 0 {
            self.since = None;
            return state.probes >= PROBES_MAX && state.age >= SILENCE_MAX;
        }
        let last = now.saturating_sub(state.age);
        let since = self.since.map_or(now, |since| since.max(last));
        self.since = Some(since);
        now.saturating_sub(since) >= SILENCE_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    /// When the peer counts as dead, if it is checked every second until 100 s have passed.
    fn death(state_at: impl Fn(u64) -> Acknowledgement) -> Option<u64> {
        let mut silence = Silence::default();
        (0..100).find(|second| silence.is_dead(&state_at(*second), S(1000 + second)))
    }

    #[test]
    fn a_peer_that_acknowledges_nothing_is_dead_after_eleven_seconds() {
        let of_age = |unacknowledged, age| Acknowledgement { unacknowledged, probes: 0, age: S(age) };
        assert_eq!(death(|second| of_age(1, 500 + second)), Some(11), "it was idle before");
        assert_eq!(death(|second| of_age(1, if second < 5 { 0 } else { second - 4 })), Some(15));
        assert_eq!(death(|second| of_age(1, second % 10)), None, "it acknowledges something every 10 s");
        assert_eq!(death(|second| of_age(0, second)), None, "nothing is unacknowledged");
        assert_eq!(death(|second| of_age(u32::from(second % 9 > 0), second)), None, "all of it, every 9 s");
    }

    #[test]
    fn a_peer_that_accepts_no_data_is_dead_only_if_it_does_not_answer_probes() {
        let probed = |probes, age| Acknowledgement { unacknowledged: 0, probes, age: S(age) };
        assert_eq!(death(|second| probed(1, second % 60)), None, "it answers each probe");
        assert_eq!(death(|second| probed(u8::try_from(second / 2).unwrap(), second)), Some(11));
    }
}
