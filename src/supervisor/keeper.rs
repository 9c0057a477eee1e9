//! The supervisor's thread for one device, `disk NAME`. It opens the device's image, cache and socket, starts its disk
//! process, restarts that process when it dies, and cleans up at the end. Each of these steps may block on an image
//! that does not answer, so no thread waits for this one without a deadline.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use log::{error, info};

use super::SupervisorEvent;
use super::context::Context;
use super::current_config::CurrentConfig;
use super::handle::DeviceHandle;
use super::process::{DeathCause, EventSink, Exit, Process, ProcessEvent};
use super::restarts::Restarts;
use super::slot::{ImageSlot, SizeStep, open_image};
use super::socket::ListenSocket;
use super::warm_list;
use crate::broker;
use crate::config::DeviceConfig;
use crate::disk_protocol::{DeviceRequest, DeviceSettings, Ending, ToDisk};
use crate::disk_stats::StatsPage;
use crate::error::{Error, ErrorKind, Result};
use crate::recover;
use crate::store::file::IoLock;

/// Pauses between attempts to open a device that could not be served.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// How often to check that the cache's file still exists.
const FILE_CHECK_PERIOD: Duration = Duration::from_millis(250);
/// How often to check whether the image has grown.
const SIZE_CHECK_PERIOD: Duration = Duration::from_secs(2);

// Names of steps, for messages.
const OPENING: &str = "opening the image";
pub(super) const PREPARING: &str = "preparing the cache";
pub(super) const FENCING: &str = "waiting for the I/O of its process, which died,";

/// Commands and events for a keeper.
#[derive(Debug)]
pub(super) enum KeeperCommand {
    /// Serve the device that is open.
    Serve,
    /// Carry out a step of a change of the image's size, if the process with this I/O lock still serves it. The reply:
    /// the size with which it is served.
    Size(IoLock, SizeStep, Sender<std::result::Result<u64, String>>),
    /// Retry failed I/O, or a failed start: the operator has resumed the device.
    Resume,
    /// Complete the guest's requests and accept no new ones. Then wait for `Finish`.
    Quiesce(Ending),
    /// End the device.
    Finish,
    /// An event of the process with this I/O lock.
    Process(IoLock, ProcessEvent),
}

/// Events of a device, for the main thread.
#[derive(Debug)]
pub(super) enum KeeperEvent {
    /// It is open and waits for [`KeeperCommand::Serve`].
    Open,
    Served(DeviceHandle),
    /// It cannot be served; another attempt follows.
    Failed(Error),
    /// Its process died; another one is started after this pause.
    Died(String, Duration),
    /// Its process died too often: it is not served until the operator resumes it.
    RestartsExhausted(Error),
    /// Its rings have stopped; it waits for [`KeeperCommand::Finish`].
    Quiesced,
    /// It has ended. Unless it was abandoned, this process has released everything of it.
    Ended(Result<()>),
}

/// The step in which a keeper is, and since when.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeeperStep {
    /// For messages.
    pub what: &'static str,
    pub since: Instant,
}

/// The main thread's end of a keeper.
#[derive(Debug)]
pub(super) struct Keeper {
    commands: Sender<KeeperCommand>,
    step: Arc<Mutex<KeeperStep>>,
    page: Arc<StatsPage>,
}

impl Keeper {
    /// Starts the thread of device number `index`, which sends its events to `events`.
    ///
    /// # Errors
    /// [`ErrorKind::System`] if the thread cannot be started.
    pub fn start(
        index: usize,
        config: &DeviceConfig,
        current: &CurrentConfig,
        context: &Arc<Context>,
        events: &Sender<SupervisorEvent>,
    ) -> Result<Self> {
        let no_page =
            |e| Error::io(ErrorKind::System, format!("{}: cannot create its statistics page", config.name), e);
        let (page, page_file) = StatsPage::create(config.workers.into()).map_err(no_page)?;
        let page = Arc::new(page);
        let (commands, receiver) = channel();
        let step = Arc::new(Mutex::new(KeeperStep { what: "starting", since: Instant::now() }));
        let worker = KeeperThread {
            index,
            config: config.clone(),
            current: current.clone(),
            context: Arc::clone(context),
            own: commands.clone(),
            commands: receiver,
            events: events.clone(),
            step: Arc::clone(&step),
            restarts: Restarts::new(config.restart_burst),
            page: Arc::clone(&page),
            page_file,
            ending: Cell::new(None),
        };
        let name = format!("disk {}", config.name);
        let failed = |e| Error::io(ErrorKind::System, format!("{}: cannot start a thread", config.name), e);
        thread::Builder::new().name(name).spawn(move || worker.run()).map_err(failed)?;
        Ok(Self { commands, step, page })
    }

    /// Sends a command. A keeper that has ended does not receive it, and need not.
    pub fn send(&self, command: KeeperCommand) {
        let _ = self.commands.send(command);
    }

    /// A sender of commands to it.
    pub fn commands(&self) -> Sender<KeeperCommand> {
        self.commands.clone()
    }

    /// The device's statistics page.
    pub fn page(&self) -> &Arc<StatsPage> {
        &self.page
    }

    /// The keeper's current step.
    pub fn step(&self) -> KeeperStep {
        *lock(&self.step)
    }
}

fn lock(step: &Mutex<KeeperStep>) -> MutexGuard<'_, KeeperStep> {
    step.lock().expect("no thread panics with the step locked")
}

/// The thread's side.
struct KeeperThread {
    index: usize,
    config: DeviceConfig,
    /// The current configuration, with the operator's changes. The keys that this thread reads from `config` never
    /// change.
    current: CurrentConfig,
    context: Arc<Context>,
    /// Sends to `commands`; processes get copies.
    own: Sender<KeeperCommand>,
    commands: Receiver<KeeperCommand>,
    events: Sender<SupervisorEvent>,
    step: Arc<Mutex<KeeperStep>>,
    restarts: Restarts,
    /// The device's statistics page. Its counters continue when one process replaces another.
    page: Arc<StatsPage>,
    page_file: File,
    /// How the daemon ends, once it is ending.
    ending: Cell<Option<Ending>>,
}

/// A device that is open. Fields are dropped in this order: a daemon that waits for the image's lock must find the
/// socket free when it gets the lock.
struct OpenDevice {
    socket: ListenSocket,
    slot: Arc<ImageSlot>,
}

/// Why a device is no longer served.
enum ServiceEnd {
    /// The device has ended, with this result, because it was detached or the daemon ends.
    Ended(Result<()>),
    /// It could not be served.
    Failed(Error),
    /// Its process has died; in words, and why.
    Died(String, DeathCause),
}

impl KeeperThread {
    fn number(&self) -> u32 {
        u32::try_from(self.index).expect("a daemon has fewer devices")
    }

    fn begin(&self, what: &'static str) {
        *lock(&self.step) = KeeperStep { what, since: Instant::now() };
    }

    /// Sends an event. It fails if the main thread no longer waits for this device, and no one needs it then.
    fn report(&self, event: KeeperEvent) {
        let _ = self.events.send(SupervisorEvent::Keeper(self.index, event));
    }

    fn run(mut self) {
        let ended = match self.open_when_possible() {
            Some(opened) => self.keep_served(opened),
            None if self.ending.get() != Some(Ending::HandOver) && recover::has_unwritten_cache(&self.config) => {
                let (name, image) = (&self.config.name, self.config.image.display());
                let context = format!("{name}: ended without being served");
                let hint = format!(
                    "a cache that an earlier daemon left holds data not yet written to image {image}: start the daemon \
                     again, or run \"genblk recover\""
                );
                Err(Error::new(ErrorKind::Image, format!("{context}; {hint}")))
            }
            None => Ok(()),
        };
        self.report(KeeperEvent::Ended(ended));
    }

    /// Tries to open the device until that succeeds, then waits for the command to serve it. `None`: the daemon ends
    /// first.
    fn open_when_possible(&self) -> Option<OpenDevice> {
        let mut pause = RETRY_MIN;
        loop {
            let error = match self.open() {
                Ok(opened) => {
                    self.begin("waiting for the other disks");
                    self.report(KeeperEvent::Open);
                    return self.wait_for_serve().then_some(opened);
                }
                Err(error) => error,
            };
            // A killed daemon releases the image when its I/O completes, at an unpredictable time: do not back off.
            pause = if error.kind() == ErrorKind::Locked { RETRY_MIN } else { pause };
            self.report(KeeperEvent::Failed(error));
            self.begin("waiting to open the image again");
            pause = self.pause(pause)?;
        }
    }

    /// Waits before another attempt; returns the pause before the attempt after that one. `None`: the daemon ends.
    fn pause(&self, pause: Duration) -> Option<Duration> {
        let until = Instant::now() + pause;
        loop {
            match self.commands.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(KeeperCommand::Quiesce(ending)) => {
                    self.ending.set(Some(ending));
                    return None;
                }
                Ok(KeeperCommand::Finish) | Err(RecvTimeoutError::Disconnected) => return None,
                Ok(KeeperCommand::Resume | KeeperCommand::Serve) => return Some(RETRY_MIN),
                Ok(KeeperCommand::Process(..) | KeeperCommand::Size(..)) => {}
                Err(RecvTimeoutError::Timeout) => return Some((pause * 2).min(RETRY_MAX)),
            }
        }
    }

    /// One attempt to open the device.
    fn open(&self) -> Result<OpenDevice> {
        self.begin(OPENING);
        // The operator may have changed it since the start.
        let (config, context) = (&*self.current.get(), &self.context);
        let image = open_image(config, &context.manager)?;
        self.begin(PREPARING);
        let identity = image.identity();
        let group = context.group(&config.group);
        let open_cache = || ImageSlot::new(self.number(), config, image, &context.manager, context.hosting, group);
        // Read-only devices on one image share its slot.
        let is_shared = config.read_only && !config.isolate;
        let slot =
            if is_shared { context.images.get_or_open(identity, &config.group, open_cache) } else { open_cache() }?;
        // One that memory pressure had shrunk, and for which there is no more memory.
        let is_smaller = !is_shared && slot.cache_bytes < config.cache.size_bytes;
        self.current.bound_cache(is_smaller.then_some(slot.cache_bytes));
        self.current.set_cache_room(slot.room_bytes);
        let socket = ListenSocket::open(&self.config, &self.context.sockets)?;
        Ok(OpenDevice { socket, slot })
    }

    /// Waits for the command to serve the device; `false`: the daemon ends.
    fn wait_for_serve(&self) -> bool {
        loop {
            match self.commands.recv() {
                Ok(KeeperCommand::Serve) => return true,
                Ok(KeeperCommand::Resume | KeeperCommand::Process(..) | KeeperCommand::Size(..)) => {}
                Ok(KeeperCommand::Quiesce(ending)) => {
                    self.ending.set(Some(ending));
                    return false;
                }
                Ok(KeeperCommand::Finish) | Err(_) => return false,
            }
        }
    }

    /// Serves the device until it ends, and replaces processes that die.
    fn keep_served(&mut self, opened: OpenDevice) -> Result<()> {
        let mut pause = RETRY_MIN;
        loop {
            let end = self.serve(&opened).unwrap_or_else(ServiceEnd::Failed);
            match end {
                ServiceEnd::Ended(result) => {
                    self.begin("releasing the image");
                    drop(opened);
                    return result;
                }
                ServiceEnd::Failed(error) => {
                    self.report(KeeperEvent::Failed(error));
                    self.begin("waiting to start a process again");
                    match self.pause(pause) {
                        Some(next) => pause = next,
                        None => return self.not_served(opened, "no process could be started for it"),
                    }
                }
                ServiceEnd::Died(why, cause) => {
                    pause = RETRY_MIN;
                    let next = match cause {
                        // That device alone is restarted with pauses, and at last refused: a front-end must not be able
                        // to take an image from its other readers.
                        DeathCause::OtherFrontEnd(_) => Some(Duration::ZERO),
                        DeathCause::OwnFrontEnd(_) | DeathCause::Cache | DeathCause::Unknown => {
                            self.restarts.after_death(Instant::now())
                        }
                    };
                    let is_over = match next {
                        Some(wait) => {
                            self.report(KeeperEvent::Died(why, wait));
                            self.begin("waiting to start a process again");
                            !wait.is_zero() && self.pause(wait).is_none()
                        }
                        None => {
                            let context = format!("{why}; restart_burst exceeded");
                            self.report(KeeperEvent::RestartsExhausted(Error::new(ErrorKind::System, context)));
                            self.begin("waiting to be resumed");
                            !self.wait_for_resume()
                        }
                    };
                    if is_over {
                        return self.not_served(opened, "its process had died");
                    }
                }
            }
        }
    }

    /// Waits until the operator resumes the device; `false`: the daemon ends.
    fn wait_for_resume(&mut self) -> bool {
        loop {
            match self.commands.recv() {
                Ok(KeeperCommand::Resume) => {
                    self.restarts.forget();
                    return true;
                }
                Ok(KeeperCommand::Serve | KeeperCommand::Process(..) | KeeperCommand::Size(..)) => {}
                Ok(KeeperCommand::Quiesce(ending)) => {
                    self.ending.set(Some(ending));
                    return false;
                }
                Ok(KeeperCommand::Finish) | Err(_) => return false,
            }
        }
    }

    /// Ends a device that has no process. The contents of its cache stay for the next daemon.
    fn not_served(&self, opened: OpenDevice, why: &str) -> Result<()> {
        let OpenDevice { socket, slot } = opened;
        drop(socket);
        if self.ending.get() == Some(Ending::HandOver) || !slot.holds_unwritten() {
            return Ok(());
        }
        let (name, image) = (&self.config.name, self.config.image.display());
        let context = format!("{name}: ended without being served, because {why}");
        let hint = format!("its cache stays, and holds data not yet written to image {image}: start the daemon again");
        Err(Error::new(ErrorKind::Image, format!("{context}; {hint}")))
    }

    /// Serves the device with one process, until that process has ended.
    fn serve(&self, opened: &OpenDevice) -> Result<ServiceEnd> {
        self.begin("starting a process");
        let system = |e| Error::io(ErrorKind::System, format!("{}: cannot serve it", self.config.name), e);
        let process = opened.slot.process(&self.current.settings(), || self.begin(FENCING))?;
        let page = &self.page;
        page.begin_process();
        let broker = broker::spawn(&self.config.name).map_err(system)?;
        let files = [opened.socket.listener.as_fd(), self.page_file.as_fd(), broker.as_fd()];
        let device = self.number();
        let own = self.own.clone();
        // It fails if the keeper has ended, which needs no events.
        let sink = EventSink(Box::new(move |io_lock, event| drop(own.send(KeeperCommand::Process(io_lock, event)))));
        let served = self.current.get();
        let settings = self.current.settings();
        process.serve(device, opened.slot.image_of(), settings.clone(), files, page, sink).map_err(system)?;
        let handle = DeviceHandle::new(device, &opened.slot, &process, page, &opened.socket).map_err(system)?;
        let mut session = ProcessSession {
            worker: self,
            device,
            process,
            slot: &opened.slot,
            handle: Some(handle),
            ending: None,
            quiesced: false,
            served,
            settings,
            image_bytes: None,
            size_checked: Instant::now(),
            is_shrinking: false,
            ended: None,
            failure: None,
        };
        Ok(session.run())
    }
}

/// A device and one process that serves it.
struct ProcessSession<'a> {
    worker: &'a KeeperThread,
    device: u32,
    process: Arc<Process>,
    slot: &'a ImageSlot,
    /// The configuration that was sent to the process.
    served: Arc<DeviceConfig>,
    /// The settings that were sent to it.
    settings: DeviceSettings,
    /// The size of the image that was sent to the process for this device; `None` before it is served.
    image_bytes: Option<u64>,
    /// When the size of the image was last checked.
    size_checked: Instant,
    /// The image is about to shrink: it does not follow other changes of its size meanwhile.
    is_shrinking: bool,
    /// For the main thread, once it is served.
    handle: Option<DeviceHandle>,
    ending: Option<Ending>,
    quiesced: bool,
    /// Result of the device, once it has ended.
    ended: Option<Result<()>>,
    /// Why it cannot be served.
    failure: Option<Error>,
}

impl ProcessSession<'_> {
    /// Forwards commands to the process, and events to the main thread, until the process has ended.
    fn run(&mut self) -> ServiceEnd {
        loop {
            match self.worker.commands.recv_timeout(FILE_CHECK_PERIOD) {
                Ok(KeeperCommand::Serve) => {}
                Ok(KeeperCommand::Resume) => self.process.command(&ToDisk::Resume { device: self.device }),
                Ok(KeeperCommand::Quiesce(ending)) => self.end(ending),
                Ok(KeeperCommand::Finish) => self.finish(),
                Ok(KeeperCommand::Process(io_lock, event)) if io_lock == self.process.io_lock() => {
                    if let Some(end) = self.on_event(event) {
                        return end;
                    }
                }
                // From an earlier process.
                Ok(KeeperCommand::Process(..)) => {}
                Ok(KeeperCommand::Size(io_lock, step, reply)) if io_lock == self.process.io_lock() => {
                    // It fails if the client has disconnected.
                    let _ = reply.send(self.change_size(step));
                }
                // For an earlier process.
                Ok(KeeperCommand::Size(..)) => {}
                Err(RecvTimeoutError::Timeout) => {
                    self.slot.check_cache_file(false);
                    self.check_size();
                }
                Err(RecvTimeoutError::Disconnected) => self.end(Ending::WriteBack),
            }
        }
    }

    /// Sends the process the changes that the operator made while it started. Later changes are sent as they are made.
    fn send_changes(&self) {
        let settings = self.worker.current.settings();
        if settings != self.settings {
            let request = DeviceRequest::Configure { settings: Box::new(settings) };
            // No thread waits for the reply to request 0.
            self.process.command(&ToDisk::Request { device: self.device, id: 0, request });
        }
    }

    fn change_size(&mut self, step: SizeStep) -> std::result::Result<u64, String> {
        if self.ending.is_some() {
            return Err("it is shutting down".to_owned());
        }
        let changed = self.slot.change_size(step);
        self.is_shrinking = match step {
            SizeStep::BeginShrink(wanted) => changed.as_ref().is_ok_and(|served| wanted < *served),
            SizeStep::Grow(_) | SizeStep::Truncate(_) | SizeStep::KeepSize => false,
        };
        match (step, &changed) {
            (SizeStep::Grow(_), Ok(_)) => self.send_growth(),
            (SizeStep::Truncate(_), Ok(size_bytes)) => self.image_bytes = Some(*size_bytes),
            _ => {}
        }
        changed
    }

    /// Checks whether the image has grown, and follows it.
    fn check_size(&mut self) {
        if self.is_shrinking {
            return;
        }
        if self.size_checked.elapsed() >= SIZE_CHECK_PERIOD {
            self.size_checked = Instant::now();
            self.slot.follow_growth();
        }
        self.send_growth();
    }

    /// Reports the image's new size to the process, if it has grown.
    fn send_growth(&mut self) {
        let (Some(told), Some(size_bytes)) = (self.image_bytes, self.slot.image_bytes()) else { return };
        if size_bytes > told {
            self.image_bytes = Some(size_bytes);
            if told > 0 {
                info!("{}: its image now has {size_bytes} bytes", self.worker.config.name);
            }
            let request = DeviceRequest::Grow { size_bytes };
            // No thread waits for the reply to request 0.
            self.process.command(&ToDisk::Request { device: self.device, id: 0, request });
        }
    }

    fn end(&mut self, ending: Ending) {
        self.ending = Some(ending);
        self.worker.begin("completing the guest's requests");
        self.process.command(&ToDisk::Quiesce { device: self.device });
    }

    fn finish(&mut self) {
        let ending = self.ending.unwrap_or(Ending::WriteBack);
        self.worker.begin(match ending {
            Ending::WriteBack => "writing dirty pages to the image",
            Ending::HandOver => "leaving the cache to the next daemon",
        });
        // The file may have been removed since the last check.
        self.slot.check_cache_file(true);
        if ending == Ending::WriteBack {
            warm_list::save(&self.served, || self.slot.present_tenure(), &self.process, self.device);
        }
        self.process.command(&ToDisk::Finish { device: self.device, ending });
    }

    fn on_event(&mut self, event: ProcessEvent) -> Option<ServiceEnd> {
        match event {
            ProcessEvent::Served => {
                self.worker.begin("serving");
                self.send_changes();
                // The image may have grown since its size was sent to the process, which other devices may share.
                self.image_bytes = Some(0);
                self.send_growth();
                warm_list::warm(&self.served, &self.slot.last_tenure, &self.process, self.device);
                if let Some(handle) = self.handle.take() {
                    self.worker.report(KeeperEvent::Served(handle));
                }
            }
            ProcessEvent::Failed(error) => self.failure = Some(error),
            ProcessEvent::Quiesced => {
                self.quiesced = true;
                self.worker.report(KeeperEvent::Quiesced);
            }
            ProcessEvent::Ended(result) => {
                self.worker.begin("releasing the image");
                if self.process.remove_device(self.device) {
                    // Other devices still use the process.
                    return Some(ServiceEnd::Ended(result));
                }
                self.ended = Some(result);
            }
            ProcessEvent::Exited(exit, cause) => return Some(self.service_end(exit, cause)),
        }
        None
    }

    /// Why the device is no longer served, now that its process has ended.
    fn service_end(&mut self, exit: Exit, cause: DeathCause) -> ServiceEnd {
        let name = &self.worker.config.name;
        if let Some(error) = self.failure.take() {
            return if self.ending.is_some() { ServiceEnd::Ended(Err(error)) } else { ServiceEnd::Failed(error) };
        }
        if let Some(result) = self.ended.take() {
            if !exit.is_clean() {
                error!("{name}: its disk process did not exit cleanly: {exit}; its cache is kept");
            }
            return ServiceEnd::Ended(result);
        }
        let why = format!("its process has died: {exit}{cause}");
        if self.ending.is_none() {
            return ServiceEnd::Died(why, cause);
        }
        if !self.quiesced {
            self.worker.report(KeeperEvent::Quiesced);
        }
        let kept = if self.slot.holds_unwritten() { "; its cache stays: start the daemon again" } else { "" };
        ServiceEnd::Ended(Err(Error::new(ErrorKind::System, format!("{name}: {why}{kept}"))))
    }
}
