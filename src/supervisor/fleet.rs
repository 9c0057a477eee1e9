//! The main thread's record of all devices. It sends commands to their keepers, checks the devices a few times a
//! second, and waits for none of them without a deadline.

use std::collections::BTreeMap;
use std::mem;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use log::{error, info, warn};

use crate::config::Config;
use crate::disk_protocol::Ending;
use crate::error::{Error, ErrorKind, Result};
use crate::recover;
use crate::sys::signal::name_of;
use crate::systemd::ServiceManager;
use crate::units::counted;

use super::context::Context;
use super::disk::{DevicePhase, Disk, RemainingDevices};
use super::keeper::{KeeperCommand, KeeperEvent};
use super::operator::Operator;
use super::overview::Overview;
use super::runtime::RuntimeFile;
use super::{Strictness, SupervisorEvent, pressure};

/// How often the main thread checks the devices.
const TICK: Duration = Duration::from_millis(250);

/// If this much time lies between two checks, the process was stopped (SIGSTOP, the cgroup freezer): a busy host delays
/// it less. That time is not counted against an image.
const STOPPED_MIN: Duration = Duration::from_secs(2);

/// The end of the process, once it has begun.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shutdown {
    ending: Ending,
    since: Instant,
    /// A second signal came: end devices immediately if their caches stay.
    hurried: bool,
}

/// Checks for caches of earlier daemons, on a separate thread, because that may wait for an image that does not answer.
fn spawn_leftover_check(check: impl FnOnce() + Send + 'static) {
    if let Err(e) = thread::Builder::new().name("leftovers".to_owned()).spawn(check) {
        warn!("cannot start the thread that searches for unused caches: {e}");
    }
}

/// See the module.
pub(super) struct Fleet {
    /// By number. Numbers are never reused in this process.
    pub(super) disks: BTreeMap<usize, Disk>,
    /// The number of the next disk that is attached.
    pub(super) next_disk: usize,
    pub(super) context: Arc<Context>,
    pub(super) events: Sender<SupervisorEvent>,
    /// Record of attached and detached disks; `None` without a control socket.
    pub(super) runtime: Option<RuntimeFile>,
    /// The state that the control socket shows.
    pub(super) overview: Arc<Overview>,
    /// Reloads the configuration file.
    operator: Option<Operator>,
    strictness: Strictness,
    manager: Arc<ServiceManager>,
    /// For listing unused caches after the start.
    unused_caches_check: Option<Config>,
    /// For checking the fd store once every device is served.
    unchecked: Option<Config>,
    pub(super) end: Option<Shutdown>,
    /// Why the daemon ends without a signal.
    failure: Option<Error>,
    is_ready: bool,
    /// The thread that monitors memory pressure was started.
    watches_pressure: bool,
    /// The state last reported to the service manager.
    status: String,
}

impl Fleet {
    /// Starts a keeper for each device of `config`; the keepers send their events to `events`.
    ///
    /// # Errors
    /// [`ErrorKind::System`] if a thread cannot be started.
    pub fn start(
        config: &Config,
        strictness: Strictness,
        context: &Arc<Context>,
        manager: Arc<ServiceManager>,
        events: &Sender<SupervisorEvent>,
        runtime: Option<RuntimeFile>,
    ) -> Result<Self> {
        let start = |(index, device)| Ok((index, Disk::start(index, device, context, events)?));
        let disks: BTreeMap<_, _> = config.devices.iter().enumerate().map(start).collect::<Result<_>>()?;
        Ok(Self {
            overview: Overview::new(disks.values().map(Disk::entry)),
            operator: None,
            next_disk: disks.len(),
            disks,
            context: Arc::clone(context),
            events: events.clone(),
            runtime,
            strictness,
            manager,
            unused_caches_check: Some(config.clone()),
            unchecked: Some(config.clone()),
            end: None,
            failure: None,
            is_ready: false,
            watches_pressure: false,
            status: String::new(),
        })
    }

    /// The state that the control socket shows.
    pub fn overview(&self) -> &Arc<Overview> {
        &self.overview
    }

    /// Makes SIGHUP reload the configuration file.
    pub fn reload_with(&mut self, operator: Operator) {
        self.operator = Some(operator);
    }

    /// Serves until a signal or a failure ends the process.
    ///
    /// # Errors
    /// The first error of a device; the log has the others.
    pub fn run(mut self, events: &Receiver<SupervisorEvent>) -> Result<()> {
        let mut checked_at = Instant::now();
        loop {
            match events.recv_timeout(TICK) {
                Ok(SupervisorEvent::Signal(signal)) => self.on_signal(signal),
                Ok(SupervisorEvent::Keeper(index, event)) => self.on_keeper_event(index, event),
                Ok(SupervisorEvent::Change(change)) => self.on_change(change),
                Ok(SupervisorEvent::ControlBound) => self.on_control_bound(),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::new(ErrorKind::System, "the thread that waits for signals has ended"));
                }
            }
            let since_last = mem::replace(&mut checked_at, Instant::now()).elapsed();
            match &mut self.end {
                Some(end) if since_last >= STOPPED_MIN => {
                    end.since += since_last;
                    self.disks.values_mut().for_each(|disk| disk.exclude_stopped_time(since_last));
                }
                // The process itself was stopped, so the ages are stale: judge at the next check.
                None if since_last >= STOPPED_MIN => {}
                None => self.check_while_serving(),
                Some(end) => {
                    let end = *end;
                    self.check_while_ending(end);
                }
            }
            self.remove_ended();
            self.overview.update(self.disks.values().map(Disk::entry));
            if self.has_ended() {
                return self.result();
            }
        }
    }

    fn on_signal(&mut self, signal: i32) {
        if signal == libc::SIGHUP {
            // With a control socket, SIGHUP only reloads: it must not resume a disk that was stopped for inspection.
            if !self.runtime.as_ref().is_some_and(RuntimeFile::is_owned) {
                self.disks.values().for_each(|disk| disk.send(KeeperCommand::Resume));
            }
            if let Some(operator) = self.operator.as_ref().filter(|operator| operator.has_source()) {
                operator.reload_on_signal(&self.manager);
            }
        } else if let Some(end) = &mut self.end {
            end.hurried = true;
            let waiting: Vec<_> = self.disks.values().filter(|disk| !disk.has_ended()).map(Disk::name).collect();
            warn!("{} again: not waiting for {}", name_of(signal), waiting.join(", "));
            self.disks.values_mut().for_each(Disk::stop_waiting);
        } else if signal == libc::SIGUSR1 {
            info!("{}: stopping, leaving the caches for the next daemon", name_of(signal));
            self.begin_shutdown(Ending::HandOver);
        } else {
            info!("{}: stopping", name_of(signal));
            self.begin_shutdown(Ending::WriteBack);
        }
    }

    /// The previous daemon has ended. The changes that it made since this one started are applied like a reload.
    fn on_control_bound(&mut self) {
        if self.end.is_none()
            && self.runtime.as_mut().is_some_and(RuntimeFile::take_over)
            && let Some(operator) = self.operator.as_ref().filter(|operator| operator.has_source())
        {
            operator.reload_on_signal(&self.manager);
        }
    }

    fn begin_shutdown(&mut self, ending: Ending) {
        self.manager.notify("STOPPING=1");
        self.overview.events.add(None, "stopping", serde_json::json!({ "hands_over": ending == Ending::HandOver }));
        self.end = Some(Shutdown { ending, since: Instant::now(), hurried: false });
        self.refuse_attaches();
        self.disks.values_mut().for_each(|disk| disk.begin_shutdown(ending));
    }

    fn on_keeper_event(&mut self, index: usize, event: KeeperEvent) {
        let is_ending = self.end.is_some();
        // A device that was given up during its detach may still send events.
        let Some(disk) = self.disks.get_mut(&index) else { return };
        match event {
            KeeperEvent::Failed(_) if is_ending || disk.is_ending() => {}
            KeeperEvent::Failed(error) if disk.is_attaching() => self.refuse_attach(index, &error),
            KeeperEvent::Failed(error) if self.strictness == Strictness::AllOrNone => {
                self.failure = Some(error);
                self.begin_shutdown(Ending::HandOver);
            }
            KeeperEvent::Failed(error) => {
                let others = self.disks.iter().filter(|(other, _)| **other != index);
                let is_last = others.clone().all(|(_, disk)| disk.phase() == DevicePhase::Failed);
                if is_last && !self.is_ready {
                    self.failure = Some(error);
                } else {
                    self.disks.get_mut(&index).expect("it was found").fail(&error);
                }
            }
            KeeperEvent::Open => {
                disk.set_phase(DevicePhase::Open);
                let is_attaching = disk.is_attaching();
                let all_open = self.disks.values().all(|disk| disk.phase() == DevicePhase::Open);
                if self.strictness == Strictness::ServeTheOthers || is_attaching {
                    self.disks[&index].send(KeeperCommand::Serve);
                } else if all_open {
                    self.disks.values().for_each(|disk| disk.send(KeeperCommand::Serve));
                }
            }
            KeeperEvent::Served(handle) => {
                disk.serve(handle);
                self.confirm_attach(index);
            }
            KeeperEvent::Died(why, pause) => disk.record_death(&why, pause),
            KeeperEvent::RestartsExhausted(error) if disk.is_attaching() => self.refuse_attach(index, &error),
            KeeperEvent::RestartsExhausted(error) => disk.stop_restarting(&error),
            KeeperEvent::Quiesced => {
                disk.set_phase(DevicePhase::Quiesced);
                self.finish_quiesced();
            }
            KeeperEvent::Ended(result) => disk.record_end(result),
        }
    }

    /// Ends each device whose rings, and the rings of every device on the same image, have stopped: one may wait for a
    /// page that another is reading.
    fn finish_quiesced(&mut self) {
        for index in self.disks.keys().copied().collect::<Vec<_>>() {
            let disk = &self.disks[&index];
            let key = disk.image_key();
            let mut group = self.disks.values().filter(|other| other.image_key() == key);
            // A device that is being detached completes the operations that the others wait for (`WorkerPort::close`).
            let may_end = match self.end {
                None if disk.is_ending() => !disk.needs_final_flush(),
                _ => group.all(Disk::has_quiesced),
            };
            if disk.phase() == DevicePhase::Quiesced && may_end {
                self.disks.get_mut(&index).expect("it was found").finish();
            }
        }
    }

    fn check_while_serving(&mut self) {
        if !self.watches_pressure && self.disks.values().any(Disk::follows_memory) {
            self.watches_pressure = true;
            pressure::start(&self.overview);
        }
        let remaining = RemainingDevices::of(self.disks.values());
        self.disks.values_mut().for_each(|disk| disk.check(&remaining));
        self.finish_quiesced();
        let served = self.disks.values().filter(|disk| disk.phase() == DevicePhase::Served).count();
        let is_decided = self.disks.values().all(Disk::is_start_decided);
        let is_empty = self.disks.is_empty() && self.runtime.is_some();
        if served == 0 && !is_empty || !self.is_ready && !is_decided {
            return;
        }
        if let Some(config) = self.unused_caches_check.take() {
            spawn_leftover_check(move || recover::warn_unused_files(&config));
        }
        let not_served: Vec<_> = self.disks.values().filter_map(Disk::why_not_served).collect();
        let mut status = format!("STATUS=serving {} of {}", served, counted(self.disks.len() as u64, "disk"));
        if !not_served.is_empty() {
            status += &format!("; not served: {}", not_served.join(", "));
        } else if let Some(config) = self.unchecked.take() {
            let manager = Arc::clone(&self.manager);
            spawn_leftover_check(move || recover::warn_unused_fds(&config, &manager));
        }
        if self.status != status {
            let ready = if self.is_ready { "" } else { "READY=1\n" };
            self.manager.notify(&format!("{ready}{status}"));
            (self.status, self.is_ready) = (status, true);
        }
    }

    fn check_while_ending(&mut self, end: Shutdown) {
        for disk in self.disks.values_mut().filter(|disk| !disk.has_ended()) {
            disk.check_while_ending(end.ending, end.since, end.hurried);
        }
        // A device that was abandoned may have been the last of its image.
        self.finish_quiesced();
    }

    /// Removes the runtime file after a clean stop, so that the next daemon serves what the configuration says. Keeps
    /// it unless every cache was written to its image: only the runtime file names a disk that was attached.
    fn finish_runtime_file(&self) {
        let is_orderly = matches!(self.end, Some(Shutdown { ending: Ending::WriteBack, .. }));
        if let Some(runtime) = self.runtime.as_ref().filter(|_| is_orderly) {
            if self.failure.is_none() && self.disks.values().all(Disk::has_ended_cleanly) {
                runtime.remove();
            } else {
                runtime.keep();
            }
        }
    }

    fn has_ended(&self) -> bool {
        match self.end {
            Some(_) => self.disks.values().all(Disk::has_ended),
            None => self.failure.is_some(),
        }
    }

    fn result(self) -> Result<()> {
        self.finish_runtime_file();
        let of_disks = self.disks.into_values().filter_map(Disk::into_error);
        let mut errors = self.failure.into_iter().chain(of_disks);
        let Some(first) = errors.next() else { return Ok(()) };
        errors.for_each(|error| error!("{error}"));
        Err(first)
    }
}
