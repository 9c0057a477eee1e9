//! The worker thread. It serves vrings of a device in turns. A turn ([`Worker::turn`]) moves every request as far as it
//! can, in these steps:
//!
//! 1. **Collect.** Execute the control plane's commands. Reap store operations, and notices from other workers.
//! 2. **Take.** Take new chains from the available rings, parse them and check them. A request that needs no cache (GET
//!    ID, an invalid request) continues with step 6.
//! 3. **Admit**, with the cache locked. Complete the reaped store operations in the cache; each may make pieces of
//!    waiting requests ready. Admit requests: those that the cache has resumed, then the new ones. Data in memory is
//!    ready immediately, as *pieces* of pinned frames. The rest (a miss, a FLUSH, a write at the dirty limit) waits for
//!    this step of a later turn. Submit the store operations that requests wait for before any byte is copied.
//! 4. **Copy**, without the lock. Copy ready pieces between frames and guest memory. With its last piece a read is
//!    finished.
//! 5. **Return writes**, with the cache locked, if any were copied. With its last piece a write is finished; in
//!    write-through mode it continues as a FLUSH.
//! 6. **Complete**, without the lock. Write status bytes and used elements of finished requests; some writes are
//!    delayed while the cache fills. Publish each used ring once, and interrupt its driver at most once.
//! 7. **End the turn**, with the cache locked. Return the pieces of reads, which have completed before. Pump the cache:
//!    write-back, syncs, eviction, continued readahead, stalled requests. Submit all store operations, deliver notices
//!    to other workers, and reply to commands that waited for rings to drain.
//!
//! A cached read passes steps 2 to 6 in one turn; a missed one waits in step 3. The lock is taken two or three times a
//! turn, however many requests it serves.
//!
//! A turn that finds nothing stops after step 2. The worker then polls: it repeats turns for up to `poll_us`. If they
//! find nothing either, it enables the rings' notifications, checks the rings again, and sleeps in epoll. The thread
//! lives as long as the device, so write-back continues while no front-end is connected.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use log::error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::cached_image::{CachedImage, WorkerPort};
use crate::counters::worker::{Activity, WorkerCounters};
use crate::error::{Error, ErrorKind, Result};
use crate::fault_injection::{PlantedBug, planted};
use crate::sandbox::{self, ThreadKind};
use crate::sys::guarded;
use crate::units::Tick;
use crate::virtio::GuestRam;
use crate::virtio::split::QueuePosition;

use super::control::{HeldRequests, Untracked, WorkerCommand, WorkerControl};
use super::requests::Requests;
use super::ring::Ring;
use super::{Device, RingSetup};

/// With more pending requests than this, the worker sleeps instead of polling. The next event is near anyway, and
/// handling events in batches costs a third less.
const PENDING_MAX_TO_POLL: usize = 7;
/// After this many consecutive polls that found nothing, the worker polls only once in [`IDLE_TIMES_PER_POLL`].
const FRUITLESS_POLLS_MAX: u32 = 4;
const IDLE_TIMES_PER_POLL: u32 = 64;
/// Slots of the page table that one turn scans when the operator drops clean pages: about 100 us.
const DROPPED_SLOTS: u32 = 4096;
/// The same, when pages in memory are listed: as many as fit in a message between processes.
const SHOWN_SLOTS: u32 = 1024;
/// Epoll tokens. A ring's token is its index, which is below 256.
const WAKER: u64 = 1000;
const STORE: u64 = 1001;

/// Starts the worker thread number `index` of a device.
///
/// # Errors
/// [`ErrorKind::System`] if a descriptor, the store's queue or the thread cannot be created.
pub fn spawn(device: &Arc<Device>, image: &Arc<CachedImage>, index: u16) -> Result<(WorkerControl, JoinHandle<()>)> {
    guarded::start_watchdog(|| sandbox::confine(ThreadKind::Watchdog));
    let (worker, control) = Worker::new(device, image, index)?;
    let name = format!("genblk {}", device.name);
    let thread = std::thread::Builder::new().name(name).spawn(move || worker.run_confined()).map_err(system)?;
    Ok((control, thread))
}

fn system(error: io::Error) -> Error {
    Error::io(ErrorKind::System, "cannot start a worker thread", error)
}

fn watch(epoll: &Epoll, fd: RawFd, token: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))
}

/// A worker without its thread; see the documentation of the module.
#[derive(Debug)]
pub struct Worker {
    device: Arc<Device>,
    port: WorkerPort,
    counters: WorkerCounters,
    commands: Receiver<WorkerCommand>,
    epoll: Epoll,
    /// The running rings by index. As short as possible, because each turn checks every element.
    rings: Vec<Option<Ring>>,
    /// The ring from which the next turn takes first.
    first_ring: usize,
    /// Rings that drain before they stop, and the receivers of their last positions.
    stopping: Vec<(u16, Sender<Option<QueuePosition>>)>,
    /// Ends of the disk, in sectors: whoever sent one waits until no request beyond it is in progress.
    shrinking: Vec<(u64, Sender<()>)>,
    /// Guest memory to use as soon as every ring has completed the requests that it took.
    new_memory: Option<(Arc<GuestRam>, Sender<()>)>,
    requests: Requests,
    /// When the first request that a limit holds back on its ring is due; `None` also while no request can be taken.
    held_until: Option<Tick>,
    /// When the cache must be pumped next, even if nothing else happens.
    deadline: Option<Tick>,
    /// Consecutive polls that found nothing.
    fruitless_polls: u32,
    /// How many times the worker ran out of work.
    idle_times: u32,
    /// The worker is to end as by a crash, as soon as it may.
    abandoned: Option<Untracked>,
    exiting: bool,
}

impl Worker {
    /// Worker number `index`, before its first turn, and the control plane's end of the commands to it.
    ///
    /// # Errors
    /// [`ErrorKind::System`] if a descriptor or the store's queue cannot be created.
    pub fn new(device: &Arc<Device>, image: &Arc<CachedImage>, index: u16) -> Result<(Self, WorkerControl)> {
        let counters = device.counters.of_worker(index.into());
        let port = image.port(&device.name, counters.clone())?;
        let (control, commands) = WorkerControl::new(&device.name, Arc::clone(port.waker()));
        let epoll = Epoll::new().map_err(system)?;
        watch(&epoll, port.waker().as_raw_fd(), WAKER).map_err(system)?;
        watch(&epoll, port.store_fd(), STORE).map_err(system)?;
        let worker = Self {
            requests: Requests::new(Arc::clone(device), port.ticket(0), counters.clone()),
            device: Arc::clone(device),
            port,
            counters,
            commands,
            epoll,
            rings: Vec::new(),
            first_ring: 0,
            stopping: Vec::new(),
            shrinking: Vec::new(),
            new_memory: None,
            held_until: None,
            // The first turn pumps the cache: restored pages may be due for write-back.
            deadline: Some(Tick::ZERO),
            fruitless_polls: 0,
            idle_times: 0,
            abandoned: None,
            exiting: false,
        };
        Ok((worker, control))
    }

    fn run_confined(self) {
        let is_remote = self.port.image().is_remote();
        sandbox::confine(if is_remote { ThreadKind::RemoteWorker } else { ThreadKind::Worker });
        self.run();
    }

    fn run(mut self) {
        while !self.is_exiting() {
            let now = self.port.image().now();
            if self.turn(now) || self.poll(now) {
                continue;
            }
            if self.requests.tally.is_open() {
                self.settle_tally();
            }
            self.requests.tally.count_turns();
            if !self.enable_notifications() {
                self.counters.count(Activity::Sleeps, 1);
                self.sleep(self.timeout_ms());
            }
            self.disable_notifications();
        }
    }

    /// Enables the drivers' kicks. Returns whether heads became available meanwhile, for which they may not have
    /// kicked.
    pub fn enable_notifications(&mut self) -> bool {
        let mut more_available = false;
        for index in 0..self.rings.len() {
            more_available |= self.ring_to_serve(index).is_some_and(Ring::enable_notification);
        }
        // If no request can be taken, a completion must come first, and the turn that handles it checks the rings.
        more_available && self.requests.can_take()
    }

    /// Disables the drivers' kicks: the worker is awake.
    pub fn disable_notifications(&mut self) {
        self.rings.iter_mut().flatten().for_each(Ring::disable_notification);
    }

    /// Repeats turns for up to `poll_us`: usually the next request arrives soon. Returns whether one found work.
    fn poll(&mut self, mut now: Tick) -> bool {
        let no_rings = self.rings.iter().all(Option::is_none);
        let poll_us = self.device.poll_us();
        if poll_us == 0
            || no_rings
            || self.requests.pending.in_use() > PENDING_MAX_TO_POLL
            || !self.is_poll_worthwhile()
        {
            return false;
        }
        self.counters.count(Activity::Polls, 1);
        let until = now.plus_us(u64::from(poll_us));
        while now < until {
            if self.turn(now) {
                self.counters.count(Activity::FruitfulPolls, 1);
                self.fruitless_polls = 0;
                return true;
            }
            std::hint::spin_loop();
            now = self.port.image().now();
        }
        self.fruitless_polls = self.fruitless_polls.saturating_add(1);
        false
    }

    /// Whether to poll this time. Polls that keep finding nothing become rare: the guest has little to do, or is
    /// waiting for the processor that this thread polls on.
    fn is_poll_worthwhile(&mut self) -> bool {
        let worthwhile =
            self.fruitless_polls < FRUITLESS_POLLS_MAX || self.idle_times.is_multiple_of(IDLE_TIMES_PER_POLL);
        self.idle_times = self.idle_times.wrapping_add(1);
        worthwhile
    }

    /// When the next turn is due, even if nothing else happens.
    pub fn next_due(&self) -> Option<Tick> {
        [self.deadline, self.requests.next_delayed(), self.held_until].into_iter().flatten().min()
    }

    /// The time until the next turn is due, as epoll_wait(2) takes it: in milliseconds, -1 forever.
    fn timeout_ms(&self) -> i32 {
        self.next_due().map_or(-1, |due| {
            let us = due.since_us(self.port.image().now());
            i32::try_from(us.div_ceil(1000)).unwrap_or(i32::MAX)
        })
    }

    /// Sleeps until a kick, a store event, or a notification of the waker, at most for `timeout_ms` (-1: without a
    /// limit). Returns whether one of them occurred.
    pub fn sleep(&mut self, timeout_ms: i32) -> bool {
        let mut events = [EpollEvent::default(); 16];
        let count = match self.epoll.wait(timeout_ms, &mut events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(e) => unreachable!("epoll_wait on a valid descriptor fails only with EINTR: {e}"),
        };
        for event in &events[..count] {
            match event.data() {
                WAKER => self.port.waker().clear(),
                STORE => self.port.set_store_ready(),
                // A kick. The next turn checks every ring.
                0 => {
                    if let Some(Some(ring)) = self.rings.first_mut() {
                        ring.check_first_kick();
                    }
                }
                _ => {}
            }
        }
        count > 0
    }

    /// Whether the control plane has ended the worker: it takes no more turns.
    pub fn is_exiting(&self) -> bool {
        self.exiting
    }

    /// Takes one turn, in the steps that the module lists. Returns whether there was anything to do.
    pub fn turn(&mut self, now: Tick) -> bool {
        self.requests.tally.begin_turn(now);
        // 1. Collect.
        let notified = self.port.waker().take_notified();
        let handled = notified && self.handle_commands(now);
        if self.exiting {
            return true;
        }
        let reaped = self.port.reap(notified);
        // 2. Take.
        let left = self.requests.has_work();
        let taken = self.take_requests(now);
        if !(handled || reaped || taken || left) && self.next_due().is_none_or(|due| due > now) {
            return false;
        }
        // 3. Admit.
        let Self { port, requests, rings, .. } = self;
        requests.is_shared = port.is_shared();
        port.with_cache(now, |cache, notices| {
            for notice in notices.drain(..) {
                requests.handle_notice(cache, notice);
            }
            requests.admit_all(cache);
        });
        // 4. Copy.
        requests.copy_all(port, rings);
        // 5. Return writes.
        if !requests.written.is_empty() {
            port.with_cache(now, |cache, _| requests.return_writes(cache));
        }
        // 6. Complete.
        requests.complete_all(rings, now);
        let is_clock_due = reaped || handled || requests.tally.has_waited();
        #[cfg(test)]
        requests.copy_postponed(port, rings);
        if is_clock_due {
            self.settle_tally();
        }
        // 7. End the turn.
        let Self { port, requests, rings, .. } = self;
        let (stopping, new_memory) = (&self.stopping, self.new_memory.is_some());
        self.deadline = port.end_turn(now, |cache| {
            requests.return_reads(cache);
            if new_memory || !stopping.is_empty() {
                let drains = |index| new_memory || stopping.iter().any(|&(stopping, _)| stopping == index);
                requests.cut_short(cache, rings, drains);
                let is_waited_for =
                    |index: usize, ring: &Ring| u16::try_from(index).is_ok_and(drains) && !ring.is_drained();
                if rings
                    .iter()
                    .enumerate()
                    .any(|(index, ring)| ring.as_ref().is_some_and(|ring| is_waited_for(index, ring)))
                {
                    // A guest that reboots or disconnects must not wait for the end of a freeze. The thaw that follows
                    // reports that the freeze was lost.
                    cache.thaw();
                }
            }
        });
        self.reply_if_drained();
        self.requests.tally.found_work();
        true
    }

    /// Counts the completed requests, with the present time.
    fn settle_tally(&mut self) {
        let now = self.port.image().now();
        self.requests.tally.count_requests(now);
    }

    /// Takes requests from the rings, as far as the limits allow. Returns whether one had any.
    fn take_requests(&mut self, now: Tick) -> bool {
        self.held_until = None;
        if !self.requests.can_take() {
            return false;
        }
        let limits = self.device.limiter.generation();
        if limits | self.requests.limits == 0 {
            return self.take_within_budget();
        }
        self.requests.limits = limits;
        self.rings.iter_mut().flatten().for_each(|ring| _ = ring.hold(limits, now));
        let taken = self.take_within_budget();
        let mut first_held = None;
        for (index, ring) in self.rings.iter_mut().enumerate() {
            if let Some(due) = ring.as_mut().and_then(|ring| ring.hold(limits, now)) {
                first_held.get_or_insert(index);
                self.held_until = Some(self.held_until.map_or(due, |until| until.min(due)));
            }
        }
        if let Some(index) = first_held {
            // When the limits allow it, the ring that is served first may take the tokens that were saved up meanwhile.
            self.first_ring = index + 1;
        }
        taken
    }

    /// Takes requests from the rings that have some, round robin, until the turn's budget is spent. Returns whether one
    /// had any.
    fn take_within_budget(&mut self) -> bool {
        let mut budget = self.device.budget.turn_pages;
        let (mut taken, count) = (false, self.rings.len());
        if count > 1 {
            let loaded = self.rings.iter().flatten().filter(|ring| ring.has_load()).count();
            let share = self.device.budget.ring_share(loaded);
            self.rings.iter_mut().flatten().for_each(|ring| ring.set_load_max(share));
        }
        for index in (self.first_ring.min(count)..count).chain(0..self.first_ring.min(count)) {
            if self.ring_to_serve(index).is_some_and(|ring| ring.has_more()) {
                let ring = self.rings[index].as_mut().expect("it was found a line above");
                let number = u16::try_from(index).expect("256 rings at most");
                taken |= self.requests.take_from(number, ring, &mut budget);
                if budget == 0 {
                    self.first_ring = index + 1;
                    break;
                }
            }
        }
        taken
    }

    /// The ring at `index`, if it may take requests. One that drains takes only the previous daemon's requests.
    fn ring_to_serve(&mut self, index: usize) -> Option<&mut Ring> {
        let draining =
            self.new_memory.is_some() || self.stopping.iter().any(|(stopping, _)| usize::from(*stopping) == index);
        self.rings[index].as_mut().filter(|ring| ring.has_resubmissions() || !draining)
    }

    /// Executes the control plane's commands. Returns whether there were any.
    fn handle_commands(&mut self, now: Tick) -> bool {
        let mut handled = false;
        while let Ok(command) = self.commands.try_recv() {
            handled = true;
            match command {
                WorkerCommand::Start(index, setup, reply) => {
                    self.start(index, *setup);
                    let _ = reply.send(());
                }
                WorkerCommand::Stop(index, reply) => self.stopping.push((index, reply)),
                WorkerCommand::SetCallFd(index, call_fd, reply) => {
                    if let Some(Some(ring)) = self.rings.get_mut(usize::from(index)) {
                        ring.set_call_fd(call_fd);
                    }
                    let _ = reply.send(());
                }
                WorkerCommand::SetErrFd(index, err_fd, reply) => {
                    if let Some(Some(ring)) = self.rings.get_mut(usize::from(index)) {
                        ring.set_err_fd(err_fd);
                    }
                    let _ = reply.send(());
                }
                WorkerCommand::Memory(memory, reply) => self.new_memory = Some((memory, reply)),
                WorkerCommand::Flush(reply) => {
                    let ticket = self.requests.start_control_flush(reply);
                    self.port.with_cache(now, |cache, _| cache.flush(ticket));
                }
                WorkerCommand::Resume(reply) => {
                    self.port.with_cache(now, |cache, _| cache.resume());
                    let _ = reply.send(());
                }
                WorkerCommand::Reconfigure(settings, reply) => {
                    self.port.with_cache(now, |cache, _| cache.reconfigure(&settings));
                    let _ = reply.send(());
                }
                WorkerCommand::DropClean(from, reply) => {
                    let dropped = self.port.with_cache(now, |cache, _| cache.drop_clean(from, DROPPED_SLOTS));
                    let _ = reply.send(dropped);
                }
                WorkerCommand::Warm(pages, reply) => {
                    let _ = reply.send(self.port.with_cache(now, |cache, _| cache.warm(pages)));
                }
                WorkerCommand::Resident(from, reply) => {
                    let _ = reply.send(self.port.with_cache(now, |cache, _| cache.resident(from, SHOWN_SLOTS)));
                }
                WorkerCommand::DrainBeyond(end, reply) => self.shrinking.push((end, reply)),
                WorkerCommand::Freeze(time, held, reply) => {
                    let ticket = self.requests.start_control_flush(reply);
                    let until = now.plus_us(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
                    let holds_reads = held == HeldRequests::All;
                    self.port.with_cache(now, |cache, _| cache.freeze(ticket, until, holds_reads));
                }
                WorkerCommand::Thaw(reply) => {
                    let _ = reply.send(self.port.with_cache(now, |cache, _| cache.thaw()));
                }
                WorkerCommand::Exit(timeout) => {
                    self.port.close(timeout);
                    self.exiting = true;
                }
                WorkerCommand::Abandon(untracked) => self.abandoned = Some(untracked),
            }
        }
        self.end_if_abandoned();
        handled
    }

    /// Ends the worker if it is to end as by a crash, and may.
    ///
    /// => While any worker still has to complete a request, none ends: the request may need operations that another
    ///    worker has submitted to the store. The last untracked ring that stops wakes all workers.
    fn end_if_abandoned(&mut self) {
        let Some(untracked) = self.abandoned.filter(|_| !self.exiting) else { return };
        let all_tracked = self.port.image().untracked_rings.load(Ordering::Acquire) == 0;
        if untracked == Untracked::Lose || all_tracked || planted(PlantedBug::AbandonLosesUntracked) {
            self.port.close(Duration::ZERO);
            self.exiting = true;
        }
    }

    fn start(&mut self, index: u16, setup: RingSetup) {
        let mut ring = Ring::new(&self.device.name, index, setup);
        ring.set_load_max(self.device.budget.ring_pages);
        if let Err(e) = ring.watch_kicks(&self.epoll, u64::from(index)) {
            // The ring is now served only while the worker is awake for another reason, so the log must explain why it
            // is slow.
            error!("{}: vring {index}: cannot watch its kick descriptor ({e}): requests may hang", self.device.name);
        }
        let index = usize::from(index);
        if self.rings.len() <= index {
            self.rings.resize_with(index + 1, || None);
        }
        let untracked = u32::from(!ring.is_tracked());
        let untracked_rings = &self.port.image().untracked_rings;
        untracked_rings.fetch_add(untracked, Ordering::AcqRel);
        if let Some(replaced) = self.rings[index].replace(ring) {
            untracked_rings.fetch_sub(u32::from(!replaced.is_tracked()), Ordering::AcqRel);
        }
    }

    /// Replies to the commands that waited until rings had completed the requests that they took, if they have.
    fn reply_if_drained(&mut self) {
        let requests = &self.requests;
        self.shrinking.retain(|(end, reply)| {
            let has_rest = requests.reach_beyond(*end);
            if !has_rest {
                // It fails if the requester has stopped waiting.
                let _ = reply.send(());
            }
            has_rest
        });
        let (rings, epoll, image) = (&mut self.rings, &self.epoll, self.port.image());
        let limiter = &self.device.limiter;
        self.stopping.retain(|(index, reply)| {
            let Some(ring) = rings.get_mut(usize::from(*index)).and_then(Option::as_mut) else {
                let _ = reply.send(None);
                return false;
            };
            if !ring.is_drained() {
                return true;
            }
            ring.return_suspended();
            if let Some(held) = ring.held.take() {
                limiter.refund(held.price);
            }
            let position = ring.position();
            ring.unwatch_kicks(epoll);
            if !ring.is_tracked() && image.untracked_rings.fetch_sub(1, Ordering::AcqRel) == 1 {
                image.wake_workers();
            }
            rings[usize::from(*index)] = None;
            let _ = reply.send(Some(position));
            false
        });
        if self.new_memory.is_some()
            && self.rings.iter().flatten().all(Ring::is_drained)
            && let Some((memory, reply)) = self.new_memory.take()
        {
            for ring in self.rings.iter_mut().flatten() {
                ring.set_memory(&memory);
            }
            let _ = reply.send(());
        }
    }
}
