//! A vring in the control plane: vhost-user-backend's state of it, and the rule that decides when its worker runs it.
//!
//! A vring runs while it is ready (it has a kick descriptor), enabled, and of a valid size. Each change becomes a
//! command to its worker and is complete when the call returns: a stopped vring has completed every request that it
//! took.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLockReadGuard, RwLockWriteGuard};

use log::{error, info};
use vhost_user_backend::{VringRwLock, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueT};

use super::BackendMemory;
use super::inflight::Inflight;
use crate::broker::Broker;
use crate::device::control::Workers;
use crate::device::inflight::InflightTracker;
use crate::device::{Device, RingSetup, WorkerCommand};
use crate::sys::file::is_anonymous_inode;
use crate::sys::regions::FrontEndRecords;
use crate::virtio::GuestRam;
use crate::virtio::split::{QueueLayout, QueuePosition};

thread_local! {
    /// The session whose vrings are under construction, and those constructed so far. `VhostUserDaemon::new` constructs
    /// them in order on the calling thread, without their index or their device.
    static VRING_FACTORY: RefCell<Option<VringFactory>> = const { RefCell::new(None) };
}

struct VringFactory {
    session: Arc<Session>,
    rings: Vec<VringControl>,
}

/// The state that the vrings of a session share.
pub(super) struct Session {
    pub device: Arc<Device>,
    pub workers: Arc<Workers>,
    /// Provides information about the front-end's process.
    pub broker: Arc<Broker>,
    pub inflight: Inflight,
    /// The guest's memory, as last set.
    ram: Mutex<Arc<GuestRam>>,
    /// What the handler of SIGBUS records about memory that the front-end has truncated.
    pub bus_errors: Option<FrontEndRecords>,
    /// Devices of other front-ends may be served by this process too.
    pub shares_process: bool,
    /// The process ID of the front-end; 0 if unknown.
    pub peer_pid: u32,
    /// The log line about the front-end, written once a vring starts.
    connected_line: Mutex<Option<String>>,
    /// A vring has started, or the guest has set its cache mode: the mode no longer changes when the front-end reads
    /// it.
    pub guest_started: AtomicBool,
    /// The vrings that resume at an index other than 0, so they belong to a guest that was already running.
    resumed: Mutex<BTreeSet<u16>>,
}

impl Session {
    /// The session of a front-end that has just connected or starts a new session. `connected_line` is logged once a
    /// vring starts.
    pub fn new(
        device: &Arc<Device>,
        workers: &Arc<Workers>,
        broker: &Arc<Broker>,
        bus_errors: Option<FrontEndRecords>,
        shares_process: bool,
        peer_pid: u32,
        connected_line: Option<String>,
    ) -> Arc<Self> {
        let (device, workers, broker) = (Arc::clone(device), Arc::clone(workers), Arc::clone(broker));
        Arc::new(Self {
            device,
            workers,
            broker,
            inflight: Inflight::default(),
            ram: Mutex::default(),
            bus_errors,
            shares_process,
            peer_pid,
            connected_line: Mutex::new(connected_line),
            guest_started: AtomicBool::new(false),
            resumed: Mutex::default(),
        })
    }

    /// Uses new guest memory, for all rings.
    pub fn set_memory(&self, ram: GuestRam) {
        let ram = Arc::new(match self.bus_errors {
            Some(records) => ram.registered(records.guest),
            None => ram,
        });
        self.workers.set_memory(&ram);
        *self.ram() = ram;
    }

    fn ram(&self) -> MutexGuard<'_, Arc<GuestRam>> {
        self.ram.lock().expect("no thread panics with the memory locked")
    }

    /// Whether `connected_line` is still to be logged.
    pub fn has_connected_line(&self) -> bool {
        self.connected_line.lock().expect("no thread panics with the line locked").is_some()
    }

    /// Records the index at which vring `index` will start; 0 also when it is torn down.
    fn set_base(&self, index: u16, base: u16) {
        let mut resumed = self.resumed();
        if base == 0 {
            resumed.remove(&index);
        } else {
            resumed.insert(index);
        }
    }

    fn resumed(&self) -> MutexGuard<'_, BTreeSet<u16>> {
        self.resumed.lock().expect("no thread panics with the set locked")
    }

    /// Vring `index` starts. If every vring starts at 0, the guest has just booted, and a data loss no longer affects
    /// it.
    fn on_ring_start(&self, index: u16, setup: &RingSetup) {
        self.guest_started.store(true, Ordering::Release);
        if let Some(connected_line) = self.connected_line.lock().expect("no thread panics with the line locked").take()
        {
            info!("{}: {connected_line}", self.device.name);
        }
        // Indices wrap, so the vring of a running guest may be at 0; the inflight region, if there is one, shows that.
        if setup.tracker.as_ref().is_some_and(InflightTracker::is_initialized) {
            self.resumed().insert(index);
        }
        let arena = &self.device.arena;
        if arena.has_data_loss() && self.resumed().is_empty() {
            info!("{}: the guest restarted after the data loss; I/O resumes", self.device.name);
            arena.clear_data_loss();
        }
    }
}

/// Runs `make`, which constructs a `VhostUserDaemon`; returns its result and the session's vrings.
pub(super) fn with_vring_factory<T>(session: &Arc<Session>, make: impl FnOnce() -> T) -> (T, Vec<VringControl>) {
    VRING_FACTORY.set(Some(VringFactory { session: Arc::clone(session), rings: Vec::new() }));
    let made = make();
    let VringFactory { rings, .. } = VRING_FACTORY.take().expect("set above");
    (made, rings)
}

/// One vring; clones share it. See the documentation of the module.
#[derive(Clone)]
pub(super) struct VringControl {
    state: VringRwLock<BackendMemory>,
    shared: Arc<VringShared>,
}

struct VringShared {
    index: u16,
    session: Arc<Session>,
    config: Mutex<VringConfig>,
}

impl fmt::Display for VringShared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: vring {}", self.session.device.name, self.index)
    }
}

/// The conditions under which the vring runs.
#[derive(Default)]
struct VringConfig {
    ready: bool,
    enabled: bool,
    /// The front-end set a size that is not a power of two, which vhost-user-backend would ignore.
    invalid_size: bool,
    running: bool,
    kick: Option<File>,
    call_fd: Option<File>,
    err_fd: Option<File>,
}

impl VringControl {
    fn config(&self) -> MutexGuard<'_, VringConfig> {
        self.shared.config.lock().expect("no thread panics with the configuration locked")
    }

    /// Changes the configuration, then starts or stops the vring accordingly.
    fn change(&self, change: impl FnOnce(&mut VringConfig)) {
        let mut config = self.config();
        change(&mut config);
        let runs = config.ready && config.enabled && !config.invalid_size && config.kick.is_some();
        match (config.running, runs) {
            (false, true) => config.running = self.start(&config),
            (true, false) => {
                config.running = false;
                self.stop();
            }
            _ => {}
        }
    }

    /// Changes values that a running vring reads only when it starts: stops it meanwhile.
    fn change_stopped(&self, change: impl FnOnce(&mut VringConfig)) {
        let mut config = self.config();
        let ran = std::mem::take(&mut config.running);
        if ran {
            self.stop();
        }
        change(&mut config);
        drop(config);
        self.change(|_| {});
    }

    fn start(&self, config: &VringConfig) -> bool {
        let duplicate = |file: &Option<File>| file.as_ref().map(File::try_clone).transpose();
        let descriptors = [&config.kick, &config.call_fd, &config.err_fd].map(duplicate);
        let (kick, call_fd, err_fd) = match descriptors {
            [Ok(Some(kick)), Ok(call_fd), Ok(err_fd)] => (kick, call_fd, err_fd),
            [Err(e), _, _] | [_, Err(e), _] | [_, _, Err(e)] => {
                error!("{}: cannot start it: {e}", self.shared);
                return false;
            }
            [Ok(None), _, _] => return false,
        };
        let index = self.shared.index;
        let state = self.state.get_ref();
        let queue = state.get_queue();
        let session = &self.shared.session;
        let tracker = match session.inflight.tracker_for(&session.device.name, index, queue.size()) {
            Ok(tracker) => tracker,
            Err(why) => {
                error!("{}: not served: {why}", self.shared);
                return false;
            }
        };
        let setup = RingSetup {
            layout: QueueLayout {
                size: queue.size(),
                desc_table: queue.desc_table(),
                avail_ring: queue.avail_ring(),
                used_ring: queue.used_ring(),
                event_idx: queue.event_idx_enabled(),
            },
            position: QueuePosition { next_avail: queue.next_avail(), next_used: queue.next_used() },
            kick,
            call_fd,
            err_fd,
            memory: Arc::clone(&session.ram()),
            tracker,
        };
        session.on_ring_start(index, &setup);
        let worker = session.workers.worker_for(index);
        worker.call(|reply| WorkerCommand::Start(index, Box::new(setup), reply)).is_some()
    }

    /// Duplicates a descriptor of the front-end. On failure the vring does not run, or sends no interrupts; the error
    /// is logged.
    fn duplicate(&self, file: Option<&File>) -> Option<File> {
        let copy = file?.try_clone();
        copy.inspect_err(|e| error!("{}: cannot duplicate its descriptor: {e}", self.shared)).ok()
    }

    /// Stops the vring, and stores its position in vhost-user-backend's state, which GET_VRING_BASE reads.
    fn stop(&self) {
        let index = self.shared.index;
        let stopped = self.shared.session.workers.worker_for(index).call(|reply| WorkerCommand::Stop(index, reply));
        if let Some(Some(position)) = stopped {
            self.state.set_queue_next_avail(position.next_avail);
            self.state.set_queue_next_used(position.next_used);
        }
    }

    /// Whether a worker serves the vring.
    pub fn is_running(&self) -> bool {
        self.config().running
    }

    /// Stops the vring because the front-end has disconnected.
    pub fn close(&self) {
        self.change(|config| config.ready = false);
    }
}

/// Kick, call and error descriptors must be eventfds: a write to a full pipe would block a worker.
///
/// => The broker gets only anonymous inodes. To close a file of a FUSE server that does not answer takes forever, and
///    the broker is part of the supervisor.
fn eventfd_or_none(shared: &VringShared, file: Option<File>) -> Option<File> {
    let file = file?;
    let is_eventfd =
        is_anonymous_inode(&file).and_then(|may_be| Ok(may_be && shared.session.broker.is_eventfd(&file)?));
    match is_eventfd {
        Ok(true) => return Some(file),
        Ok(false) => error!(
            "{shared}: ignored a kick, call or error descriptor that is not an eventfd: the front-end is \
             faulty"
        ),
        Err(e) => error!("{shared}: ignored a descriptor that could not be checked: {e}"),
    }
    None
}

impl<'a> VringStateGuard<'a, BackendMemory> for VringControl {
    type G = RwLockReadGuard<'a, VringState<BackendMemory>>;
}

impl<'a> VringStateMutGuard<'a, BackendMemory> for VringControl {
    type G = RwLockWriteGuard<'a, VringState<BackendMemory>>;
}

impl VringT<BackendMemory> for VringControl {
    fn new(memory: BackendMemory, max_queue_size: u16) -> Result<Self, QueueError> {
        let state = VringRwLock::new(memory, max_queue_size)?;
        VRING_FACTORY.with_borrow_mut(|slot| {
            let VringFactory { session, rings } = slot.as_mut().expect("inside with_vring_factory()");
            let index = u16::try_from(rings.len()).expect("256 rings at most");
            let shared = VringShared { index, session: Arc::clone(session), config: Mutex::default() };
            let ring = Self { state, shared: Arc::new(shared) };
            rings.push(ring.clone());
            Ok(ring)
        })
    }

    fn get_ref(&self) -> RwLockReadGuard<'_, VringState<BackendMemory>> {
        self.state.get_ref()
    }

    fn get_mut(&self) -> RwLockWriteGuard<'_, VringState<BackendMemory>> {
        self.state.get_mut()
    }

    fn set_queue_ready(&self, ready: bool) {
        self.state.set_queue_ready(ready);
        if !ready {
            self.shared.session.set_base(self.shared.index, 0);
        }
        self.change(|config| config.ready = ready);
    }

    fn set_enabled(&self, enabled: bool) {
        self.state.set_enabled(enabled);
        self.change(|config| config.enabled = enabled);
    }

    fn set_kick(&self, file: Option<File>) {
        let file = eventfd_or_none(&self.shared, file);
        // vhost-user-backend marks a vring ready when it has a kick descriptor.
        let copy = self.duplicate(file.as_ref());
        self.change_stopped(|config| config.kick = file);
        self.state.set_kick(copy);
    }

    fn set_call(&self, file: Option<File>) {
        let file = eventfd_or_none(&self.shared, file);
        let mut config = self.config();
        if config.running {
            let index = self.shared.index;
            let copy = self.duplicate(file.as_ref());
            self.shared.session.workers.worker_for(index).call(|reply| WorkerCommand::SetCallFd(index, copy, reply));
        }
        config.call_fd = file;
    }

    fn set_queue_info(&self, desc_table: u64, avail_ring: u64, used_ring: u64) -> Result<(), QueueError> {
        let mut result = Ok(());
        self.change_stopped(|_| result = self.state.set_queue_info(desc_table, avail_ring, used_ring));
        result
    }

    fn set_queue_size(&self, size: u16) {
        self.change_stopped(|config| {
            config.invalid_size = !size.is_power_of_two();
            if config.invalid_size {
                error!("{}: disabled: its size {size} is not a power of two", self.shared);
            } else {
                self.state.set_queue_size(size);
            }
        });
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        if self.get_ref().get_queue().event_idx_enabled() != enabled {
            self.change_stopped(|_| self.state.set_queue_event_idx(enabled));
        }
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.shared.session.set_base(self.shared.index, base);
        self.change_stopped(|_| self.state.set_queue_next_avail(base));
    }

    /// => vhost-user-backend read `index` from guest memory while the vring may have been running. The valid index is
    ///    the one in guest memory after it has stopped.
    fn set_queue_next_used(&self, index: u16) {
        self.change_stopped(|_| self.state.set_queue_next_used(self.state.queue_used_idx().unwrap_or(index)));
    }

    fn queue_next_avail(&self) -> u16 {
        self.state.queue_next_avail()
    }

    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        self.state.queue_used_idx()
    }

    fn set_err(&self, file: Option<File>) {
        let file = eventfd_or_none(&self.shared, file);
        let mut config = self.config();
        if config.running {
            let index = self.shared.index;
            let copy = self.duplicate(file.as_ref());
            self.shared.session.workers.worker_for(index).call(|reply| WorkerCommand::SetErrFd(index, copy, reply));
        }
        config.err_fd = file;
    }

    // The other methods serve vhost-user-backend's own worker threads, of which there are none.

    fn add_used(&self, head: u16, len: u32) -> Result<(), QueueError> {
        self.state.add_used(head, len)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.state.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, QueueError> {
        self.state.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), QueueError> {
        self.state.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, QueueError> {
        self.state.needs_notification()
    }

    fn read_kick(&self) -> io::Result<bool> {
        self.state.read_kick()
    }
}
