//! An image that fails on demand: a wrapper around any other image, for tests and for drills (how does the daemon react
//! to a slow, full or broken disk?). Not for production.
//!
//! [`Faults`] is the handle: clones share their state, and any thread may use it while the image is in use. It injects
//! faults by class of operation, and counts the operations, so that a test can assert that a FLUSH caused a Sync.
//!
//! An operation's outcome is decided when it is submitted. An operation that is to fail never reaches the wrapped
//! image. A delay passes before the operation starts (so it also reorders); a timer waits for it, not a thread.
//!
//! ```
//! # use std::{sync::Arc, time::Duration};
//! # use genblk::{store::{Backing, faulty::FaultyImage}, units::{Fault, OpClass}};
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
use vmm_sys_util::timerfd::TimerFd;

use super::wake::WakeFd;
use super::{Backing, Event, IoRequest, Limits, Refused, StoreQueue, wait_until_drained};
use crate::error::{Error, ErrorKind, Result};
use crate::tenure::token::ChangeToken;
use crate::units::{Fault, OpClass, SectorSpan};

/// The faults to inject into the operations of one class, and the class's counters.
#[derive(Clone, Debug, Default)]
struct FaultPlan {
    /// Number of operations that still succeed before one fails, and its fault.
    nth: Option<(u64, Fault)>,
    always: Option<Fault>,
    /// Failures per million operations, and their fault.
    random: Option<(u32, Fault)>,
    delay: Duration,
    /// Operations accepted, failed ones included.
    ops: u64,
    /// Bytes that those operations covered.
    bytes: u64,
    /// Operations made to fail.
    failed: u64,
}

#[derive(Debug, Default)]
struct Script {
    plans: [FaultPlan; OpClass::ALL.len()],
    random_state: u64,
}

/// Handle for the faults and counters of a [`FaultyImage`].
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<Script>>);

impl Faults {
    /// Fails one operation: the `nth` of its class from now on, 1 being the next. A later call for the same class
    /// replaces an earlier one.
    ///
    /// # Panics
    /// If `nth` is 0.
    pub fn fail_nth(&self, class: OpClass, nth: u64, fault: Fault) {
        assert!(nth > 0, "1 is the next operation");
        self.lock().plans[class as usize].nth = Some((nth - 1, fault));
    }

    /// Fails every operation of a class until [`Faults::heal`].
    pub fn fail_always(&self, class: OpClass, fault: Fault) {
        self.lock().plans[class as usize].always = Some(fault);
    }

    /// Fails operations of a class at random, `per_million` out of a million on average; `seed` restarts the random
    /// sequence, which all classes share.
    pub fn fail_randomly(&self, class: OpClass, per_million: u32, seed: u64, fault: Fault) {
        let mut script = self.lock();
        script.random_state = seed;
        script.plans[class as usize].random = Some((per_million, fault));
    }

    /// Delays every operation of a class from now on.
    pub fn delay(&self, class: OpClass, delay: Duration) {
        self.lock().plans[class as usize].delay = delay;
    }

    /// Removes every fault and delay; the counters stay. Operations already delayed keep their delay and outcome.
    pub fn heal(&self) {
        for plan in &mut self.lock().plans {
            *plan = FaultPlan { ops: plan.ops, bytes: plan.bytes, failed: plan.failed, ..FaultPlan::default() };
        }
    }

    /// Operations of a class that were accepted, failed ones included.
    pub fn ops(&self, class: OpClass) -> u64 {
        self.lock().plans[class as usize].ops
    }

    /// Bytes that those operations covered.
    pub fn bytes(&self, class: OpClass) -> u64 {
        self.lock().plans[class as usize].bytes
    }

    /// Operations of a class that were made to fail.
    pub fn failed(&self, class: OpClass) -> u64 {
        self.lock().plans[class as usize].failed
    }

    fn lock(&self) -> MutexGuard<'_, Script> {
        self.0.lock().expect("no thread panics while it holds the faults")
    }

    /// Counts an operation and decides its outcome: its delay, and its fault, if any.
    fn decide(&self, request: &IoRequest) -> (Duration, Option<Fault>) {
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

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014). Any seed is good.
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The error number that an injected fault reports.
fn errno_for(fault: Fault) -> i32 {
    match fault {
        Fault::NoSpace => libc::ENOSPC,
        Fault::Media => libc::EIO,
        Fault::Fenced => libc::EBADE,
        Fault::Gone => libc::ENODEV,
        Fault::TimedOut => libc::ETIMEDOUT,
        Fault::Unsupported => libc::EOPNOTSUPP,
        Fault::Invalid => libc::EINVAL,
        Fault::Lost => libc::ESTALE,
    }
}

/// An image whose operations can be made to fail or to be delayed.
#[derive(Debug)]
pub struct FaultyImage {
    inner: Arc<dyn Backing>,
    faults: Faults,
}

impl FaultyImage {
    /// Wraps `inner`; as long as no fault is set, the image behaves like `inner`.
    pub fn new(inner: Arc<dyn Backing>) -> (Arc<Self>, Faults) {
        let faults = Faults::default();
        (Arc::new(Self { inner, faults: faults.clone() }), faults)
    }

    fn wrap(&self, inner: Box<dyn StoreQueue>) -> io::Result<FaultyQueue> {
        let (poll, timer, wake) = (Epoll::new()?, TimerFd::new()?, WakeFd::new()?);
        for fd in [inner.wake_fd(), timer.as_raw_fd(), wake.as_raw_fd()] {
            poll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        let faults = self.faults.clone();
        Ok(FaultyQueue { poll, timer, wake, faults, delayed: Vec::new(), failed: Vec::new(), inner })
    }
}

impl Backing for FaultyImage {
    fn limits(&self) -> &Limits {
        self.inner.limits()
    }

    fn shows_format(&self, span: SectorSpan) -> bool {
        self.inner.shows_format(span)
    }

    fn inspect_guest_write(&self, first: u64, bytes: &[u8]) -> u64 {
        self.inner.inspect_guest_write(first, bytes)
    }

    fn recorded_formats(&self) -> u64 {
        self.inner.recorded_formats()
    }

    fn idle_token_may_wait(&self) -> bool {
        self.inner.idle_token_may_wait()
    }

    fn attach(&self) -> Result<Box<dyn StoreQueue>> {
        let queue = self
            .wrap(self.inner.attach()?)
            .map_err(|error| Error::io(ErrorKind::System, "cannot create descriptors for a faulty image", error))?;
        Ok(Box::new(queue))
    }

    fn change_token(&self) -> Option<ChangeToken> {
        self.inner.change_token()
    }

    fn idle_token(&self) -> Option<ChangeToken> {
        self.inner.idle_token()
    }

    fn end_tenure(&self) -> io::Result<bool> {
        self.inner.end_tenure()
    }

    fn lose_cache(&self) -> io::Result<bool> {
        self.inner.lose_cache()
    }
}

/// An operation that has not started because of its delay.
#[derive(Debug)]
struct Delayed {
    due: Instant,
    request: IoRequest,
    fault: Option<Fault>,
}

/// One worker's queue; wraps a queue of the inner image.
struct FaultyQueue {
    /// The wake fd, an epoll descriptor: readable while the timer, `wake` or the inner queue's wake fd is.
    poll: Epoll,
    /// Expires when the first delayed operation is due.
    timer: TimerFd,
    /// Readable while events of failed operations are waiting.
    wake: WakeFd,
    faults: Faults,
    delayed: Vec<Delayed>,
    /// Events of operations that were made to fail.
    failed: Vec<Event>,
    inner: Box<dyn StoreQueue>,
}

impl FaultyQueue {
    /// Submits an operation to the inner queue, or fails it.
    fn release(&mut self, request: IoRequest, fault: Option<Fault>) {
        let tag = request.tag;
        let event = match fault {
            Some(fault) => Event::Failed { tag, fault, errno: errno_for(fault) },
            None => match self.inner.submit(request) {
                Ok(()) => return,
                // A bug of the inner queue: this queue accepts no more operations than the inner one. The operation
                // still needs an event.
                Err(_) => Event::Failed { tag, fault: Fault::Invalid, errno: 0 },
            },
        };
        self.failed.push(event);
        self.wake.notify();
    }

    /// Releases the operations that are due, and sets the timer for the others.
    fn release_due(&mut self) {
        if self.delayed.is_empty() {
            return;
        }
        let now = Instant::now();
        let (due, rest) = mem::take(&mut self.delayed).into_iter().partition(|op: &Delayed| op.due <= now);
        self.delayed = rest;
        for Delayed { request, fault, .. } in due {
            self.release(request, fault);
        }
        self.inner.kick();
        self.set_timer(now);
    }

    fn set_timer(&mut self, now: Instant) {
        let result = match self.delayed.iter().map(|op| op.due).min() {
            // A timer set to 0 would be disarmed.
            Some(due) => self.timer.reset(due.saturating_duration_since(now).max(Duration::from_nanos(1)), None),
            None => self.timer.clear(),
        };
        result.expect("timerfd_settime accepts any duration");
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

    fn limit_memory(&mut self, end: usize) {
        self.inner.limit_memory(end);
    }

    fn submit(&mut self, request: IoRequest) -> std::result::Result<(), Refused> {
        if !self.limits().admissible(&request) {
            return Err(Refused::Invalid(request));
        }
        if self.in_flight() >= usize::from(self.limits().depth) {
            return Err(Refused::Full(request));
        }
        let (delay, fault) = self.faults.decide(&request);
        if delay.is_zero() {
            self.release(request, fault);
        } else {
            let now = Instant::now();
            self.delayed.push(Delayed { due: now + delay, request, fault });
            self.set_timer(now);
        }
        Ok(())
    }

    fn kick(&mut self) {
        self.inner.kick();
    }

    fn reap(&mut self, events: &mut Vec<Event>) {
        self.release_due();
        self.wake.clear();
        events.append(&mut self.failed);
        self.inner.reap(events);
    }

    fn in_flight(&self) -> usize {
        self.delayed.len() + self.failed.len() + self.inner.in_flight()
    }

    fn drain(&mut self, timeout: Duration) -> bool {
        wait_until_drained(self, timeout) && self.inner.drain(Duration::ZERO)
    }
}

impl Drop for FaultyQueue {
    /// Releases the delayed operations; the inner queue completes them when it is dropped.
    fn drop(&mut self) {
        for Delayed { request, fault, .. } in mem::take(&mut self.delayed) {
            self.release(request, fault);
        }
        self.inner.kick();
    }
}

impl fmt::Debug for FaultyQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyQueue").field("delayed", &self.delayed).finish_non_exhaustive()
    }
}
