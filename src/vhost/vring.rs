//! A ring as the control plane sees it: the crate's state of it, and the rule when a worker runs it.
//!
//! A ring runs while it is ready (it has a kick descriptor), enabled, and of a legal size. Each change of that is a
//! command to its worker, and is over when the call returns: a ring that was stopped has answered all it took.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLockReadGuard, RwLockWriteGuard};

use log::{error, info};
use vhost_user_backend::{VringRwLock, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueT};
use vm_memory::GuestAddressSpace;

use super::Memory;
use super::inflight::Inflight;
use crate::device::control::Workers;
use crate::device::inflight::InflightTracker;
use crate::device::{Command, Device, RingSetup};
use crate::virtio::GuestRam;
use crate::virtio::split::{QueueLayout, QueuePosition};

thread_local! {
    /// The workers of the device whose rings are being made, and the rings made so far: the crate makes them in order,
    /// on the thread that makes the daemon, and tells them neither their number nor whose they are.
    static VRING_FACTORY: RefCell<Option<VringFactory>> = const { RefCell::new(None) };
}

struct VringFactory {
    session: Arc<Session>,
    rings: Vec<VringControl>,
}

/// What the rings of a session share.
pub(super) struct Session {
    pub device: Arc<Device>,
    pub workers: Arc<Workers>,
    pub inflight: Inflight,
    /// The guest has guest_started, or what it has chosen is known: nobody is to be surprised any more.
    pub guest_started: AtomicBool,
    /// A bit for each ring that goes on where it was, in the middle of a guest's life.
    resumed: AtomicU64,
}

impl Session {
    /// A session of a front-end that has said nothing yet.
    pub fn new(device: &Arc<Device>, workers: &Arc<Workers>) -> Arc<Self> {
        let (device, workers) = (Arc::clone(device), Arc::clone(workers));
        Arc::new(Self {
            device,
            workers,
            inflight: Inflight::default(),
            guest_started: AtomicBool::new(false),
            resumed: AtomicU64::new(0),
        })
    }

    /// Ring `index` will start at `base`; or it is taken down, which leaves it at none.
    fn set_base(&self, index: u16, base: u16) {
        let bit = 1 << index;
        if base == 0 {
            self.resumed.fetch_and(!bit, Ordering::AcqRel);
        } else {
            self.resumed.fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// Ring `index` starts. If all rings begin at the beginning, so does the guest: it has nothing to lose.
    fn on_ring_start(&self, index: u16, setup: &RingSetup) {
        self.guest_started.store(true, Ordering::Release);
        // Indices wrap: a ring may be at 0 in the middle of a guest's life. The region tells, where there is one.
        if setup.track.as_ref().is_some_and(InflightTracker::is_kept) {
            self.resumed.fetch_or(1 << index, Ordering::AcqRel);
        }
        let arena = &self.device.arena;
        if arena.has_data_loss() && self.resumed.load(Ordering::Acquire) == 0 {
            info!("{}: the guest begins anew, and is served again", self.device.name);
            arena.clear_data_loss();
        }
    }
}

/// Runs `make`, in which the crate makes the rings of a session; returns the rings too.
pub(super) fn with_vring_factory<T>(session: &Arc<Session>, make: impl FnOnce() -> T) -> (T, Vec<VringControl>) {
    VRING_FACTORY.set(Some(VringFactory { session: Arc::clone(session), rings: Vec::new() }));
    let made = make();
    let VringFactory { rings, .. } = VRING_FACTORY.take().expect("put there above");
    (made, rings)
}

/// See the module.
#[derive(Clone)]
pub(super) struct VringControl {
    state: VringRwLock<Memory>,
    shared: Arc<Shared>,
}

struct Shared {
    index: u16,
    session: Arc<Session>,
    memory: Memory,
    config: Mutex<VringConfig>,
}

/// What decides whether the ring runs.
#[derive(Default)]
struct VringConfig {
    ready: bool,
    enabled: bool,
    /// The front-end asked for a size that is no power of two, which the crate would ignore.
    invalid_size: bool,
    running: bool,
    kick: Option<File>,
    call_fd: Option<File>,
}

impl VringControl {
    fn config(&self) -> MutexGuard<'_, VringConfig> {
        self.shared.config.lock().expect("nobody panics holding this")
    }

    /// Changes the config; starts or stops the ring as they then demand.
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

    /// Changes something that a running ring does not look at again: stops it for the time.
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
        let copy = |file: &Option<File>| file.as_ref().map(File::try_clone).transpose();
        let (kick, call_fd) = match (copy(&config.kick), copy(&config.call_fd)) {
            (Ok(Some(kick)), Ok(call_fd)) => (kick, call_fd),
            (Err(e), _) | (_, Err(e)) => {
                error!("ring {} can't be started: {e}", self.shared.index);
                return false;
            }
            (Ok(None), _) => return false,
        };
        let index = self.shared.index;
        let state = self.state.get_ref();
        let queue = state.get_queue();
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
            memory: Arc::new(GuestRam::new(self.shared.memory.memory().into_inner())),
            track: self.shared.session.inflight.of_ring(index, queue.size()),
        };
        self.shared.session.on_ring_start(index, &setup);
        let worker = self.shared.session.workers.of_ring(index);
        worker.ask(|answer| Command::Start(index, Box::new(setup), answer)).is_some()
    }

    /// A copy of a kick or call descriptor. Without one the ring does not run, or does not call; the log says why.
    fn copy_of(&self, file: Option<&File>) -> Option<File> {
        let copy = file?.try_clone();
        copy.inspect_err(|e| error!("ring {} lacks a descriptor: {e}", self.shared.index)).ok()
    }

    /// Stops the ring; where it stands goes into the crate's state, which GET_VRING_BASE reads.
    fn stop(&self) {
        let index = self.shared.index;
        let stopped = self.shared.session.workers.of_ring(index).ask(|answer| Command::Stop(index, answer));
        if let Some(Some(position)) = stopped {
            self.state.set_queue_next_avail(position.next_avail);
            self.state.set_queue_next_used(position.next_used);
        }
    }

    /// The front-end is gone: nothing runs any more.
    pub fn close(&self) {
        self.change(|config| config.ready = false);
    }
}

/// Kicks and calls must be eventfds: a write to a full pipe would block a worker.
fn eventfd_or_none(file: Option<File>) -> Option<File> {
    let file = file?;
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    let is_eventfd = std::fs::read_link(link).is_ok_and(|target| target.as_os_str() == "anon_inode:[eventfd]");
    if !is_eventfd {
        error!("the front-end sent a descriptor for kicks or calls that is no eventfd");
    }
    is_eventfd.then_some(file)
}

impl<'a> VringStateGuard<'a, Memory> for VringControl {
    type G = RwLockReadGuard<'a, VringState<Memory>>;
}

impl<'a> VringStateMutGuard<'a, Memory> for VringControl {
    type G = RwLockWriteGuard<'a, VringState<Memory>>;
}

impl VringT<Memory> for VringControl {
    fn new(memory: Memory, max_queue_size: u16) -> Result<Self, QueueError> {
        let state = VringRwLock::new(memory.clone(), max_queue_size)?;
        VRING_FACTORY.with_borrow_mut(|slot| {
            let VringFactory { session, rings } = slot.as_mut().expect("inside with_vring_factory()");
            let index = u16::try_from(rings.len()).expect("64 rings at most");
            let shared = Shared { index, session: Arc::clone(session), memory, config: Mutex::default() };
            let ring = Self { state, shared: Arc::new(shared) };
            rings.push(ring.clone());
            Ok(ring)
        })
    }

    fn get_ref(&self) -> RwLockReadGuard<'_, VringState<Memory>> {
        self.state.get_ref()
    }

    fn get_mut(&self) -> RwLockWriteGuard<'_, VringState<Memory>> {
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
        let file = eventfd_or_none(file);
        // The crate makes a ring ready when it has a kick descriptor.
        let copy = self.copy_of(file.as_ref());
        self.change_stopped(|config| config.kick = file);
        self.state.set_kick(copy);
    }

    fn set_call(&self, file: Option<File>) {
        let file = eventfd_or_none(file);
        let mut config = self.config();
        if config.running {
            let index = self.shared.index;
            let copy = self.copy_of(file.as_ref());
            self.shared.session.workers.of_ring(index).ask(|answer| Command::SetCallFd(index, copy, answer));
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
                error!("ring {}: a size of {size} is no power of two: it is not served", self.shared.index);
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

    /// => The crate has read `index` in guest memory, after it has said where that is: a ring that runs has gone on since.
    ///    What counts is what is there when it stands still.
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
        self.state.set_err(file);
    }

    // What follows is for the crate's own worker threads, of which there are none.

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
