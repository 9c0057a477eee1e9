//! The latest events of the daemon and its devices, for clients that watch them.
//!
//! There is one list, and each watcher keeps its position in it. So a watcher that stops reading costs nothing and
//! delays nothing: it loses events that leave the list before it continues, and gets their number.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::wire::{ControlEvent, EventCount, Watched};

/// How many events are kept.
pub const KEPT_MAX: usize = 1024;

/// See the module.
#[derive(Debug, Default)]
pub struct EventLog {
    list: Mutex<EventList>,
    added: Condvar,
}

#[derive(Debug, Default)]
struct EventList {
    kept: VecDeque<ControlEvent>,
    /// The number of events so far, which is also the number of the last one: numbers start at 1.
    count: u64,
    by_kind: BTreeMap<&'static str, u64>,
}

impl EventList {
    /// The number of the oldest kept event; of the next one, if none is kept.
    fn first(&self) -> u64 {
        self.count + 1 - self.kept.len() as u64
    }
}

impl EventLog {
    fn lock(&self) -> MutexGuard<'_, EventList> {
        self.list.lock().expect("no thread panics with the events locked")
    }

    /// Adds an event. `detail` is an object.
    pub fn add(&self, device: Option<&str>, kind: &'static str, detail: Value) {
        let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let mut list = self.lock();
        list.count += 1;
        *list.by_kind.entry(kind).or_default() += 1;
        let event = ControlEvent {
            sequence: list.count,
            time_us: u64::try_from(time).unwrap_or(u64::MAX),
            device: device.map(ToOwned::to_owned),
            kind: kind.to_owned(),
            detail,
        };
        if list.kept.len() == KEPT_MAX {
            list.kept.pop_front();
        }
        list.kept.push_back(event);
        drop(list);
        self.added.notify_all();
    }

    /// The number of events of each kind so far.
    pub fn counts(&self) -> Vec<EventCount> {
        self.lock().by_kind.iter().map(|(kind, count)| EventCount { kind: (*kind).to_owned(), count: *count }).collect()
    }

    /// The events from number `since` on (0: all that are kept), of one device or all; and the number at which to
    /// continue. A number larger than the next one belongs to an earlier daemon, whose events are lost.
    pub fn since(&self, since: u64, device: Option<&str>) -> (Watched, u64) {
        let list = self.lock();
        let next = list.count + 1;
        let (first, is_known) = (list.first(), since <= next);
        let lost_events = if since == 0 || !is_known { 0 } else { first.saturating_sub(since) };
        let from = if is_known { since } else { 0 };
        let is_wanted = |event: &&ControlEvent| {
            event.sequence >= from && device.is_none_or(|device| event.device.as_deref() == Some(device))
        };
        let events = list.kept.iter().filter(is_wanted).cloned().collect();
        (Watched { events, lost: lost_events > 0 || !is_known, lost_events }, next)
    }

    /// Waits until there is an event with this number, at most for this long. Returns whether there is one.
    pub fn wait_for(&self, sequence: u64, time: Duration) -> bool {
        let waited = self.added.wait_timeout_while(self.lock(), time, |list| list.count < sequence);
        waited.is_ok_and(|(list, _)| list.count >= sequence)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn sequences(watched: &Watched) -> Vec<u64> {
        watched.events.iter().map(|event| event.sequence).collect()
    }

    #[test]
    fn a_watcher_resumes_at_its_position_and_learns_how_many_events_it_missed() {
        let log = EventLog::default();
        log.add(None, "started", json!({}));
        log.add(Some("vm1"), "frozen", json!({"by": 7}));
        let (first, next) = log.since(0, None);
        assert_eq!((sequences(&first), first.lost, next), (vec![1, 2], false, 3));
        assert_eq!(sequences(&log.since(0, Some("vm1")).0), [2]);
        assert!(!log.wait_for(3, Duration::ZERO));
        for _ in 0..KEPT_MAX + 10 {
            log.add(Some("vm2"), "thawed", json!({}));
        }
        assert!(log.wait_for(3, Duration::ZERO));
        let (late, next) = log.since(next, None);
        assert_eq!((late.events.len(), late.lost, late.lost_events), (KEPT_MAX, true, 10));
        assert_eq!(log.since(next, None).0, Watched { events: Vec::new(), lost: false, lost_events: 0 });
        let counts: Vec<(String, u64)> = log.counts().into_iter().map(|count| (count.kind, count.count)).collect();
        let thawed = (KEPT_MAX + 10) as u64;
        assert_eq!(counts, [("frozen".to_owned(), 1), ("started".to_owned(), 1), ("thawed".to_owned(), thawed)]);
    }

    #[test]
    fn a_sequence_number_of_an_earlier_daemon_reports_lost_events() {
        let log = EventLog::default();
        log.add(None, "started", json!({}));
        let (watched, next) = log.since(500, None);
        assert_eq!((sequences(&watched), watched.lost, next), (vec![1], true, 2));
    }

    #[test]
    fn an_event_wakes_a_waiting_watcher() {
        let log = EventLog::default();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| log.wait_for(1, Duration::from_secs(60)));
            log.add(None, "started", json!({}));
            assert!(waiting.join().unwrap());
        });
    }
}
