//! Changing keys of a device while it is served, by `set` and by `reload`.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use log::{error, info, warn};

use serde_json::{Value, json};

use super::SupervisorEvent;
use super::attach::DETACHED_DIRTY;
use super::entry::OverviewEntry;
use super::fleet_change::{FleetChange, FleetPlan, Recorded};
use super::operator::{Operator, ask, invalid, tell};
use super::operator_state::ChangeGuard;
use crate::arena::{check_memory, check_room};
use crate::config::{CacheMode, Config, DeviceConfig, LIVE_KEYS, changed, differing_keys, with_keys_of};
use crate::control::change::{ChangeClient, Refusal};
use crate::control::wire::{ChangeKind, DeviceChange, DeviceKeys, DeviceState};
use crate::disk_protocol::DeviceRequest;
use crate::sys::clock::monotonic_ns;
use crate::systemd::ServiceManager;

/// How long a change waits for a process that is starting, and how often it checks.
const START_TIMEOUT: Duration = Duration::from_secs(5);
const START_WATCH: Duration = Duration::from_millis(20);
/// How long a reload waits for an image that completes nothing: the other disks must not wait for it.
const STALL_MAX: Duration = Duration::from_secs(10);

/// The keys in which two configurations differ: first those that may change while the device is served, then the
/// others.
fn split_keys(old: &DeviceConfig, new: &DeviceConfig) -> (Vec<&'static str>, Vec<&'static str>) {
    let caches = |device: &DeviceConfig| device.cache.mode != CacheMode::None;
    let may_change =
        |key: &&'static str| LIVE_KEYS.contains(key) && (*key != "cache.mode" || caches(old) && caches(new));
    differing_keys(old, new).into_iter().partition(may_change)
}

impl Operator {
    /// Begins a change of a device's keys. Returns its present entry, which includes earlier changes.
    fn begin_change(&self, device: &str, what: &'static str) -> Result<(OverviewEntry, ChangeGuard), Refusal> {
        let entry = self.overview.entry(device)?;
        let change = ChangeGuard::begin(&entry.operator, device, what)?;
        Ok((self.overview.entry(device)?, change))
    }

    /// Sets keys of a device; returns those that have changed.
    pub(super) fn set(
        &self,
        device: &str,
        config: &Value,
        client: &ChangeClient,
    ) -> Result<Vec<&'static str>, Refusal> {
        let (entry, _change) = self.begin_change(device, "set")?;
        let new = changed(&entry.config, config).map_err(|problems| invalid(&problems))?;
        let (keys, others) = split_keys(&entry.config, &new);
        if !others.is_empty() {
            return Err(Refusal::new("NeedsReattach", json!({ "device": device, "keys": others })));
        }
        self.apply(&entry, new, &keys, Recorded::Runtime, client)?;
        if !keys.is_empty() {
            self.overview.events.add(Some(device), "set", json!({ "keys": keys }));
        }
        Ok(keys)
    }

    /// Changes keys of a device: first in the record for the next daemon, then in its process.
    fn apply(
        &self,
        entry: &OverviewEntry,
        new: DeviceConfig,
        keys: &[&'static str],
        record: Recorded,
        client: &ChangeClient,
    ) -> Result<(), Refusal> {
        let name = &entry.config.name;
        if keys.is_empty() {
            return Ok(());
        }
        let others = self.overview.sharers_of(entry);
        if !others.is_empty() && keys.iter().any(|key| key.starts_with("cache.")) {
            let why = format!(
                "its cache is shared with {}, which read the same image; cache keys change only when all of them are \
                 detached and attached again",
                others.join(", ")
            );
            return Err(Refusal::refused(name.clone(), why));
        }
        if entry.is_frozen() {
            return Err(Refusal::new("Frozen", json!({ "device": name })));
        }
        let drains = keys.contains(&"cache.mode") && new.cache.mode == CacheMode::Writethrough && entry.link.is_some();
        if drains {
            ask(entry, DeviceRequest::Flush, client)?;
        }
        let reserves = keys.contains(&"cache.size");
        if reserves {
            reserve(entry, &new, client)?;
        }
        let set = |config| {
            self.ask_main_thread(|requester| FleetChange::Set(Box::new(config), keys.to_vec(), record, requester))
        };
        let recorded = set(new);
        if recorded.is_err() && reserves {
            // Setting the old size again frees the memory that was allocated for the new one.
            let settings = Box::new(entry.current.settings());
            let _ = ask(entry, DeviceRequest::Configure { settings }, client);
        }
        recorded?;
        // A device that is not served, or whose process dies now, will start with the new configuration. A process that
        // is starting right now may have the old one.
        let until = Instant::now() + START_TIMEOUT;
        let now = loop {
            let Ok(now) = self.overview.entry(name) else { return Ok(()) };
            let starts = now.link.is_none() && now.progress.state == DeviceState::Opening;
            if !starts || Instant::now() >= until {
                break now;
            }
            thread::sleep(START_WATCH);
        };
        let settings = Box::new(now.current.settings());
        if let Err(refusal) = tell(&now, DeviceRequest::Configure { settings }, client) {
            // The next process would be refused the same.
            set(DeviceConfig::clone(&entry.config))?;
            return Err(refusal);
        }
        if drains { tell(&now, DeviceRequest::Flush, client) } else { Ok(()) }
    }

    /// Reloads the configuration file and applies it. If anything in it is wrong, or if a new disk cannot be served,
    /// changes nothing.
    /// Returns the changes, and the keys that were set by a command and override the files.
    pub(super) fn reload(
        &self,
        dry_run: bool,
        client: &ChangeClient,
    ) -> Result<(Vec<DeviceChange>, Vec<DeviceKeys>), Refusal> {
        let Ok(_reload) = self.reload.try_lock() else {
            return Err(Refusal::new("Busy", json!({ "what": "the configuration: reload" })));
        };
        client.set_stall_max(STALL_MAX);
        let no_file = || Refusal::refused("the configuration", "the daemon was not started with --config");
        let source = self.source.as_deref().ok_or_else(no_file)?;
        let files = Config::load(source).map_err(|error| {
            let problems: Vec<String> = error.to_string().lines().map(ToOwned::to_owned).collect();
            Refusal::new("Invalid", json!({ "problems": problems }))
        })?;
        let FleetPlan { wanted, current, overridden } = self.compare(files)?;
        let find = |name: &str| current.iter().find(|device| device.name == name);
        let added: Vec<&DeviceConfig> = wanted.iter().filter(|device| find(&device.name).is_none()).collect();
        let gone: Vec<&Arc<DeviceConfig>> =
            current.iter().filter(|device| !wanted.iter().any(|other| other.name == device.name)).collect();
        let mut changes = Vec::new();
        if !dry_run {
            self.attach_all(&added, client)?;
        }
        changes.extend(added.iter().map(|device| DeviceChange::of(&device.name, ChangeKind::Attached, Vec::new())));
        for new in &wanted {
            let Some(old) = find(&new.name) else { continue };
            let (keys, pending) = split_keys(old, new);
            if !dry_run && let Ok(entry) = self.overview.entry(&new.name) {
                entry.operator.lock().pending.clone_from(&pending);
            }
            if !keys.is_empty() {
                changes.push(self.change_keys(old, new, &keys, dry_run, client));
            }
            if !pending.is_empty() {
                changes.push(DeviceChange::of(&new.name, ChangeKind::Pending, owned(&pending)));
            }
        }
        changes.extend(gone.iter().map(|device| self.detach_removed(&device.name, dry_run, client)));
        if !dry_run {
            self.overview.events.add(None, "reloaded", json!({ "changes": changes }));
        }
        let of_device = |(device, keys): (String, Vec<&str>)| DeviceKeys { device, keys: owned(&keys) };
        Ok((changes, overridden.into_iter().map(of_device).collect()))
    }

    /// Detaches a device that the files no longer list, or records that it is kept.
    fn detach_removed(&self, name: &str, dry_run: bool, client: &ChangeClient) -> DeviceChange {
        // A device that was never served has no guest, and detaching it leaves a cache of an earlier daemon alone. But
        // a guest waits for a device whose process has died.
        let never_served = |entry: OverviewEntry| entry.link.is_none() && !entry.progress.was_served;
        let force = self.overview.entry(name).is_ok_and(never_served);
        let detached = if dry_run { Ok(()) } else { self.detach(name, force, false, Recorded::Files, client) };
        let Err(refusal) = detached else { return DeviceChange::of(name, ChangeKind::Detached, Vec::new()) };
        let reason = refusal.reason();
        if self.overview.entry(name).is_err() {
            let reason = reason.strip_prefix(DETACHED_DIRTY).unwrap_or(&reason).to_owned();
            return DeviceChange::of(name, ChangeKind::Detached, vec![reason]);
        }
        let recorded = self.ask_main_thread(|requester| FleetChange::Keep(name.to_owned(), requester));
        let detail = [reason].into_iter().chain(recorded.err().map(|refusal| refusal.reason()));
        DeviceChange::of(name, ChangeKind::Kept, detail.collect())
    }

    /// As [`Operator::reload`], but on a separate thread, which logs the result. Does not wait.
    pub(super) fn reload_on_signal(&self, manager: &Arc<ServiceManager>) {
        let (operator, manager) = (self.clone(), Arc::clone(manager));
        let reload = move || {
            manager.notify(&format!("RELOADING=1\nMONOTONIC_USEC={}", monotonic_ns() / 1000));
            let (_begun, client) = ChangeClient::of_change(false);
            match operator.reload(false, &client) {
                Ok((changes, overridden)) => {
                    if changes.is_empty() {
                        info!("configuration reloaded: no change");
                    }
                    changes.iter().for_each(|change| info!("{}", in_words(change)));
                    overridden.iter().for_each(|keys| info!("{}", keys.in_words()));
                }
                Err(refusal) if refusal.error == "Invalid" => {
                    let problems = refusal.parameters["problems"].as_array().map(Vec::as_slice).unwrap_or_default();
                    problems.iter().filter_map(Value::as_str).for_each(|problem| error!("{problem}"));
                    error!("reload failed: the configuration has errors; nothing has changed");
                }
                Err(refusal) => error!("reload failed: {}; nothing has changed", refusal.reason()),
            }
            manager.notify("READY=1");
        };
        if let Err(e) = thread::Builder::new().name("reload".to_owned()).spawn(reload) {
            warn!("cannot start the thread that reads the configuration again: {e}");
        }
    }

    /// The devices that the files describe, and the current ones.
    fn compare(&self, files: Config) -> Result<FleetPlan, Refusal> {
        let (requester, reply) = std::sync::mpsc::channel();
        let compare = FleetChange::Compare(Box::new(files), requester);
        self.events.send(SupervisorEvent::Change(compare)).map_err(|_| Refusal::shutting_down())?;
        reply.recv().unwrap_or_else(|_| Err(Refusal::shutting_down()))
    }

    /// Attaches devices: all, or none.
    fn attach_all(&self, devices: &[&DeviceConfig], client: &ChangeClient) -> Result<(), Refusal> {
        for (count, device) in devices.iter().enumerate() {
            if let Err(refusal) = self.attach(DeviceConfig::clone(device), Recorded::Files) {
                for attached in &devices[..count] {
                    // The detach fails, and the disk stays, if a front-end has connected meanwhile.
                    let _ = self.detach(&attached.name, false, false, Recorded::Files, client);
                }
                return Err(refusal);
            }
        }
        Ok(())
    }

    /// Changes the keys of a device that may change while it is served.
    fn change_keys(
        &self,
        old: &DeviceConfig,
        new: &DeviceConfig,
        keys: &[&'static str],
        dry_run: bool,
        client: &ChangeClient,
    ) -> DeviceChange {
        let set = || {
            let (entry, _change) = self.begin_change(&old.name, "reload")?;
            self.apply(&entry, with_keys_of(&entry.config, new, keys), keys, Recorded::Files, client)
        };
        match if dry_run { Ok(()) } else { set() } {
            Ok(()) => DeviceChange::of(&old.name, ChangeKind::Changed, owned(keys)),
            Err(refusal) => {
                let detail = owned(keys).into_iter().chain([refusal.reason()]).collect();
                DeviceChange::of(&old.name, ChangeKind::Pending, detail)
            }
        }
    }
}

/// Checks that there is memory for a cache of another size, and makes the process of a served device allocate it.
fn reserve(entry: &OverviewEntry, new: &DeviceConfig, client: &ChangeClient) -> Result<(), Refusal> {
    let size_bytes = entry.current.bounded(new.cache.size_bytes);
    let room = entry.current.cache_room();
    // A cache that is not open yet has no memory, and gets the room that its size needs.
    let old = room.map_or(0, |_| entry.current.cache_bytes());
    // The checks are made here because the sandbox keeps the process from reading the host's memory statistics, and
    // because the device may have no process.
    let has_memory = match size_bytes.saturating_sub(old) {
        0 => Ok(()),
        more => check_memory(more),
    };
    let checked = has_memory.and_then(|()| check_room(room.unwrap_or(u64::MAX), new.cache.size_bytes));
    checked.map_err(|e| Refusal::refused(entry.config.name.clone(), e.to_string()))?;
    if entry.link.is_none() {
        return Ok(());
    }
    tell(entry, DeviceRequest::Reserve { size_bytes }, client)
}

/// A change, for the log.
fn in_words(DeviceChange { device, what, detail }: &DeviceChange) -> String {
    let detail = detail.join(", ");
    match what {
        ChangeKind::Attached => format!("{device}: attached by a reload"),
        ChangeKind::Detached if detail.is_empty() => format!("{device}: detached by a reload"),
        ChangeKind::Detached => format!("{device}: detached by a reload: {detail}"),
        ChangeKind::Changed => format!("{device}: changed by a reload: {detail}"),
        ChangeKind::Pending => format!("{device}: takes effect after detach and attach: {detail}"),
        ChangeKind::Kept => format!("{device}: kept, although it is no longer in the configuration: {detail}"),
    }
}

fn owned(keys: &[&str]) -> Vec<String> {
    keys.iter().map(|key| (*key).to_owned()).collect()
}
