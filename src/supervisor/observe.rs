//! Makes events of the changes of devices. Each check of the main thread compares every device with its state at the
//! previous check, so a change that is undone between two checks (at most a quarter of a second) makes no event.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::entry::OverviewEntry;
use crate::control::events::EventLog;
use crate::control::wire::DeviceState;
use crate::disk_stats::DiskState;
use crate::units::PAGE_BYTES;

/// An image whose oldest operation is at least this old counts as stalled.
const STALLED: Duration = Duration::from_secs(5);
/// Longest text of an event, in characters. A disk process, which a guest may control, may have written the text.
const TEXT_MAX: usize = 500;

/// The state of a device from which events are made.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Observed {
    state: DeviceState,
    why: Option<String>,
    /// The process that serves it, or else the last one that did.
    pid: Option<u32>,
    front_end: Option<(u32, u32)>,
    /// The operation that its image does not complete.
    stalled: Option<String>,
    image: String,
    resident_bytes: u64,
    dirty_bytes: u64,
}

impl Observed {
    fn of(entry: &OverviewEntry) -> Self {
        let state = entry.page.read();
        let progress = &entry.progress;
        // A process that has just started has not yet written its statistics.
        let is_written = entry.page.silent_for().is_some();
        let is_serving = progress.state == DeviceState::Serving;
        let DiskState { front_end, oldest, cache, .. } = state;
        let stalled = oldest.filter(|oldest| is_serving && oldest.age >= STALLED);
        Self {
            state: if is_serving && !is_written { DeviceState::Opening } else { progress.state },
            why: progress.why.clone(),
            pid: progress.pid,
            front_end: front_end.filter(|_| is_serving),
            stalled: stalled.map(|oldest| oldest.describe()),
            image: entry.config.image.display().to_string(),
            resident_bytes: cache.resident_pages.saturating_mul(PAGE_BYTES),
            dirty_bytes: cache.dirty_pages.saturating_mul(PAGE_BYTES),
        }
    }
}

/// The devices as of the last check.
#[derive(Debug, Default)]
pub(super) struct Observer {
    devices: BTreeMap<String, Observed>,
    /// The devices present at the start are recorded.
    has_begun: bool,
}

impl Observer {
    /// Adds an event for each difference from the last check.
    pub fn record_changes(&mut self, entries: &[OverviewEntry], log: &EventLog) {
        let now = entries.iter().map(|entry| (entry.config.name.clone(), Observed::of(entry))).collect();
        self.compare(now, log);
    }

    fn compare(&mut self, mut now: BTreeMap<String, Observed>, log: &EventLog) {
        let before = std::mem::take(&mut self.devices);
        for (name, device) in &mut now {
            let add = |kind, detail| log.add(Some(name), kind, detail);
            match before.get(name) {
                Some(before) => compare(before, device, add),
                None => {
                    if self.has_begun {
                        add("attached", json!({ "image": device.image }));
                    }
                    let new =
                        Observed { state: DeviceState::Opening, front_end: None, stalled: None, ..device.clone() };
                    compare(&new, device, add);
                }
            }
        }
        for (name, gone) in before.iter().filter(|(name, _)| !now.contains_key(*name)) {
            log.add(Some(name), "detached", json!({ "image": gone.image }));
        }
        (self.devices, self.has_begun) = (now, true);
    }
}

/// Adds the events of a device that changed from `before` to `now`.
fn compare(before: &Observed, now: &mut Observed, add: impl Fn(&'static str, Value)) {
    let restarted = before.pid.zip(now.pid).filter(|(old, new)| old != new);
    if let Some((old, new)) = restarted {
        add("restarted", json!({ "pid": new, "pid_before": old }));
    }
    now.pid = now.pid.or(before.pid);
    if before.state != now.state || before.why != now.why {
        let why = now.why.as_deref().map(shortened);
        let is_serving = now.state == DeviceState::Serving;
        let [resident, dirty] = [now.resident_bytes, now.dirty_bytes].map(|bytes| is_serving.then_some(bytes));
        let detail = json!({
            "from": before.state.word(), "to": now.state.word(), "why": why,
            "resident_bytes": resident, "dirty_bytes": dirty,
        });
        add("state", detail);
    }
    if before.front_end != now.front_end {
        if let Some((pid, uid)) = before.front_end {
            add("front_end_left", json!({ "pid": pid, "uid": uid }));
        }
        if let Some((pid, uid)) = now.front_end {
            add("front_end_attached", json!({ "pid": pid, "uid": uid }));
        }
    }
    match (&before.stalled, &now.stalled) {
        (None, Some(what)) => add("image_stalled", json!({ "operation": shortened(what) })),
        (Some(_), None) => add("image_answers", json!({})),
        _ => {}
    }
}

/// A text of bounded length.
pub(super) fn shortened(text: &str) -> String {
    text.chars().take(TEXT_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> Observed {
        Observed {
            state: DeviceState::Opening,
            why: None,
            pid: None,
            front_end: None,
            stalled: None,
            image: "/a.img".to_owned(),
            resident_bytes: 8192,
            dirty_bytes: 4096,
        }
    }

    fn kinds(log: &EventLog, since: &mut u64) -> Vec<String> {
        let (watched, next) = log.since(*since, None);
        *since = next;
        watched.events.into_iter().map(|event| event.kind).collect()
    }

    #[test]
    fn each_change_of_a_devices_state_is_an_event() {
        let (mut observer, log, mut since) = (Observer::default(), EventLog::default(), 0);
        let mut record_changes = |devices: &[(&str, &Observed)]| {
            observer
                .compare(devices.iter().map(|(name, device)| ((*name).to_owned(), (*device).clone())).collect(), &log);
            kinds(&log, &mut since)
        };
        let serving = Observed { state: DeviceState::Serving, pid: Some(7), ..device() };
        assert_eq!(record_changes(&[("a", &device())]), [""; 0], "what the daemon begins with was not attached");
        assert_eq!(record_changes(&[("a", &serving)]), ["state"]);
        assert_eq!(record_changes(&[("a", &serving), ("b", &device())]), ["attached"]);
        assert_eq!(record_changes(&[("a", &serving)]), ["detached"]);
        let connected = Observed { front_end: Some((9, 0)), ..serving.clone() };
        assert_eq!(record_changes(&[("a", &connected)]), ["front_end_attached"]);
        let stalled = Observed { stalled: Some("a write".to_owned()), ..connected.clone() };
        assert_eq!(record_changes(&[("a", &stalled)]), ["image_stalled"]);
        assert_eq!(record_changes(&[("a", &connected)]), ["image_answers"]);
        let another = Observed { front_end: Some((10, 0)), ..connected.clone() };
        assert_eq!(record_changes(&[("a", &another)]), ["front_end_left", "front_end_attached"]);
        // Its process dies, and another one is started.
        assert_eq!(record_changes(&[("a", &device())]), ["state", "front_end_left"]);
        assert_eq!(record_changes(&[("a", &Observed { pid: Some(8), ..serving.clone() })]), ["restarted", "state"]);
        let failed = Observed { state: DeviceState::Failed, why: Some("x".repeat(9999)), ..device() };
        assert_eq!(record_changes(&[("a", &failed)]), ["state"]);
        let (last, _) = log.since(0, Some("a"));
        let why = last.events.last().unwrap().detail["why"].as_str().unwrap().len();
        assert_eq!(why, TEXT_MAX, "texts are bounded");
    }
}
