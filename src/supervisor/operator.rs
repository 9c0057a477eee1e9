//! Changes that the operator makes through the control socket. Each runs on a separate thread, `change`, which may wait
//! for a disk process and therefore for an image; the main thread and other connections do not wait for it.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use log::{info, warn};
use serde_json::{Value, json};

use super::SupervisorEvent;
use super::entry::OverviewEntry;
use super::fleet_change::{FleetChange, Recorded, Requester};
use super::handle::DeviceLink;
use super::keeper::KeeperCommand;
use super::operator_state::{ChangeGuard, FreezeLease};
use super::overview::Overview;
use crate::config::{DeviceConfig, Problem, device_of};
use crate::control::change::{BegunChange, Change, ChangeClient, Refusal};
use crate::control::events::EventLog;
use crate::control::server::Host;
use crate::control::wire::{
    Description, DeviceState, DeviceStatistics, DeviceStatus, Dropped, FlushProgress, Freezing, Progressing, Thawed,
};
use crate::disk_protocol::{DeviceReply, DeviceRequest};
use crate::disk_stats::StatsPage;
use crate::sys::clock::monotonic_ns;
use crate::units::PAGE_BYTES;

/// How often a long change reports its progress.
const PROGRESS: Duration = Duration::from_secs(1);
/// How often to check whether the client of a freeze has disconnected.
const FREEZE_WATCH: Duration = Duration::from_millis(50);
/// How often a device that is being detached is checked, and the pause between its last flushes.
const DETACH_WATCH: Duration = Duration::from_millis(100);
const DETACH_RETRY: Duration = Duration::from_secs(1);
/// Why a change stops waiting for an image.
const NO_ANSWER: &str = "its image does not answer";

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Operator {
    pub(super) overview: Arc<Overview>,
    /// Events for the main thread.
    pub(super) events: Sender<SupervisorEvent>,
    /// The configuration file.
    pub(super) source: Option<PathBuf>,
    /// Locked during a reload.
    pub(super) reload: Arc<Mutex<()>>,
    /// Locked while a list of pages in memory is made.
    pub(super) resident: Arc<Mutex<()>>,
}

impl Operator {
    /// An operator of these devices. `source`: the configuration file.
    pub(super) fn new(overview: &Arc<Overview>, events: &Sender<SupervisorEvent>, source: Option<&Path>) -> Self {
        let (source, reload, resident) = (source.map(Into::into), Arc::default(), Arc::default());
        Self { overview: Arc::clone(overview), events: events.clone(), source, reload, resident }
    }

    /// Whether the daemon has a configuration file.
    pub(super) fn has_source(&self) -> bool {
        self.source.is_some()
    }
}

impl Host for Operator {
    fn describe(&self) -> Description {
        self.overview.describe()
    }

    fn devices(&self) -> Vec<DeviceStatus> {
        self.overview.devices()
    }

    fn configuration(&self, wanted: &dyn Fn(&str) -> bool) -> String {
        self.overview.configuration(wanted)
    }

    fn statistics(&self, wanted: &dyn Fn(&str) -> bool) -> Vec<DeviceStatistics> {
        self.overview.statistics(wanted)
    }

    fn events(&self) -> &EventLog {
        &self.overview.events
    }

    fn begin(&self, change: Change, accepts_progress: bool) -> BegunChange {
        let (begun, client) = ChangeClient::of_change(accepts_progress);
        let operator = self.clone();
        let run = move || {
            let result = operator.carry_out(change, &client);
            client.end(result);
        };
        if let Err(e) = thread::Builder::new().name("change".to_owned()).spawn(run) {
            let (failed, client) = ChangeClient::of_change(false);
            client.end(Err(Refusal::refused("a thread cannot be started", e.to_string())));
            return failed;
        }
        begun
    }
}

impl Operator {
    fn carry_out(&self, change: Change, client: &ChangeClient) -> Result<Value, Refusal> {
        match change {
            Change::Flush { device } => {
                let entry = self.overview.entry(&device)?;
                let _change = ChangeGuard::begin(&entry.operator, &entry.config.name, "flush")?;
                ask(&entry, DeviceRequest::Flush, client)?;
                Ok(json!(Progressing { progress: None }))
            }
            Change::Drop { device, flushed } => {
                let entry = self.overview.entry(&device)?;
                let _change = ChangeGuard::begin(&entry.operator, &entry.config.name, "drop")?;
                if flushed {
                    ask(&entry, DeviceRequest::Flush, client)?;
                }
                match ask(&entry, DeviceRequest::DropClean, client)? {
                    DeviceReply::Dropped { pages } => Ok(json!(Dropped { dropped_bytes: pages * PAGE_BYTES })),
                    _ => Err(unexpected(&entry)),
                }
            }
            Change::Warm { device, extents, bytes_max, bytes_per_second } => {
                self.warm(&device, extents.as_deref(), (bytes_max, bytes_per_second), client)
            }
            Change::Resident { device } => self.resident(&device, client),
            Change::Resume { device } => {
                let entry = self.overview.entry(&device)?;
                let resumed = entry.commands.send(KeeperCommand::Resume).is_ok();
                info!("{device}: resumed by the operator");
                self.overview.events.add(Some(&device), "resumed", json!({}));
                Ok(json!({ "resumed": resumed }))
            }
            Change::Freeze { device, timeout_ms, reads } => {
                let frozen = self.freeze(&device, timeout_ms, reads, client)?;
                if client.accepts_progress() {
                    Ok(json!(self.await_thaw(&device, frozen, client)))
                } else {
                    Ok(json!(frozen.0))
                }
            }
            Change::Thaw { device, lease } => {
                let entry = self.overview.entry(&device)?;
                Ok(json!(self.thaw(&entry, lease, client)))
            }
            Change::Attach { config } => {
                let device = device_of(&config).map_err(|problems| invalid(&problems))?;
                Ok(json!({ "attached": self.attach(device, Recorded::Runtime)? }))
            }
            Change::Detach { device, force, discard } => {
                self.detach(&device, force, discard, Recorded::Runtime, client)?;
                Ok(json!(Progressing { progress: None }))
            }
            Change::Resize { device, bytes, shrink } => {
                Ok(json!({ "image_bytes": self.resize(&device, bytes, shrink, client)? }))
            }
            Change::Set { device, config } => Ok(json!({ "changed": self.set(&device, &config, client)? })),
            Change::Reload { dry_run } => {
                let (changes, overridden) = self.reload(dry_run, client)?;
                Ok(json!({ "changes": changes, "overridden": overridden }))
            }
        }
    }

    pub(super) fn attach(&self, device: DeviceConfig, record: Recorded) -> Result<bool, Refusal> {
        self.ask_main_thread(|requester| FleetChange::Attach(Box::new(device), record, requester))
    }

    pub(super) fn detach(
        &self,
        device: &str,
        force: bool,
        discard: bool,
        record: Recorded,
        client: &ChangeClient,
    ) -> Result<(), Refusal> {
        let entry = self.overview.entry(device)?;
        let (waiter, ended) = channel();
        if discard && self.ask_main_thread(|requester| FleetChange::Discard(device.to_owned(), requester, waiter))? {
            info!("{device}: discarding the dirty data that cannot be written to its image, as requested");
            // The client that began the detach gets the same result.
            return ended.recv().unwrap_or_else(|_| Err(Refusal::shutting_down())).map(drop);
        }
        // A forced one waits for no other change: that may be waiting for an image that does not answer.
        let _change = match force {
            false => Some(ChangeGuard::begin(&entry.operator, &entry.config.name, "detach")?),
            true => None,
        };
        if entry.is_frozen() && !force {
            return Err(Refusal::new("Frozen", json!({ "device": device })));
        }
        if !force && !entry.progress.is_attaching {
            prepare_detach(&entry, client)?;
        }
        let (requester, reply) = channel();
        let cancels = entry.progress.is_attaching && !force;
        let change = FleetChange::Detach { name: device.to_owned(), cancels, discards: discard, record, requester };
        self.events.send(SupervisorEvent::Change(change)).map_err(|_| Refusal::shutting_down())?;
        if force {
            entry.operator.lock().forced += 1;
        }
        self.await_detach(&entry, reply, client)
    }

    /// Waits for the end of a detach that has begun.
    fn await_detach(
        &self,
        entry: &OverviewEntry,
        reply: Receiver<Result<bool, Refusal>>,
        client: &ChangeClient,
    ) -> Result<(), Refusal> {
        let device = &entry.config.name;
        let mut stall = ImageStall::begin(&entry.page);
        loop {
            match reply.recv_timeout(DETACH_WATCH) {
                Ok(result) => return result.map(drop),
                Err(RecvTimeoutError::Disconnected) => return Err(Refusal::shutting_down()),
                Err(RecvTimeoutError::Timeout) if stall.exceeds(client.stall_max()) => {
                    self.continue_detach(entry, reply);
                    return Err(Refusal::refused(device.clone(), format!("it is being detached, and {NO_ANSWER}")));
                }
                Err(RecvTimeoutError::Timeout) => self.write_kept_data(device, client),
            }
        }
    }

    /// Continues a detach on another thread, for a client that no longer waits for it.
    fn continue_detach(&self, entry: &OverviewEntry, reply: Receiver<Result<bool, Refusal>>) {
        let (operator, entry, device) = (self.clone(), entry.clone(), entry.config.name.clone());
        let wait = move || {
            let (_begun, client) = ChangeClient::of_change(false);
            if let Err(refusal) = operator.await_detach(&entry, reply, &client) {
                warn!("{}: {}", entry.config.name, refusal.reason());
            }
        };
        if let Err(e) = thread::Builder::new().name("change".to_owned()).spawn(wait) {
            warn!("{device}: cannot start a thread to write what its cache holds: {e}");
        }
    }

    /// During a detach, writes the dirty pages that would be lost with the process. The guest no longer writes.
    fn write_kept_data(&self, device: &str, client: &ChangeClient) {
        let Ok(entry) = self.overview.entry(device) else { return };
        if entry.progress.needs_final_flush
            && let Err(refusal) = ask(&entry, DeviceRequest::Flush, client)
            && refusal.error == "ImageFault"
        {
            let fault = refusal.parameters["fault"].as_str().unwrap_or_default();
            warn!(
                "{device}: detach is waiting: writes to the image fail ({fault}), and its cache is volatile; retrying; \
                 \"genblk detach --force --discard {device}\" drops the dirty data"
            );
            // It fails only if the keeper has ended.
            let _ = entry.commands.send(KeeperCommand::Resume);
            thread::sleep(DETACH_RETRY);
        }
    }

    /// Sends a request to the main thread and waits for its reply.
    pub(super) fn ask_main_thread(&self, change: impl FnOnce(Requester) -> FleetChange) -> Result<bool, Refusal> {
        let (requester, reply) = channel();
        self.events.send(SupervisorEvent::Change(change(requester))).map_err(|_| Refusal::shutting_down())?;
        reply.recv().unwrap_or_else(|_| Err(Refusal::shutting_down()))
    }

    /// Freezes a device.
    fn freeze(
        &self,
        device: &str,
        time_ms: u32,
        reads: bool,
        client: &ChangeClient,
    ) -> Result<(Freezing, FreezeLease), Refusal> {
        let entry = self.overview.entry(device)?;
        let _change = ChangeGuard::begin(&entry.operator, &entry.config.name, "freeze")?;
        let link = link_of(&entry)?;
        // A device that is ending still completes requests and writes to its image.
        if entry.progress.state != DeviceState::Serving {
            return Err(Refusal::refused(device, "it is not served at the moment"));
        }
        if entry.is_frozen() {
            return Err(Refusal::new("Frozen", json!({ "device": device })));
        }
        let since = Instant::now();
        let request = DeviceRequest::Freeze { time_ms, holds_reads: reads };
        if let Err(refusal) = ask(&entry, request, client) {
            info!("{device}: cannot freeze: {}", refusal.reason());
            return Err(refusal);
        }
        let until = since + Duration::from_millis(time_ms.into());
        let number = monotonic_ns() / 1000;
        let freeze = FreezeLease { process: link.process.io_lock(), number, since, until };
        entry.operator.lock().freeze = Some(freeze);
        let frozen_us = micros(since.elapsed());
        info!("{device}: frozen in {} ms; thaws automatically after {time_ms} ms", frozen_us / 1000);
        self.overview.events.add(Some(device), "frozen", json!({ "after_us": frozen_us, "timeout_ms": time_ms }));
        Ok((Freezing { frozen: true, frozen_us, lease: Some(number) }, freeze))
    }

    /// Waits until a freeze has ended; ends it if the client disconnects.
    fn await_thaw(&self, device: &str, (frozen, freeze): (Freezing, FreezeLease), client: &ChangeClient) -> Freezing {
        client.send_progress(&frozen);
        loop {
            let has_disconnected = client.wait_disconnected(FREEZE_WATCH);
            let ended = Freezing { frozen: false, frozen_us: micros(freeze.since.elapsed()), lease: None };
            let Ok(entry) = self.overview.entry(device) else { return ended };
            if entry.freeze() != Some(freeze) {
                if entry.operator.lock().freeze == Some(freeze) {
                    self.overview.events.add(Some(device), "freeze_ended", json!({ "frozen_us": ended.frozen_us }));
                }
                return ended;
            }
            if has_disconnected {
                info!("{device}: the client that froze it has disconnected; thawing");
                self.thaw(&entry, Some(freeze.number), client);
                return ended;
            }
        }
    }
}

impl Operator {
    /// Ends the freeze with the number `lease`; `None`: any freeze.
    fn thaw(&self, entry: &OverviewEntry, lease: Option<u64>, client: &ChangeClient) -> Thawed {
        let thawed = thaw(entry, lease, client);
        if thawed.frozen_us > 0 {
            self.overview.events.add(Some(&entry.config.name), "thawed", json!(thawed));
        }
        thawed
    }
}

/// Ends the freeze with the number `lease`; `None`: any freeze.
fn thaw(entry: &OverviewEntry, lease: Option<u64>, client: &ChangeClient) -> Thawed {
    let device = &entry.config.name;
    let lasting = entry.freeze();
    let begun = entry.operator.lock().freeze.take_if(|freeze| lease.is_none_or(|lease| lease == freeze.number));
    let Some(begun) = begun else { return Thawed { held: false, frozen_us: 0 } };
    let reply = ask(entry, DeviceRequest::Thaw, client);
    let held = lasting == Some(begun) && matches!(reply, Ok(DeviceReply::Thawed { was_frozen: true }));
    let frozen_us = micros(begun.since.elapsed());
    let how = if held { "" } else { "; the freeze ended early: a copy made meanwhile is inconsistent" };
    info!("{device}: thawed after {} ms{how}", frozen_us / 1000);
    Thawed { held, frozen_us }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// The link to a served device.
pub(super) fn link_of(entry: &OverviewEntry) -> Result<DeviceLink, Refusal> {
    entry.link.clone().ok_or_else(|| {
        let why = entry.progress.why.clone().unwrap_or_else(|| "it is not served at the moment".to_owned());
        Refusal::refused(entry.config.name.clone(), why)
    })
}

/// Sends a request to the process of a device and waits for its reply. Meanwhile, a client that accepts more than one
/// reply gets the progress.
pub(super) fn ask(
    entry: &OverviewEntry,
    request: DeviceRequest,
    client: &ChangeClient,
) -> Result<DeviceReply, Refusal> {
    link_of(entry)?;
    let died = || Refusal::refused(entry.config.name.clone(), "its process has died; it is started again");
    checked(entry, exchange(entry, request, client)?.ok_or_else(died)?)
}

/// As [`ask`], but a device that is not served, or whose process dies, is no error: it starts with what is current.
pub(super) fn tell(entry: &OverviewEntry, request: DeviceRequest, client: &ChangeClient) -> Result<(), Refusal> {
    match exchange(entry, request, client)? {
        None | Some(DeviceReply::NotServed) => Ok(()),
        Some(reply) => checked(entry, reply).map(drop),
    }
}

/// A reply, unless it is an error.
fn checked(entry: &OverviewEntry, reply: DeviceReply) -> Result<DeviceReply, Refusal> {
    let name = &entry.config.name;
    match reply {
        DeviceReply::Failed { fault } => {
            let detail = crate::units::counted(entry.page.read().cache.dirty_pages, "dirty page");
            Err(Refusal::new("ImageFault", json!({ "device": name, "fault": fault, "detail": detail })))
        }
        DeviceReply::Refused { why } => Err(Refusal::refused(name.clone(), why)),
        DeviceReply::InUse { by } => Err(in_use(entry, &by)),
        DeviceReply::NotServed => Err(Refusal::refused(name.clone(), "it is not served at the moment")),
        reply => Ok(reply),
    }
}

/// Sends a request and waits for its reply. `None`: the device has no process, or that dies.
///
/// # Errors
/// The wait was ended: by a forced detach, or because the image does not answer a flush.
fn exchange(
    entry: &OverviewEntry,
    request: DeviceRequest,
    client: &ChangeClient,
) -> Result<Option<DeviceReply>, Refusal> {
    let refused = |why: String| Refusal::refused(entry.config.name.clone(), why);
    let Some(link) = &entry.link else { return Ok(None) };
    let dirty = || entry.page.read().cache.dirty_pages * PAGE_BYTES;
    let is_flush = request == DeviceRequest::Flush;
    let total_bytes = dirty();
    let forced = entry.operator.lock().forced;
    let replies = match link.process.request(link.device, request) {
        Ok(replies) => replies,
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(None),
        Err(e) => return Err(refused(format!("cannot reach its disk process: {e}"))),
    };
    let mut stall = ImageStall::begin(&entry.page);
    loop {
        match replies.recv_timeout(PROGRESS) {
            Ok(reply) => return Ok(Some(reply)),
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) if entry.operator.lock().forced != forced => {
                return Err(refused("a forced detach has ended the wait".to_owned()));
            }
            Err(RecvTimeoutError::Timeout) if is_flush => {
                if stall.exceeds(client.stall_max()) {
                    return Err(refused(NO_ANSWER.to_owned()));
                }
                let done_bytes = total_bytes.saturating_sub(dirty());
                client.send_progress(&Progressing { progress: Some(FlushProgress { done_bytes, total_bytes }) });
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

/// The time for which an image has completed no operation.
struct ImageStall<'a> {
    page: &'a StatsPage,
    completed_ops: u64,
    since: Instant,
}

impl<'a> ImageStall<'a> {
    fn begin(page: &'a StatsPage) -> Self {
        Self { page, completed_ops: page.read().cache.completed_ops, since: Instant::now() }
    }

    /// Whether it is longer than `max`; `None`: without limit.
    fn exceeds(&mut self, max: Option<Duration>) -> bool {
        if self.page.read().cache.completed_ops != self.completed_ops {
            *self = Self::begin(self.page);
        }
        max.is_some_and(|max| self.since.elapsed() >= max)
    }
}

/// The error for a configuration with these problems.
pub(super) fn invalid(problems: &[Problem]) -> Refusal {
    invalid_texts(&problems.iter().map(ToString::to_string).collect::<Vec<_>>())
}

/// The error of a call with these problems.
pub(super) fn invalid_texts(problems: &[String]) -> Refusal {
    Refusal::new("Invalid", json!({ "problems": problems }))
}

/// Checks that no front-end uses a device, writes everything, and lets no front-end connect from then on.
fn prepare_detach(entry: &OverviewEntry, client: &ChangeClient) -> Result<(), Refusal> {
    if let Some((pid, uid)) = entry.page.read().front_end.filter(|_| entry.link.is_some()) {
        return Err(in_use(entry, &format!("pid {pid}, uid {uid}")));
    }
    let wait = entry.progress.may_reconnect_until.map(|until| until.saturating_duration_since(Instant::now()));
    if let Some(wait) = wait.filter(|wait| !wait.is_zero()) {
        let by = format!("a front-end that may reconnect after a restart, within {} s", wait.as_secs() + 1);
        return Err(in_use(entry, &by));
    }
    ask(entry, DeviceRequest::Flush, client).map_err(|refusal| not_written(entry, refusal))?;
    // The page is a quarter of a second old, and the flush may have taken long.
    ask(entry, DeviceRequest::StopAccepting, client).map(drop)
}

/// The error for a device that a front-end uses.
fn in_use(entry: &OverviewEntry, by: &str) -> Refusal {
    Refusal::new("InUse", json!({ "device": entry.config.name, "by": by }))
}

/// The error for a device that cannot be detached because writes to its image fail.
fn not_written(entry: &OverviewEntry, refusal: Refusal) -> Refusal {
    if refusal.error != "ImageFault" {
        return refusal;
    }
    let dirty_bytes = entry.page.read().cache.dirty_pages * PAGE_BYTES;
    let fault = refusal.parameters["fault"].clone();
    Refusal::new("NotWritten", json!({ "device": entry.config.name, "dirty_bytes": dirty_bytes, "fault": fault }))
}

fn unexpected(entry: &OverviewEntry) -> Refusal {
    Refusal::refused(entry.config.name.clone(), "unexpected reply from its disk process")
}
