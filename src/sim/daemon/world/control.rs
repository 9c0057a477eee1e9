//! The front-end and the operator: connections, vrings that start and stop, the cache mode, guest memory; orderly
//! shutdowns and upgrades of the daemon, and power cuts.
//!
//! Commands are sent to the workers as by `vhost/`, but their replies are polled instead of waited for.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use vm_memory::MmapRegion;

use super::super::life::in_daemon;
use super::super::oracle::OracleSnapshot;
use super::World;
use crate::device::control::Untracked;
use crate::device::inflight::{InflightTracker, ring_bytes};
use crate::device::{RingSetup, WorkerCommand};
use crate::fault_injection::crash_after;
use crate::units::Fault;
use crate::virtio::GuestRam;
use crate::virtio::split::QueuePosition;

/// How often a daemon attempts its last flush on a failing image.
pub(super) const LAST_FLUSHES_MAX: u32 = 4;

/// Probability, in percent, that a check of an incomplete hand-over abandons it.
const ABANDON_PERCENT: u64 = 3;

/// The step after the vrings have stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// The vring with this index starts again.
    Restart(usize),
    /// The front-end connects again, with new descriptors.
    Reconnect,
    /// The daemon shuts down, with all data on the image.
    Shutdown,
    /// The daemon shuts down and leaves its cache to the next one. If that takes long, it is abandoned.
    HandOver,
}

/// An action in progress.
#[derive(Debug)]
enum Task {
    Starting(Vec<Receiver<()>>),
    Stopping(Vec<(usize, Receiver<Option<QueuePosition>>)>, Next),
    SettingMemory(Vec<Receiver<()>>),
    /// A switch to write-through.
    Switching(Receiver<Result<(), Fault>>, OracleSnapshot),
    Resuming(Receiver<()>),
    LastFlush(Receiver<Result<(), Fault>>, OracleSnapshot, u32),
    Exiting,
    /// The workers are to end with requests in flight; the state of progress when the command was last sent.
    Abandoning([u64; 3]),
}

/// The front-end's connection.
#[derive(Debug, Default)]
pub(super) struct FrontEndConnection {
    connected: bool,
    task: Option<Task>,
    inflight: Option<Arc<MmapRegion>>,
}

impl FrontEndConnection {
    pub fn has_inflight_region(&self) -> bool {
        self.inflight.is_some()
    }

    pub fn forget_inflight_region(&mut self) {
        self.inflight = None;
    }

    pub fn disconnect(&mut self) {
        (self.connected, self.task) = (false, None);
    }

    /// Whether every vring runs and no action is in progress.
    pub fn is_serving(&self) -> bool {
        self.connected && self.task.is_none()
    }
}

/// The reply, if it has arrived. A worker that drops its end without a reply has panicked.
fn reply<T>(receiver: &Receiver<T>) -> Option<T> {
    match receiver.try_recv() {
        Ok(value) => Some(value),
        Err(TryRecvError::Empty) => None,
        Err(TryRecvError::Disconnected) => panic!("a command is dropped without a reply"),
    }
}

/// The replies, once all have arrived.
fn replies<T, K: Copy>(receivers: &mut Vec<(K, Receiver<T>)>, taken: &mut Vec<(K, T)>) -> bool {
    receivers.retain(|(key, receiver)| match reply(receiver) {
        Some(value) => {
            taken.push((*key, value));
            false
        }
        None => true,
    });
    receivers.is_empty()
}

impl World {
    /// The front-end connects to the daemon, which has just started, and starts every vring.
    pub fn connect(&mut self) {
        self.session.connected = true;
        if let Some(life) = &self.life {
            life.connect();
        }
        // With requests in flight the region stays the same.
        if self.session.inflight.is_none() && self.prng.percent(self.scenario.inflight_percent) {
            self.add_inflight_region();
        }
        self.start_rings(&(0..self.rings.len()).collect::<Vec<_>>());
    }

    /// The front-end sends an inflight region, which rings use that start from now on.
    pub fn add_inflight_region(&mut self) {
        let bytes = self.rings.len() * ring_bytes(self.scenario.queue_size);
        self.session.inflight = Some(Arc::new(MmapRegion::new(bytes).expect("memory for an inflight region")));
    }

    pub fn start_rings(&mut self, indices: &[usize]) {
        let mut receivers = Vec::new();
        for &index in indices {
            let ring = &mut self.rings[index];
            let size = self.scenario.queue_size;
            let tracker = self
                .session
                .inflight
                .as_ref()
                .map(|region| InflightTracker::new(Arc::clone(region), index * ring_bytes(size), size));
            let mut next_avail = ring.stopped_at;
            if tracker.as_ref().is_some_and(InflightTracker::is_initialized) {
                // Front-ends send different bases; the region and the used ring determine the actual one.
                next_avail = self.prng.pick(&[next_avail, ring.used_idx(), ring.avail_idx()]);
            }
            let position = QueuePosition { next_avail, next_used: ring.used_idx() };
            let (kick, call_fd) = ring.connect();
            let memory = Arc::new(GuestRam::new(Arc::clone(&self.memory)));
            let layout = ring.layout();
            let call_fd = Some(call_fd);
            let setup = RingSetup { layout, position, kick, call_fd, err_fd: None, memory, tracker };
            let life = self.life.as_ref().expect("the front-end is connected");
            let index = index as u16;
            let control = life.workers.worker_for(index);
            receivers.push(control.request(|reply| WorkerCommand::Start(index, Box::new(setup), reply)));
        }
        if self.prng.percent(10) {
            // A front-end may send its memory table before the worker has read the rings.
            receivers.extend(self.send_memory());
        }
        self.session.task = Some(Task::Starting(receivers));
    }

    /// The front-end stops a vring, and starts it again after that.
    pub fn stop_ring(&mut self, ring: usize) {
        self.stop_rings(ring..ring + 1, Next::Restart(ring));
    }

    fn stop_rings(&mut self, indices: std::ops::Range<usize>, next: Next) {
        for ring in &mut self.rings[indices.clone()] {
            ring.available_at_stop = ring.avail_idx();
        }
        let life = self.life.as_ref().expect("the front-end is connected");
        let stop = |index: usize| {
            let ring = index as u16;
            (index, life.workers.worker_for(ring).request(|reply| WorkerCommand::Stop(ring, reply)))
        };
        self.session.task = Some(Task::Stopping(indices.map(stop).collect(), next));
    }

    /// A random action of the front-end or the operator, unless one is in progress.
    pub fn start_control_action(&mut self) {
        if self.scenario.power_cuts && self.prng.percent(5) {
            crash_after(None);
            return self.cut_power();
        }
        if self.life.is_none() || !self.session.is_serving() {
            return;
        }
        let all = 0..self.rings.len();
        match self.prng.below(100) {
            0..35 if !self.is_reader => self.choose_mode(),
            0..35 => {}
            35..55 => {
                let ring = self.prng.below(self.rings.len() as u64) as usize;
                self.stop_ring(ring);
            }
            55..65 => self.set_memory(),
            65..80 => self.stop_rings(all, Next::Reconnect),
            80..85 => self.resume(),
            85..92 => self.stop_rings(all, Next::Shutdown),
            _ => {
                let life = self.life.as_ref().expect("checked above");
                life.cached.arena().keep_on_drop(true);
                self.stop_rings(all, Next::HandOver);
            }
        }
    }

    /// The guest switches to the other cache mode.
    fn choose_mode(&mut self) {
        let to_write_through = self.write_through.is_none();
        self.write_through = None;
        self.periods += 1;
        let snapshot = self.oracle.snapshot();
        let life = self.life.as_ref().expect("the front-end is connected");
        match in_daemon(|| life.workers.choose_writeback(&life.device, !to_write_through)) {
            Err(_) => self.daemon_died(),
            Ok(Some(flushed)) => self.session.task = Some(Task::Switching(flushed, snapshot)),
            Ok(None) if to_write_through => self.switched(&snapshot, Ok(())),
            Ok(None) => {}
        }
    }

    /// The device has switched to write-through mode.
    fn switched(&mut self, snapshot: &OracleSnapshot, flushed: Result<(), Fault>) {
        self.write_through = Some(self.periods);
        if flushed.is_ok() {
            self.oracle.complete_flush(snapshot);
            let left = self.image.after_power_cut();
            left.iter().enumerate().for_each(|(sector, &value)| self.oracle.check_survivor(sector, value));
        }
    }

    /// The front-end sends its memory table again.
    fn set_memory(&mut self) {
        self.session.task = Some(Task::SettingMemory(self.send_memory()));
    }

    fn send_memory(&self) -> Vec<Receiver<()>> {
        let life = self.life.as_ref().expect("the front-end is connected");
        let memory = Arc::new(GuestRam::new(Arc::clone(&self.memory)));
        let send = |worker| {
            let control = life.workers.worker_for(worker as u16);
            control.request(|reply| WorkerCommand::Memory(Arc::clone(&memory), reply))
        };
        (0..self.scenario.workers).map(send).collect()
    }

    /// The operator resumes the image.
    pub fn resume(&mut self) {
        let life = self.life.as_ref().expect("a daemon serves");
        self.session.task = Some(Task::Resuming(life.workers.worker_for(0).request(WorkerCommand::Resume)));
    }

    /// Continues the action in progress. Returns whether it advanced.
    pub fn poll_control(&mut self) -> bool {
        let Some(task) = self.session.task.take() else { return false };
        let mut taken = Vec::new();
        match task {
            Task::Starting(receivers) => self.await_all(receivers, Task::Starting),
            Task::SettingMemory(receivers) => self.await_all(receivers, Task::SettingMemory),
            Task::Resuming(receiver) => {
                if reply(&receiver).is_some() {
                    return true;
                }
                self.session.task = Some(Task::Resuming(receiver));
                false
            }
            Task::Stopping(mut receivers, next) => {
                let stopped = replies(&mut receivers, &mut taken);
                taken.iter().for_each(|&(index, position)| self.check_stopped(index, position));
                self.session.task = Some(Task::Stopping(receivers, next));
                if stopped {
                    self.rings_stopped(next);
                } else if next == Next::HandOver && self.scenario.survives && self.prng.percent(ABANDON_PERCENT) {
                    self.session.task = Some(Task::Abandoning([0; 3]));
                }
                stopped || !taken.is_empty()
            }
            Task::Switching(receiver, snapshot) => match reply(&receiver) {
                Some(flushed) => {
                    assert!(flushed.is_ok() || self.image.has_failed(), "a switch to write-through fails");
                    self.switched(&snapshot, flushed);
                    true
                }
                None => {
                    self.session.task = Some(Task::Switching(receiver, snapshot));
                    false
                }
            },
            Task::LastFlush(receiver, snapshot, tries) => match reply(&receiver) {
                Some(flushed) => {
                    self.last_flush_ended(flushed, &snapshot, tries);
                    true
                }
                None => {
                    self.session.task = Some(Task::LastFlush(receiver, snapshot, tries));
                    false
                }
            },
            Task::Exiting => self.end_daemon(),
            Task::Abandoning(last) => self.abandon_daemon(last),
        }
    }

    fn await_all(&mut self, receivers: Vec<Receiver<()>>, task: impl Fn(Vec<Receiver<()>>) -> Task) -> bool {
        let count = receivers.len();
        let waiting: Vec<_> = receivers.into_iter().filter(|receiver| reply(receiver).is_none()).collect();
        let ended = waiting.is_empty();
        if waiting.len() < count {
            // Rings drain before they get new memory.
            self.expect_long_requests_again(0..self.rings.len());
        }
        self.session.task = (!ended).then(|| task(waiting));
        ended
    }

    /// A vring has stopped, so it must have completed every request that it took.
    fn check_stopped(&mut self, index: usize, position: Option<QueuePosition>) {
        let ring = &mut self.rings[index];
        let position = position.expect("the vring was running");
        assert_eq!(position.next_avail, position.next_used, "vring {index} stops with requests in flight");
        assert_eq!(ring.used_idx(), position.next_used, "vring {index} stops with unpublished elements");
        let taken_since = position.next_avail.wrapping_sub(ring.available_at_stop);
        assert!(taken_since.cast_signed() <= 0, "vring {index} takes {taken_since} requests after it was to stop");
        ring.stopped_at = position.next_avail;
        self.expect_long_requests_again(index..index + 1);
    }

    fn rings_stopped(&mut self, next: Next) {
        self.session.task = None;
        match next {
            Next::Restart(ring) => self.start_rings(&[ring]),
            Next::Reconnect => {
                self.session.inflight = None;
                self.connect();
            }
            Next::Shutdown => self.start_last_flush(0),
            // As the service does with a cache that it cannot hand over.
            Next::HandOver if !self.scenario.survives => self.start_last_flush(0),
            Next::HandOver => self.exit(),
        }
    }

    fn start_last_flush(&mut self, tries: u32) {
        let snapshot = self.oracle.snapshot();
        let life = self.life.as_ref().expect("a daemon ends");
        let control = life.workers.worker_for(0);
        drop(control.request(WorkerCommand::Resume));
        self.session.task = Some(Task::LastFlush(control.request(WorkerCommand::Flush), snapshot, tries));
    }

    fn last_flush_ended(&mut self, flushed: Result<(), Fault>, snapshot: &OracleSnapshot, tries: u32) {
        if flushed.is_ok() {
            self.oracle.complete_flush(snapshot);
        } else if tries < LAST_FLUSHES_MAX {
            assert!(self.image.has_failed(), "the last flush fails for no reason");
            return self.start_last_flush(tries + 1);
        } else if !self.scenario.survives {
            // The daemon dies, and its unwritten data with it.
            return self.daemon_died();
        }
        self.exit();
    }

    fn exit(&mut self) {
        self.life.as_ref().expect("a daemon ends").workers.exit(Duration::ZERO);
        self.session.task = Some(Task::Exiting);
    }

    /// Ends the daemon, once its workers have ended.
    fn end_daemon(&mut self) -> bool {
        if !self.life.as_ref().expect("a daemon ends").has_ended() {
            self.session.task = Some(Task::Exiting);
            return false;
        }
        self.session.disconnect();
        self.session.inflight = None;
        let life = self.life.take().expect("seen above");
        if life.end(&self.image).is_err() {
            self.deaths += 1;
        }
        crash_after(None);
        true
    }

    /// A hand-over has taken too long. Workers end with their requests in flight if an inflight region has them for the
    /// next daemon; otherwise after completing them, so that the front-end can continue at the end of the used ring.
    fn abandon_daemon(&mut self, last: [u64; 3]) -> bool {
        let life = self.life.as_ref().expect("a daemon ends");
        if !life.has_ended() {
            let used = self.rings.iter().map(|ring| u64::from(ring.used_idx())).sum();
            let state = [self.now_us + 1, self.image.activity(), used];
            // Only once: a worker that cannot end now ends as soon as it can.
            if last == [0; 3] {
                life.workers.abandon(Untracked::Wait);
            }
            self.session.task = Some(Task::Abandoning(state));
            return state != last;
        }
        self.session.disconnect();
        let life = self.life.take().expect("seen above");
        if life.end_with_io_in_flight(&self.image).is_err() {
            self.deaths += 1;
        }
        crash_after(None);
        if self.session.has_inflight_region() {
            self.expect_repetition();
        } else {
            self.rings.iter_mut().for_each(|ring| ring.stopped_at = ring.used_idx());
            self.expect_long_requests_again(0..self.rings.len());
        }
        true
    }
}
