//! An image that fails on demand: a wrapper around any other, for tests and for drills (what does the daemon do when
//! the disk is slow, full, broken?). Not for production.
//!
//! [`Faults`] is the handle: clones share their state, and it may be used from any thread while the image is in use.
//! It injects by kind of operation, and counts what reached the store, so that a test can assert that a FLUSH did.
//!
//! An operation's fate is decided when it is submitted. One that is to fail never reaches the wrapped store. A delay
//! passes before the operation starts (so it also reorders), and is waited for by a timer, not by a thread.
//!
//! ```
//! # use std::{sync::Arc, time::Duration};
//! # use genblk::{store::{Backing, faulty::{FaultyImage, OpClass}}, units::Fault};
//! # fn drill(disk: Arc<dyn Backing>) {
//! let (image, faults) = FaultyImage::new(disk);
//! faults.fail_nth(OpClass::Write, 3, Fault::NoSpace);
//! faults.delay(OpClass::Sync, Duration::from_millis(50));
//! // ... use image ...
//! assert_eq!(faults.ops(OpClass::Sync), 0);
//! faults.heal();
//! # }
//! ```

use std::fmt;
use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::{Backing, Event, IoRequest, Limits, Refused, StoreQueue, pool};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{Fault, OpKind};

/// [`OpKind`] without its details: what faults and counters go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpClass {
    /// [`OpKind::Read`]
    Read,
    /// [`OpKind::Write`]
    Write,
    /// [`OpKind::Sync`]
    Sync,
    /// [`OpKind::Zero`], with or without unmap.
    Zero,
    /// [`OpKind::Discard`]
    Discard,
    /// [`OpKind::Allocate`]
    Allocate,
    /// [`OpKind::Map`]
    Map,
}

impl OpClass {
    /// Every kind.
    pub const ALL: [Self; 7] =
        [Self::Read, Self::Write, Self::Sync, Self::Zero, Self::Discard, Self::Allocate, Self::Map];
}

impl From<OpKind> for OpClass {
    fn from(op: OpKind) -> Self {
        match op {
            OpKind::Read => Self::Read,
            OpKind::Write => Self::Write,
            OpKind::Sync => Self::Sync,
            OpKind::Zero { .. } => Self::Zero,
            OpKind::Discard => Self::Discard,
            OpKind::Allocate => Self::Allocate,
            OpKind::Map => Self::Map,
        }
    }
}

/// What happens to the operations of one kind, and what has.
#[derive(Clone, Debug, Default)]
struct FaultPlan {
    /// Operations that still pass before one fails, and how it fails.
    nth: Option<(u64, Fault)>,
    always: Option<Fault>,
    /// Failures in a million operations, and how they fail.
    random: Option<(u32, Fault)>,
    delay: Duration,
    ops: u64,
    bytes: u64,
    failed: u64,
}

#[derive(Debug, Default)]
struct Script {
    plans: [FaultPlan; OpClass::ALL.len()],
    random_state: u64,
}

/// The handle on a [`FaultyImage`]'s faults and counters.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<Script>>);

impl Faults {
    /// Fails one operation: the `nth` of its kind from now on, 1 being the next. One such plan a kind; the last
    /// counts.
    ///
    /// # Panics
    /// If `nth` is 0.
    pub fn fail_nth(&self, kind: OpClass, nth: u64, fault: Fault) {
        assert!(nth > 0, "1 is the next operation");
        self.lock().plans[kind as usize].nth = Some((nth - 1, fault));
    }

    /// Fails every operation of a kind until [`Faults::heal`].
    pub fn fail_always(&self, kind: OpClass, fault: Fault) {
        self.lock().plans[kind as usize].always = Some(fault);
    }

    /// Fails `per_million` of a million operations of a kind, at random; `seed` restarts the random sequence, which
    /// all kinds share.
    pub fn fail_randomly(&self, kind: OpClass, per_million: u32, seed: u64, fault: Fault) {
        let mut script = self.lock();
        script.random_state = seed;
        script.plans[kind as usize].random = Some((per_million, fault));
    }

    /// Delays every operation of a kind from now on.
    pub fn delay(&self, kind: OpClass, delay: Duration) {
        self.lock().plans[kind as usize].delay = delay;
    }

    /// Ends every fault and delay; the counters stay. Operations that wait already keep their fate.
    pub fn heal(&self) {
        for plan in &mut self.lock().plans {
            *plan = FaultPlan { ops: plan.ops, bytes: plan.bytes, failed: plan.failed, ..FaultPlan::default() };
        }
    }

    /// Operations of a kind that were accepted, failed ones included.
    pub fn ops(&self, kind: OpClass) -> u64 {
        self.lock().plans[kind as usize].ops
    }

    /// Bytes that those operations covered.
    pub fn bytes(&self, kind: OpClass) -> u64 {
        self.lock().plans[kind as usize].bytes
    }

    /// Operations of a kind that were made to fail.
    pub fn failed(&self, kind: OpClass) -> u64 {
        self.lock().plans[kind as usize].failed
    }

    fn lock(&self) -> MutexGuard<'_, Script> {
        self.0.lock().expect("no thread panics while it holds the faults")
    }

    /// Counts an operation and decides its fate: its delay, and the fault it meets, if any.
    fn judge(&self, request: &IoRequest) -> (Duration, Option<Fault>) {
        let mut guard = self.lock();
        let script = &mut *guard;
        let plan = &mut script.plans[OpClass::from(request.op) as usize];
        plan.ops += 1;
        plan.bytes += request.len;
        let nth = match plan.nth {
            Some((0, fault)) => {
                plan.nth = None;
                Some(fault)
            }
            Some((left, fault)) => {
                plan.nth = Some((left - 1, fault));
                None
            }
            None => None,
        };
        let random = plan
            .random
            .filter(|&(per_million, _)| next_random(&mut script.random_state) % 1_000_000 < u64::from(per_million))
            .map(|(_, fault)| fault);
        let fault = nth.or(plan.always).or(random);
        plan.failed += u64::from(fault.is_some());
        (plan.delay, fault)
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): any seed will do.
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The error number that goes with an injected fault.
fn errno_for(fault: Fault) -> i32 {
    match fault {
        Fault::NoSpace => libc::ENOSPC,
        Fault::Media => libc::EIO,
        Fault::Fenced => libc::EBADE,
        Fault::Gone => libc::ENODEV,
        Fault::TimedOut => libc::ETIMEDOUT,
        Fault::Unsupported => libc::EOPNOTSUPP,
        Fault::Invalid => libc::EINVAL,
    }
}

/// An image whose operations can be made to fail or to wait.
#[derive(Debug)]
pub struct FaultyImage {
    inner: Arc<dyn Backing>,
    faults: Faults,
}

impl FaultyImage {
    /// Wraps `inner`; without faults set, the image behaves as `inner` does.
    pub fn new(inner: Arc<dyn Backing>) -> (Arc<Self>, Faults) {
        let faults = Faults::default();
        (Arc::new(Self { inner, faults: faults.clone() }), faults)
    }

    fn build(&self, inner: Box<dyn StoreQueue>) -> io::Result<FaultyQueue> {
        let (poll, timer, wake) = (Epoll::new()?, TimerFd::new()?, pool::new_wake()?);
        for fd in [inner.wake_fd(), timer.as_raw_fd(), wake.as_raw_fd()] {
            poll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        let faults = self.faults.clone();
        Ok(FaultyQueue { poll, timer, wake, faults, waiting: Vec::new(), failed: Vec::new(), inner })
    }
}

impl Backing for FaultyImage {
    fn limits(&self) -> &Limits {
        self.inner.limits()
    }

    fn attach(&self) -> Result<Box<dyn StoreQueue>> {
        let store = self
            .build(self.inner.attach()?)
            .map_err(|error| Error::io(ErrorKind::System, "no descriptors for a faulty store", error))?;
        Ok(Box::new(store))
    }
}

/// An operation that waits for its delay to pass.
#[derive(Debug)]
struct Waiting {
    due: Instant,
    request: IoRequest,
    fault: Option<Fault>,
}

struct FaultyQueue {
    /// The wake fd: readable while any of the other three is.
    poll: Epoll,
    timer: TimerFd,
    wake: Arc<EventFd>,
    faults: Faults,
    waiting: Vec<Waiting>,
    /// Events of operations that were made to fail.
    failed: Vec<Event>,
    inner: Box<dyn StoreQueue>,
}

impl FaultyQueue {
    /// Passes an operation on, or fails it.
    fn release(&mut self, request: IoRequest, fault: Option<Fault>) {
        let tag = request.tag;
        let event = match fault {
            Some(fault) => Event::Failed { tag, fault, errno: errno_for(fault) },
            None => match self.inner.submit(request) {
                Ok(()) => return,
                // We accept no more than the wrapped store does, so this is its mistake; an event must come all the
                // same.
                Err(_) => Event::Failed { tag, fault: Fault::Invalid, errno: 0 },
            },
        };
        self.failed.push(event);
        pool::notify(&self.wake);
    }

    /// Releases what is due, and sets the timer for the rest.
    fn release_due(&mut self) {
        if self.waiting.is_empty() {
            return;
        }
        let now = Instant::now();
        let (due, rest) = mem::take(&mut self.waiting).into_iter().partition(|w: &Waiting| w.due <= now);
        self.waiting = rest;
        for Waiting { request, fault, .. } in due {
            self.release(request, fault);
        }
        self.inner.kick();
        self.set_timer(now);
    }

    fn set_timer(&mut self, now: Instant) {
        let result = match self.waiting.iter().map(|w| w.due).min() {
            // A timer of 0 would never fire.
            Some(due) => self.timer.reset(due.saturating_duration_since(now).max(Duration::from_nanos(1)), None),
            None => self.timer.clear(),
        };
        result.expect("a timer of our own takes any time");
    }
}

impl StoreQueue for FaultyQueue {
    fn limits(&self) -> &Limits {
        self.inner.limits()
    }

    fn wake_fd(&self) -> RawFd {
        self.poll.as_raw_fd()
    }

    fn hint_memory(&mut self, memory: Range<usize>) {
        self.inner.hint_memory(memory);
    }

    fn submit(&mut self, request: IoRequest) -> std::result::Result<(), Refused> {
        if !self.limits().admissible(&request) {
            return Err(Refused::Invalid(request));
        }
        if self.in_flight() >= usize::from(self.limits().depth) {
            return Err(Refused::Full(request));
        }
        let (delay, fault) = self.faults.judge(&request);
        if delay.is_zero() {
            self.release(request, fault);
        } else {
            let now = Instant::now();
            self.waiting.push(Waiting { due: now + delay, request, fault });
            self.set_timer(now);
        }
        Ok(())
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn reap(&mut self, events: &mut Vec<Event>) {
        self.release_due();
        pool::clear(&self.wake);
        events.append(&mut self.failed);
        self.inner.reap(events);
    }

    fn in_flight(&self) -> usize {
        self.waiting.len() + self.failed.len() + self.inner.in_flight()
    }
}

impl Drop for FaultyQueue {
    /// Passes on what still waits; the wrapped store finishes it when it is dropped.
    fn drop(&mut self) {
        for Waiting { request, fault, .. } in mem::take(&mut self.waiting) {
            self.release(request, fault);
        }
        self.inner.kick();
    }
}

impl fmt::Debug for FaultyQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyQueue").field("waiting", &self.waiting).finish_non_exhaustive()
    }
}
