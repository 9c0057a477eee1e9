//! The thread that runs a device's rings. One round of [`Worker::turn`] is the life of every request:
//!
//! 1. obey the control plane; collect what the store has finished and what the cache has to say
//! 2. take new requests from the rings
//! 3. under the cache's lock: hand in the store's events, admit the requests; send off what they wait for
//! 4. without it: copy the bytes of what is ready
//! 5. under it again: give back what was written, if anything was
//! 6. answer what is finished, and call the guest once for each ring
//! 7. under the lock: give back what was read; let the cache see to itself (write-back, readahead, eviction); send off what
//!    comes of it
//!
//! The thread lives as long as the device, so write-back goes on while no front-end is there. It looks for more work for
//! up to `poll_us` after the last, then asks the guest for kicks, looks again, and sleeps in epoll.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::thread::JoinHandle;

use log::error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::cached_image::{CachedImage, WorkerPort};
use crate::error::{Error, ErrorKind, Result};
use crate::units::Tick;
use crate::virtio::GuestRam;
use crate::virtio::split::QueuePosition;

use super::control::{Command, Control};
use super::requests::Requests;
use super::ring::Ring;
use super::{Device, RingSetup};

/// With more requests than this on their way to the store, or held back, nothing is polled: the next event is near anyway,
/// and events that come together are handled together, at two thirds of the cost.
const POLL_PENDING_MAX: usize = 7;
/// After so many polls in a row that found nothing ...
const FRUITLESS_MAX: u32 = 4;
/// ... one is tried when there was nothing to do for so many times.
const SLEEPS_PER_TRY: u32 = 64;
/// Epoll tokens beyond those of the rings.
const WAKER: u64 = 1000;
const STORE: u64 = 1001;

/// Starts a worker thread for a device.
///
/// # Errors
/// [`ErrorKind::System`] when the host refuses a descriptor, a ring or the thread.
pub fn spawn(device: &Arc<Device>, image: &Arc<CachedImage>) -> Result<(Control, JoinHandle<()>)> {
    let system = |e| Error::io(ErrorKind::System, "cannot start a worker thread", e);
    let port = image.port()?;
    let (control, commands) = Control::new(Arc::clone(port.waker()));
    let epoll = Epoll::new().map_err(system)?;
    watch(&epoll, port.waker().as_raw_fd(), WAKER).map_err(system)?;
    watch(&epoll, port.store_fd(), STORE).map_err(system)?;
    let worker = Worker {
        requests: Requests::new(Arc::clone(device), port.ticket(0)),
        device: Arc::clone(device),
        port,
        commands,
        epoll,
        rings: Vec::new(),
        stopping: Vec::new(),
        new_memory: None,
        // What a predecessor has left has its own.
        deadline: Some(Tick(0)),
        fruitless: 0,
        sleeps: 0,
        exits: false,
    };
    let name = format!("genblk {}", device.name);
    let thread = std::thread::Builder::new().name(name).spawn(move || worker.run()).map_err(system)?;
    Ok((control, thread))
}

fn watch(epoll: &Epoll, fd: RawFd, token: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))
}

#[derive(Debug)]
struct Worker {
    device: Arc<Device>,
    port: WorkerPort,
    commands: Receiver<Command>,
    epoll: Epoll,
    /// The rings that run, by number; no longer than it must be, for a turn looks at each place.
    rings: Vec<Option<Ring>>,
    /// Rings that take no more requests, and who waits for their last answer.
    stopping: Vec<(u16, Sender<Option<QueuePosition>>)>,
    /// Guest memory that comes into use when every ring has answered what it took.
    new_memory: Option<(Arc<GuestRam>, Sender<()>)>,
    requests: Requests,
    /// When the cache wants to be pumped although nothing happens.
    deadline: Option<Tick>,
    /// Polls in a row that found nothing.
    fruitless: u32,
    /// Times that there was nothing to do.
    sleeps: u32,
    exits: bool,
}

impl Worker {
    fn run(mut self) {
        while !self.exits {
            let now = self.port.image().now();
            if self.turn(now) || self.poll(now) {
                continue;
            }
            let mut came_meanwhile = false;
            for index in 0..self.rings.len() {
                came_meanwhile |= self.served(index).is_some_and(Ring::enable_notification);
            }
            if !came_meanwhile {
                self.sleep();
            }
            for ring in self.rings.iter_mut().flatten() {
                ring.disable_notification();
            }
        }
    }

    /// Looks for more work for a while: most often the next request is not far. True: there was some.
    fn poll(&mut self, mut now: Tick) -> bool {
        let idle_rings = self.rings.iter().all(Option::is_none);
        if self.device.poll_us == 0
            || idle_rings
            || self.requests.pending.in_use() > POLL_PENDING_MAX
            || !self.poll_pays()
        {
            return false;
        }
        let until = now.plus_us(u64::from(self.device.poll_us));
        while now < until {
            if self.turn(now) {
                self.fruitless = 0;
                return true;
            }
            std::hint::spin_loop();
            now = self.port.image().now();
        }
        self.fruitless = self.fruitless.saturating_add(1);
        false
    }

    /// Whether to poll now. After a few polls that found nothing only one in many is tried: the guest has little to do, or
    /// waits for the very processor that we poll on.
    fn poll_pays(&mut self) -> bool {
        let pays = self.fruitless < FRUITLESS_MAX || self.sleeps.is_multiple_of(SLEEPS_PER_TRY);
        self.sleeps = self.sleeps.wrapping_add(1);
        pays
    }

    /// Sleeps until a kick, a store event, the waker, or the next deadline.
    fn sleep(&mut self) {
        let next = [self.deadline, self.requests.next_completion()].into_iter().flatten().min();
        let timeout_ms = next.map_or(-1, |due| {
            let us = due.since_us(self.port.image().now());
            i32::try_from(us.div_ceil(1000)).unwrap_or(i32::MAX)
        });
        let mut events = [EpollEvent::default(); 16];
        let count = match self.epoll.wait(timeout_ms, &mut events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(e) => unreachable!("epoll on our own descriptors: {e}"),
        };
        for event in &events[..count] {
            match event.data() {
                WAKER => self.port.waker().clear(),
                STORE => self.port.set_store_ready(),
                // A kick: the next turn looks at all rings.
                _ => {}
            }
        }
    }

    /// One turn; see the module. False: there was nothing to do.
    fn turn(&mut self, now: Tick) -> bool {
        let notified = self.port.waker().take_notified();
        let handled = notified && self.handle_commands(now);
        let collected = self.port.reap(notified);
        let taken = self.take_requests();
        let due = [self.deadline, self.requests.next_completion()].into_iter().flatten().min();
        if !(handled || collected || taken) && due.is_none_or(|due| due > now) {
            return false;
        }
        let Self { port, requests, rings, .. } = self;
        port.with_cache(now, |cache, notices| {
            for notice in notices.drain(..) {
                requests.handle_notice(cache, notice);
            }
            requests.admit_all(cache);
        });
        requests.copy_all(port, rings);
        if !requests.written.is_empty() {
            port.with_cache(now, |cache, _| requests.give_back_written(cache));
        }
        requests.complete_all(rings, now);
        self.deadline = port.end_turn(now, |cache| requests.give_back_read(cache));
        self.settle_control();
        true
    }

    fn take_requests(&mut self) -> bool {
        let mut taken = false;
        for index in 0..self.rings.len() {
            if self.served(index).is_some_and(|ring| ring.has_more()) {
                let ring = self.rings[index].as_mut().expect("looked at just now");
                taken |= self.requests.take_from(u16::try_from(index).expect("64 rings at most"), ring);
            }
        }
        taken
    }

    /// The ring at `index`, if requests are taken from it: from one that drains, only what a predecessor has left there.
    fn served(&mut self, index: usize) -> Option<&mut Ring> {
        let drains =
            self.new_memory.is_some() || self.stopping.iter().any(|(stopping, _)| usize::from(*stopping) == index);
        self.rings[index].as_mut().filter(|ring| ring.has_resubmissions() || !drains)
    }

    /// Does what the control plane asks.
    fn handle_commands(&mut self, now: Tick) -> bool {
        let mut handled = false;
        while let Ok(command) = self.commands.try_recv() {
            handled = true;
            match command {
                Command::Start(index, setup, answer) => {
                    self.start(index, *setup);
                    let _ = answer.send(());
                }
                Command::Stop(index, answer) => self.stopping.push((index, answer)),
                Command::SetCallFd(index, call_fd, answer) => {
                    if let Some(Some(ring)) = self.rings.get_mut(usize::from(index)) {
                        ring.set_call_fd(call_fd);
                    }
                    let _ = answer.send(());
                }
                Command::Memory(memory, answer) => self.new_memory = Some((memory, answer)),
                Command::Flush(answer) => {
                    let ticket = self.requests.drain_ticket(answer);
                    self.port.with_cache(now, |cache, _| cache.flush(ticket));
                }
                Command::Resume(answer) => {
                    self.port.with_cache(now, |cache, _| cache.resume());
                    let _ = answer.send(());
                }
                Command::Exit => self.exits = true,
            }
        }
        handled
    }

    fn start(&mut self, index: u16, setup: RingSetup) {
        let ring = Ring::new(index, setup);
        if let Err(e) = ring.watch_kicks(&self.epoll, u64::from(index)) {
            // Without kicks the guest would hang in silence; with a log line at least somebody knows why.
            error!("{}: ring {index} has a kick descriptor that can't be watched: {e}", self.device.name);
        }
        let index = usize::from(index);
        if self.rings.len() <= index {
            self.rings.resize_with(index + 1, || None);
        }
        self.rings[index] = Some(ring);
    }

    /// Ends what the control plane waits for, as far as the rings have answered what they took.
    fn settle_control(&mut self) {
        let (rings, epoll) = (&mut self.rings, &self.epoll);
        self.stopping.retain(|(index, answer)| {
            let Some(ring) = rings.get(usize::from(*index)).and_then(Option::as_ref) else {
                let _ = answer.send(None);
                return false;
            };
            if !ring.is_drained() {
                return true;
            }
            let position = ring.position();
            ring.forget_kicks(epoll);
            rings[usize::from(*index)] = None;
            let _ = answer.send(Some(position));
            false
        });
        if self.new_memory.is_some()
            && self.rings.iter().flatten().all(Ring::is_drained)
            && let Some((memory, answer)) = self.new_memory.take()
        {
            for ring in self.rings.iter_mut().flatten() {
                ring.use_memory(&memory);
            }
            let _ = answer.send(());
        }
    }
}
