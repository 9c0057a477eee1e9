//! Memory pressure: caches with a `cache.size_min` shrink while memory is short, and grow back afterwards.
//!
//! The thread `pressure` reads the indicators once a second (`indicators.rs`), decides how far the caches shrink
//! (`controller.rs`), and sends the disk processes the same request as `genblk set cache.size` does. It waits at most
//! [`TIMEOUT`] for their replies. It is started with the first device that has a `cache.size_min`, or for whose
//! configured size there was no memory.
//!
//! A size that results from memory pressure is not recorded: the next daemon starts with the configured size, or, if
//! there is no memory for that, with the size of the cache that it finds. A disk process that dies meanwhile is
//! replaced by one with the same size ([`super::current_config::CurrentConfig`]).

mod controller;
mod indicators;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use log::{info, warn};
use serde_json::json;

use super::current_config::CurrentConfig;
use super::entry::OverviewEntry;
use super::handle::DeviceLink;
use super::operator_state::ChangeGuard;
use super::overview::Overview;
use crate::config::DeviceConfig;
use crate::control::wire::DeviceState;
use crate::disk_protocol::{DeviceReply, DeviceRequest};
use crate::units::PAGE_BYTES;
use controller::{PressureChange, PressureController, size_at};
use indicators::Indicators;

/// How often the indicators are read.
const PERIOD: Duration = Duration::from_secs(1);
/// The pause before a cache that could not grow is tried again.
const REFUSED_PAUSE: Duration = Duration::from_secs(10);
/// How long to wait for replies of disk processes in each period.
const TIMEOUT: Duration = Duration::from_millis(200);

/// Whether the cache of a device may shrink.
pub(super) fn may_shrink(config: &DeviceConfig) -> bool {
    (1..config.cache.size_bytes).contains(&config.cache.size_min_bytes)
}

/// Starts the thread, which runs until the process ends.
pub(super) fn start(overview: &Arc<Overview>) {
    let overview = Arc::clone(overview);
    let (only, speed) = test_overrides();
    let run = move || {
        let mut monitor = PressureMonitor {
            overview,
            indicators: Indicators::new(only),
            controller: PressureController::new(),
            steps: BTreeMap::new(),
            refused: BTreeMap::new(),
            has_warned: false,
        };
        let begun = Instant::now();
        loop {
            thread::sleep(PERIOD / speed);
            monitor.check(begun.elapsed() * speed);
        }
    };
    if let Err(e) = thread::Builder::new().name("pressure".to_owned()).spawn(run) {
        warn!("cannot start the thread that monitors memory pressure: {e}");
    }
}

/// For tests: a PSI file in place of the host's (`GENBLK_TEST_PRESSURE`), and a factor by which time passes faster.
/// Only a binary with debug assertions reads the variable.
fn test_overrides() -> (Option<std::path::PathBuf>, u32) {
    let file = if cfg!(debug_assertions) { std::env::var_os("GENBLK_TEST_PRESSURE") } else { None };
    let speed = if file.is_some() { 10 } else { 1 };
    (file.map(Into::into), speed)
}

/// A change of size that was sent to a disk process.
#[derive(Debug)]
struct Step {
    reply: Receiver<DeviceReply>,
    /// The devices that share the cache, and their bounds before.
    bounds: Vec<(CurrentConfig, Option<u64>)>,
    _changes: Vec<ChangeGuard>,
}

impl Step {
    /// Restores the bounds, after the process has refused.
    fn undo(&self) {
        for (current, before) in &self.bounds {
            current.bound_cache(*before);
        }
    }
}

/// See the module.
struct PressureMonitor {
    overview: Arc<Overview>,
    indicators: Indicators,
    controller: PressureController,
    /// Steps in progress, by device.
    steps: BTreeMap<String, Step>,
    /// Devices whose cache could not grow, and when that was last tried.
    refused: BTreeMap<String, Instant>,
    /// The lack of indicators was logged.
    has_warned: bool,
}

/// How much larger the caches are at a level than at present, in bytes.
fn growth(entries: &[OverviewEntry], level: u32) -> u64 {
    let more = |entry: &OverviewEntry| bound_at(entry, level).saturating_sub(entry.current.cache_bytes());
    caches(entries).into_iter().fold(0, |sum: u64, sharers| sum.saturating_add(more(sharers[0])))
}

/// The size of a device's cache at a level.
fn bound_at(entry: &OverviewEntry, level: u32) -> u64 {
    let config = entry.current.get();
    let (size_bytes, size_min_bytes) = (config.cache.size_bytes, config.cache.size_min_bytes);
    if may_shrink(&config) { size_at(level, size_bytes, size_min_bytes) } else { size_bytes }
}

/// The devices, grouped by cache: read-only ones on one image share one.
fn caches(entries: &[OverviewEntry]) -> Vec<Vec<&OverviewEntry>> {
    let key = |entry: &OverviewEntry| entry.link.as_ref().map(DeviceLink::image_key);
    let mut caches: Vec<Vec<&OverviewEntry>> = Vec::new();
    for entry in entries {
        let is_same = |sharers: &&mut Vec<&OverviewEntry>| key(entry).is_some() && key(sharers[0]) == key(entry);
        match caches.iter_mut().find(is_same) {
            Some(sharers) => sharers.push(entry),
            None => caches.push(vec![entry]),
        }
    }
    caches
}

impl PressureMonitor {
    /// Reads the indicators, and resizes the caches accordingly.
    fn check(&mut self, now: Duration) {
        let entries = self.overview.entries();
        let is_wanted = entries.iter().any(|entry| may_shrink(&entry.current.get()));
        if is_wanted {
            let (sample, has_indicators) = self.indicators.sample(now);
            if !has_indicators && !std::mem::replace(&mut self.has_warned, true) {
                warn!(
                    "cache.size_min has no effect: this kernel has no PSI (/proc/pressure/memory; CONFIG_PSI, psi=1), \
                     and no control group of the daemon has a memory.high"
                );
            }
            let indicators = &self.indicators;
            let change = self.controller.advance(sample, |level| indicators.has_room(growth(&entries, level)));
            if let Some(change) = change {
                self.report(&entries, change);
            }
        } else if self.controller.level() > 0 {
            // The operator has removed every size_min.
            self.controller = PressureController::new();
        }
        for sharers in caches(&entries) {
            self.follow(&sharers);
        }
        self.reap();
    }

    fn report(&self, entries: &[OverviewEntry], change: PressureChange) {
        let shrinking = entries.iter().filter(|entry| may_shrink(&entry.config));
        let names: Vec<_> = shrinking.map(|entry| entry.config.name.as_str()).collect();
        let events = &self.overview.events;
        match change {
            PressureChange::Began(reason) => {
                warn!("memory pressure: {reason}; caches shrink down to cache.size_min: {}", names.join(", "));
                events.add(None, "memory_pressure_began", json!({ "reason": reason, "devices": names }));
            }
            PressureChange::Ended(after) => {
                let seconds = after.as_secs();
                info!("memory pressure has ended after {seconds} s; caches have their configured sizes again");
                events.add(None, "memory_pressure_ended", json!({ "seconds": seconds, "devices": names }));
            }
        }
    }

    /// Resizes a cache to the present level.
    fn follow(&mut self, sharers: &[&OverviewEntry]) {
        let first = sharers[0];
        let name = &first.config.name;
        let is_refused = self.refused.get(name).is_some_and(|at| at.elapsed() < REFUSED_PAUSE);
        if first.progress.state == DeviceState::Ending || self.steps.contains_key(name) || is_refused {
            return;
        }
        let Some(wanted) = self.next_size(first) else { return };
        let changes: Vec<_> = sharers.iter().map_while(|entry| ChangeGuard::begin_step(&entry.operator)).collect();
        if changes.len() < sharers.len() {
            return;
        }
        let bound = Some(wanted).filter(|wanted| *wanted < first.current.get().cache.size_bytes);
        let bounds = sharers.iter().map(|entry| (entry.current.clone(), entry.current.bound_cache(bound))).collect();
        // A device that is not served starts with the new bound.
        let Some(link) = &first.link else { return };
        let request = DeviceRequest::Configure { settings: Box::new(first.current.settings()) };
        // A process that has ended is replaced by one with the new bound.
        if let Ok(reply) = link.process.request(link.device, request) {
            self.steps.insert(name.clone(), Step { reply, bounds, _changes: changes });
        }
    }

    /// The next size of a device's cache; `None`: no change.
    fn next_size(&self, entry: &OverviewEntry) -> Option<u64> {
        let (present, wanted) = (entry.current.cache_bytes(), bound_at(entry, self.controller.level()));
        if wanted > present {
            return Some(wanted).filter(|wanted| !entry.is_frozen() && self.indicators.has_room(wanted - present));
        }
        let cache = entry.page.read().cache;
        let is_shrinking = cache.frames.saturating_mul(PAGE_BYTES) > present;
        if wanted == present || entry.is_frozen() || entry.link.is_some() && is_shrinking {
            return None;
        }
        // Dirty pages stay, and as many frames again, so that no write waits for room.
        let kept = cache.dirty_pages.saturating_mul(2 * PAGE_BYTES);
        Some(wanted.max(kept)).filter(|wanted| *wanted < present)
    }

    /// Receives replies, for a short time.
    fn reap(&mut self) {
        let until = Instant::now() + TIMEOUT;
        let refused = &mut self.refused;
        self.steps.retain(|name, step| {
            match step.reply.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Err(RecvTimeoutError::Timeout) => return true,
                Ok(DeviceReply::Refused { why } | DeviceReply::Failed { fault: why }) => {
                    step.undo();
                    if refused.insert(name.clone(), Instant::now()).is_none() {
                        warn!("{name}: its cache cannot grow back yet: {why}");
                    }
                }
                // Done, or the process has ended, as above.
                Ok(_) | Err(RecvTimeoutError::Disconnected) => drop(refused.remove(name)),
            }
            false
        });
    }
}

#[cfg(test)]
mod tests {
    use std::iter;
    use std::path::PathBuf;
    use std::sync::mpsc::channel;

    use super::super::entry::DeviceProgress;
    use super::*;
    use crate::cache::Stats;
    use crate::config::Socket;
    use crate::disk_stats::{DiskState, StatsPage};
    use controller::Sample;

    const MIB: u64 = 1 << 20;

    fn monitor() -> PressureMonitor {
        PressureMonitor {
            overview: Overview::new(iter::empty()),
            indicators: Indicators::new(Some("/nonexistent".into())),
            controller: PressureController::new(),
            steps: BTreeMap::new(),
            refused: BTreeMap::new(),
            has_warned: false,
        }
    }

    /// The configuration of a cache of 256 MiB, which may shrink to 64 MiB.
    fn config() -> DeviceConfig {
        let mut config = DeviceConfig::new("disk", Socket::Path(PathBuf::new()), "image");
        (config.cache.size_bytes, config.cache.size_min_bytes) = (256 * MIB, 64 * MIB);
        config
    }

    #[test]
    fn a_cache_shrinks_to_twice_its_dirty_pages_at_most() {
        let mut monitor = monitor();
        for second in 0..100 {
            let limit = Some("/sys/fs/cgroup/memory.high".into());
            let sample = Sample { now: Duration::from_secs(second), reached_limit: limit, ..Sample::default() };
            monitor.controller.advance(sample, |_| true);
        }
        let config = config();
        let (page, _file) = StatsPage::create(1).unwrap();
        let entry = OverviewEntry {
            current: CurrentConfig::new(&config),
            config: Arc::new(config),
            page: Arc::new(page),
            progress: DeviceProgress {
                state: DeviceState::Serving,
                why: None,
                pid: None,
                was_served: true,
                may_reconnect_until: None,
                is_attaching: false,
                needs_final_flush: false,
            },
            link: None,
            operator: Arc::default(),
            commands: channel().0,
        };
        for (dirty_mib, size_mib) in [(0, Some(64)), (32, Some(64)), (60, Some(120)), (128, None), (200, None)] {
            let cache =
                Stats { frames: 256 * MIB / PAGE_BYTES, dirty_pages: dirty_mib * MIB / PAGE_BYTES, ..Stats::default() };
            entry.page.publish(&DiskState { cache, ..DiskState::default() });
            let size = monitor.next_size(&entry);
            assert_eq!(size, size_mib.map(|mib: u64| mib * MIB), "{dirty_mib} MiB are dirty");
        }
    }

    /// Otherwise the next process of the disk would start with a size for which there is no memory.
    #[test]
    fn a_refused_cache_size_does_not_become_the_bound() {
        let mut monitor = monitor();
        let current = CurrentConfig::new(&config());
        let refused = || DeviceReply::Refused { why: "no memory".to_owned() };
        let failed = || DeviceReply::Failed { fault: "no memory".to_owned() };
        let replies = [(Some(refused()), 128), (Some(failed()), 128), (Some(DeviceReply::Done), 192), (None, 192)];
        for (reply, bound_mib) in replies {
            let case = format!("{reply:?}");
            current.bound_cache(Some(128 * MIB));
            let bounds = vec![(current.clone(), current.bound_cache(Some(192 * MIB)))];
            let (sender, receiver) = channel();
            if let Some(reply) = reply {
                sender.send(reply).unwrap();
            }
            drop(sender);
            monitor.steps.insert("disk".to_owned(), Step { reply: receiver, bounds, _changes: Vec::new() });
            monitor.reap();
            assert_eq!(current.cache_bytes(), bound_mib * MIB, "{case}");
            assert_eq!((monitor.steps.len(), monitor.refused.contains_key("disk")), (0, bound_mib == 128), "{case}");
        }
    }
}
