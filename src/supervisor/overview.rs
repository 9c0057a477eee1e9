//! The state of the devices for the control socket. The main thread records the progress of each; everything else comes
//! from the device's statistics page, so a client never waits for a disk process.

use std::process;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::entry::{DeviceProgress, OverviewEntry};
use super::handle::DeviceLink;
use super::observe::Observer;
use crate::config::{LimitsConfig, device_table};
use crate::control::change::Refusal;
use crate::control::events::EventLog;
use crate::control::wire::{
    CacheStatistics, Description, DeviceState, DeviceStatistics, DeviceStatus, FrontEnd, Latency, LimitsStatus,
    RequestStatistics, StoreStatistics, WorkerStatistics,
};
use crate::counters::snapshot::Snapshot;
use crate::counters::worker::Activity;
use crate::counters::{Class, Operation, Served};
use crate::disk_stats::DiskState;
use crate::units::{OpClass, PAGE_BYTES};

/// See the module.
#[derive(Debug)]
pub(super) struct Overview {
    since_us: u64,
    entries: Mutex<Vec<OverviewEntry>>,
    observer: Mutex<Observer>,
    /// The log of events.
    pub events: EventLog,
}

impl Overview {
    /// The overview of a daemon that starts.
    pub fn new(entries: impl Iterator<Item = OverviewEntry>) -> Arc<Self> {
        let since_us = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let since_us = u64::try_from(since_us).unwrap_or(u64::MAX);
        let overview = Self {
            since_us,
            entries: Mutex::new(entries.collect()),
            observer: Mutex::default(),
            events: EventLog::default(),
        };
        let devices = overview.lock().len();
        let version = env!("CARGO_PKG_VERSION");
        overview.events.add(None, "started", json!({ "version": version, "pid": process::id(), "devices": devices }));
        Arc::new(overview)
    }

    /// Records the progress of the devices.
    pub fn update(&self, entries: impl Iterator<Item = OverviewEntry>) {
        let entries: Vec<_> = entries.collect();
        self.lock().clone_from(&entries);
        self.observer.lock().expect("no thread panics with it locked").record_changes(&entries, &self.events);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<OverviewEntry>> {
        self.entries.lock().expect("no thread panics with the list locked")
    }

    /// All devices, as of the main thread's last check.
    pub fn entries(&self) -> Vec<OverviewEntry> {
        self.lock().clone()
    }

    /// The device with this name.
    ///
    /// # Errors
    /// `NoSuchDevice`.
    pub fn entry(&self, name: &str) -> Result<OverviewEntry, Refusal> {
        let entries = self.lock();
        entries.iter().find(|entry| entry.config.name == name).cloned().ok_or_else(|| {
            let names: Vec<_> = entries.iter().map(|entry| entry.config.name.clone()).collect();
            Refusal::new("NoSuchDevice", json!({ "device": name, "devices": names }))
        })
    }

    /// The names of the other devices that use the cache of a device.
    pub fn sharers_of(&self, entry: &OverviewEntry) -> Vec<String> {
        let key = |entry: &OverviewEntry| entry.link.as_ref().map(DeviceLink::image_key);
        let shares = |other: &&OverviewEntry| {
            let (one, two) = (&entry.config, &other.config);
            let is_same = one.image == two.image && one.group == two.group || key(entry) == key(other);
            let may_share = [one, two].iter().all(|config| config.read_only && !config.isolate);
            may_share && is_same && one.name != two.name && (key(entry).is_some() || one.image == two.image)
        };
        self.lock().iter().filter(shares).map(|other| other.config.name.clone()).collect()
    }

    /// The daemon's description.
    pub fn describe(&self) -> Description {
        let (version, events) = (env!("CARGO_PKG_VERSION").to_owned(), self.events.counts());
        Description { version, pid: process::id(), since_us: self.since_us, events }
    }

    /// The status of all devices.
    pub fn devices(&self) -> Vec<DeviceStatus> {
        self.lock().clone().iter().map(device).collect()
    }

    /// The current configuration of the devices for which `wanted` holds, as a document.
    pub fn configuration(&self, wanted: &dyn Fn(&str) -> bool) -> String {
        let entries = self.lock().clone();
        let tables = entries.iter().filter(|entry| wanted(&entry.config.name)).map(|entry| device_table(&entry.config));
        tables.collect::<Vec<_>>().join("\n")
    }

    /// The statistics of the devices for which `wanted` holds.
    pub fn statistics(&self, wanted: &dyn Fn(&str) -> bool) -> Vec<DeviceStatistics> {
        self.lock().clone().iter().filter(|entry| wanted(&entry.config.name)).map(statistics).collect()
    }
}

fn device(entry: &OverviewEntry) -> DeviceStatus {
    let OverviewEntry { config, page, progress, operator, .. } = entry;
    let DeviceProgress { state, why, pid, .. } = progress.clone();
    let is_serving = state == DeviceState::Serving;
    let state = if is_serving && entry.is_frozen() { DeviceState::Frozen } else { state };
    let now = page.read();
    let serving = |number: u64| is_serving.then_some(number);
    DeviceStatus {
        name: config.name.clone(),
        state,
        why,
        pid,
        image: config.image.display().to_string(),
        socket: config.socket.to_string(),
        read_only: config.read_only,
        serial: config.serial.clone(),
        mode: config.cache.mode.to_string(),
        front_end: now.front_end.filter(|_| is_serving).map(|(pid, uid)| FrontEnd { pid, uid }),
        image_bytes: serving(now.image_bytes).filter(|bytes| *bytes > 0),
        cache_bytes: config.cache.size_bytes,
        cache_wanted_bytes: Some(entry.current.cache_bytes()),
        cache_present_bytes: serving(now.cache.frames.saturating_mul(PAGE_BYTES)).filter(|bytes| *bytes > 0),
        resident_bytes: serving(now.cache.resident_pages.saturating_mul(PAGE_BYTES)),
        dirty_bytes: serving(now.cache.dirty_pages.saturating_mul(PAGE_BYTES)),
        oldest_operation_us: oldest_us(&now).filter(|_| is_serving),
        pending: operator.lock().pending.iter().map(|key| (*key).to_owned()).collect(),
        limits: Some(config.limits).filter(LimitsConfig::is_set).map(limits),
    }
}

fn limits(config: LimitsConfig) -> LimitsStatus {
    let set = |limit: u64| Some(limit).filter(|limit| *limit > 0);
    LimitsStatus {
        read_iops: set(config.read_iops.into()),
        write_iops: set(config.write_iops.into()),
        total_iops: set(config.total_iops.into()),
        read_bytes_per_second: set(config.read_bytes_per_second),
        write_bytes_per_second: set(config.write_bytes_per_second),
        total_bytes_per_second: set(config.total_bytes_per_second),
        burst_ms: config.burst_ms,
    }
}

fn oldest_us(state: &DiskState) -> Option<u64> {
    state.oldest.map(|oldest| u64::try_from(oldest.age.as_micros()).unwrap_or(u64::MAX))
}

fn statistics(entry: &OverviewEntry) -> DeviceStatistics {
    let snapshot = Snapshot::read(&entry.page.counters());
    let stats = entry.page.read().cache;
    let sum_of = |activity| {
        (0..snapshot.workers()).fold(0, |sum: u64, worker| sum.saturating_add(snapshot.activity(worker, activity)))
    };
    DeviceStatistics {
        name: entry.config.name.clone(),
        since_us: entry.page.since_us(),
        requests: Operation::ALL.into_iter().map(|operation| requests(&snapshot, operation)).collect(),
        cache: CacheStatistics {
            hit_pages: stats.read_hit_pages,
            miss_pages: stats.read_miss_pages,
            hole_pages: stats.read_hole_pages,
            written_pages: stats.write_pages,
            evicted_pages: stats.evicted_pages,
            readahead_pages: stats.readahead_pages,
            readahead_used_pages: stats.readahead_used_pages,
            readahead_wasted_pages: stats.readahead_wasted_pages,
            stalls: stats.stalls,
            throttled: stats.throttled.saturating_add(sum_of(Activity::Throttled)),
            throttled_us: sum_of(Activity::ThrottledNs) / 1000,
            frames: stats.frames,
            frames_free: stats.frames_free,
            resident_pages: stats.resident_pages,
            dirty_pages: stats.dirty_pages,
            dirty_limit_pages: stats.dirty_limit_pages,
            metadata_bytes: stats.metadata_bytes,
        },
        stores: OpClass::ALL.into_iter().map(|class| store(&snapshot, class)).collect(),
        workers: (0..snapshot.workers()).map(|worker| activity(&snapshot, worker)).collect(),
        limited: sum_of(Activity::Limited),
        limited_us: sum_of(Activity::LimitedNs) / 1000,
    }
}

fn requests(snapshot: &Snapshot, operation: Operation) -> RequestStatistics {
    let latency = |served| snapshot.requests(Class::new(operation, served));
    let totals = snapshot.operation(operation);
    let splits = matches!(operation, Operation::Read | Operation::Write);
    RequestStatistics {
        operation: match operation {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Discard => "discard",
            Operation::WriteZeroes => "write_zeroes",
        }
        .to_owned(),
        requests: snapshot.completed(operation),
        errors: totals.errors,
        bytes: totals.bytes,
        in_flight: snapshot.in_flight(operation),
        from_memory: if splits { latency(Served::Memory).into() } else { Latency::default() },
        waited: latency(Served::Waited).into(),
        sizes: snapshot.request_sizes(operation).into(),
    }
}

fn store(snapshot: &Snapshot, class: OpClass) -> StoreStatistics {
    let (latencies, totals) = (snapshot.store(class), snapshot.store_operation(class));
    let operations = latencies.count();
    StoreStatistics {
        operation: match class {
            OpClass::Read => "read",
            OpClass::Write => "write",
            OpClass::Sync => "sync",
            OpClass::Zero => "zero",
            OpClass::Discard => "discard",
            OpClass::Allocate => "allocate",
            OpClass::Map => "map",
        }
        .to_owned(),
        operations,
        errors: totals.errors,
        bytes: totals.bytes,
        in_flight: totals.begun.saturating_sub(operations),
        latency: latencies.into(),
        sizes: snapshot.store_sizes(class).into(),
    }
}

fn activity(snapshot: &Snapshot, worker: usize) -> WorkerStatistics {
    let count = |activity| snapshot.activity(worker, activity);
    WorkerStatistics {
        busy_ns: count(Activity::BusyNs),
        turns: count(Activity::Turns),
        sleeps: count(Activity::Sleeps),
        polls: count(Activity::Polls),
        fruitful_polls: count(Activity::FruitfulPolls),
    }
}
