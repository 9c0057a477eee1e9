//! A disk with a volatile write cache. It is as unhelpful as a disk may be:
//!
//! => A read returns a write's bytes as soon as the write arrives. Operations complete later, and in any order.
//! => A sync makes stable only those writes that had completed when it arrived.
//! => When a sync or a write fails, the disk resets: all unsynced writes are lost, those in flight too, and reads
//!    return the old bytes at once. A sync in flight fails too; no other operation reports the loss.
//! => A power cut keeps an arbitrary set of sectors of the unsynced writes: it tears and reorders them.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::mem;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use crate::common::SECTOR_BYTES;
use crate::common::prng::Prng;

/// Classes of operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpClass {
    Read,
    /// Writes and zeroings.
    Write,
    Sync,
    /// The end of the use of a descriptor (close(2)).
    Close,
}

/// How much a power cut loses of the unsynced writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    All,
    /// It keeps this percentage of their sectors, at random.
    AllBut(u64),
}

/// Completes an operation: with success, or with an error number.
pub type Completion = Box<dyn FnOnce(Result<(), i32>) + Send>;

/// A write that no sync has made stable.
#[derive(Debug)]
struct Unsynced {
    id: u64,
    start: usize,
    bytes: Vec<u8>,
    is_complete: bool,
}

impl Unsynced {
    fn range(&self) -> Range<usize> {
        self.start..self.start + self.bytes.len()
    }
}

/// An operation in flight.
struct InFlight {
    id: u64,
    class: OpClass,
    /// When to complete it.
    due: Instant,
    /// Whether a test holds it beyond that.
    is_held: bool,
    /// The error number that it is bound to fail with.
    error: Option<i32>,
    /// The writes that it makes stable; empty except for a sync.
    covers: Vec<u64>,
    completion: Completion,
}

struct DiskState {
    /// When the last write arrived.
    changed_at: SystemTime,
    /// The bytes that survive a power cut.
    platter: Vec<u8>,
    /// The bytes that a read returns: the platter's, with the unsynced writes.
    contents: Vec<u8>,
    /// In the order of arrival.
    unsynced: Vec<Unsynced>,
    in_flight: Vec<InFlight>,
    held: HashSet<OpClass>,
    is_powered: bool,
    has_stopped: bool,
    /// The longest delay.
    delay_max: Duration,
    /// The percentage of operations that fail, by class.
    failing: HashMap<OpClass, u64>,
    next_id: u64,
    /// Failed operations.
    resets: u64,
    prng: Prng,
}

impl DiskState {
    /// Loses the unsynced writes.
    fn reset(&mut self) {
        for lost in mem::take(&mut self.unsynced) {
            let range = lost.range();
            self.contents[range.clone()].copy_from_slice(&self.platter[range]);
        }
        for sync in self.in_flight.iter_mut().filter(|op| op.class == OpClass::Sync) {
            sync.error = Some(libc::EIO);
        }
        self.resets += 1;
    }

    /// Makes the given writes stable.
    fn sync(&mut self, covered: &[u64]) {
        let (covered, rest) = mem::take(&mut self.unsynced).into_iter().partition(|write| covered.contains(&write.id));
        self.unsynced = rest;
        for write in covered {
            self.platter[write.range()].copy_from_slice(&write.bytes);
        }
    }

    /// Takes an operation. Returns its id.
    fn arrive(&mut self, class: OpClass, completion: Completion) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let delay_us = self.prng.below(1 + self.delay_max.as_micros() as u64);
        let covers = self.unsynced.iter().filter(|write| write.is_complete && class == OpClass::Sync);
        self.in_flight.push(InFlight {
            id,
            class,
            due: Instant::now() + Duration::from_micros(delay_us),
            is_held: self.held.contains(&class),
            error: (!self.is_powered).then_some(libc::EIO),
            covers: covers.map(|write| write.id).collect(),
            completion,
        });
        id
    }

    /// Carries out a sync, marks a write as complete, or fails. Returns the operation's result.
    fn finish(&mut self, op: &InFlight) -> Result<(), i32> {
        if let Some(error) = op.error {
            return Err(error);
        }
        let failing = self.failing.get(&op.class).copied().unwrap_or(0);
        if self.prng.percent(failing) {
            self.reset();
            return Err(libc::EIO);
        }
        if op.class == OpClass::Sync {
            self.sync(&op.covers);
        }
        if let Some(write) = self.unsynced.iter_mut().find(|write| write.id == op.id) {
            write.is_complete = true;
        }
        Ok(())
    }

    /// Removes an operation that is due, or says when the next one is.
    fn next(&mut self) -> Result<InFlight, Option<Instant>> {
        let ready = self.in_flight.iter().enumerate().filter(|(_, op)| !op.is_held);
        match ready.min_by_key(|(_, op)| op.due).map(|(at, op)| (at, op.due)) {
            Some((at, due)) if due <= Instant::now() => Ok(self.in_flight.remove(at)),
            next => Err(next.map(|(_, due)| due)),
        }
    }
}

/// The disk. A thread of its own completes the operations.
pub struct Disk {
    state: Arc<(Mutex<DiskState>, Condvar)>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Disk {
    /// A disk with these bytes on its platter.
    pub fn new(bytes: Vec<u8>, seed: u64) -> Self {
        let state = DiskState {
            changed_at: SystemTime::now(),
            platter: bytes.clone(),
            contents: bytes,
            unsynced: Vec::new(),
            in_flight: Vec::new(),
            held: HashSet::new(),
            is_powered: true,
            has_stopped: false,
            delay_max: Duration::ZERO,
            failing: HashMap::new(),
            next_id: 0,
            resets: 0,
            prng: Prng::new(seed),
        };
        let state = Arc::new((Mutex::new(state), Condvar::new()));
        let served = Arc::clone(&state);
        let thread = thread::Builder::new().name("disk".to_owned()).spawn(move || serve(&served));
        Self { state, thread: Mutex::new(Some(thread.expect("a thread can be started"))) }
    }

    fn lock(&self) -> MutexGuard<'_, DiskState> {
        self.state.0.lock().expect("no thread panics with the disk locked")
    }

    /// Changes the state and wakes the disk's thread.
    fn change<T>(&self, change: impl FnOnce(&mut DiskState) -> T) -> T {
        let result = change(&mut self.lock());
        self.state.1.notify_all();
        result
    }

    // Operations.

    /// When the last write arrived.
    pub fn changed_at(&self) -> SystemTime {
        self.lock().changed_at
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.lock().contents.len()
    }

    /// Reads the range, up to the end of the disk.
    pub fn read(&self, range: Range<usize>, completion: impl FnOnce(Result<Vec<u8>, i32>) + Send + 'static) {
        self.change(|state| {
            let end = range.end.min(state.contents.len());
            let bytes = state.contents[range.start.min(end)..end].to_vec();
            state.arrive(OpClass::Read, Box::new(move |result| completion(result.map(|()| bytes))));
        });
    }

    /// Writes `bytes` at `start`, within the disk.
    pub fn write(&self, start: usize, bytes: Vec<u8>, completion: Completion) {
        self.change(|state| state.changed_at = SystemTime::now());
        self.change(|state| {
            let id = state.arrive(OpClass::Write, completion);
            if state.is_powered {
                let write = Unsynced { id, start, bytes, is_complete: false };
                state.contents[write.range()].copy_from_slice(&write.bytes);
                state.unsynced.push(write);
            }
        });
    }

    /// Makes the completed writes stable.
    pub fn sync(&self, completion: Completion) {
        self.change(|state| state.arrive(OpClass::Sync, completion));
    }

    /// Closes a descriptor: at once, unless a test holds that.
    pub fn close(&self, completion: Completion) {
        if self.lock().held.contains(&OpClass::Close) {
            self.change(|state| state.arrive(OpClass::Close, completion));
        } else {
            completion(Ok(()));
        }
    }

    /// The first byte from `start` that is in an aligned block of zeros (`zero`) or in one of data.
    pub fn seek(&self, start: usize, block: usize, zero: bool) -> Option<usize> {
        let state = self.lock();
        let mut blocks = state.contents.chunks(block).enumerate().skip(start / block);
        let found = blocks.find(|(_, bytes)| bytes.iter().all(|&byte| byte == 0) == zero);
        found.map(|(at, _)| start.max(at * block))
    }

    // For tests.

    /// Lets each operation take a random time up to `delay_max`.
    pub fn delay(&self, delay_max: Duration) {
        self.change(|state| state.delay_max = delay_max);
    }

    /// Fails this percentage of the operations of a class. Each failure resets the disk.
    pub fn fail(&self, class: OpClass, percent: u64) {
        self.change(|state| state.failing.insert(class, percent));
    }

    /// Number of completed writes that no sync has made stable.
    pub fn unsynced(&self) -> usize {
        self.lock().unsynced.iter().filter(|write| write.is_complete).count()
    }

    /// How often the disk has been reset.
    pub fn resets(&self) -> u64 {
        self.lock().resets
    }

    /// Holds the operations of a class that arrive from now on: they do not complete.
    pub fn hold(&self, class: OpClass) {
        self.change(|state| state.held.insert(class));
    }

    /// Number of operations of a class that are held.
    pub fn held(&self, class: OpClass) -> usize {
        self.lock().in_flight.iter().filter(|op| op.is_held && op.class == class).count()
    }

    /// Completes the oldest held operation of a class.
    pub fn release_oldest(&self, class: OpClass) {
        self.change(|state| {
            let oldest = state.in_flight.iter_mut().find(|op| op.is_held && op.class == class);
            oldest.expect("an operation is held").is_held = false;
        });
    }

    /// Completes the held operations of a class and holds no more.
    pub fn release(&self, class: OpClass) {
        self.change(|state| {
            state.held.remove(&class);
            state.in_flight.iter_mut().filter(|op| op.class == class).for_each(|op| op.is_held = false);
        });
    }

    /// Cuts the power: all operations fail, those in flight too, until [`Disk::restore_power`].
    pub fn cut_power(&self, loss: Loss) {
        self.change(|state| {
            for write in mem::take(&mut state.unsynced) {
                let Loss::AllBut(percent) = loss else { continue };
                let targets = state.platter[write.range()].chunks_mut(SECTOR_BYTES);
                for (target, sector) in targets.zip(write.bytes.chunks(SECTOR_BYTES)) {
                    if state.prng.percent(percent) {
                        target.copy_from_slice(sector);
                    }
                }
            }
            state.contents.copy_from_slice(&state.platter);
            state.is_powered = false;
            state.held.clear();
            for op in &mut state.in_flight {
                (op.is_held, op.error) = (false, Some(libc::EIO));
            }
        });
    }

    /// Lets operations succeed again.
    pub fn restore_power(&self) {
        self.change(|state| state.is_powered = true);
    }

    /// The bytes of a range that would survive a power cut.
    pub fn platter(&self, range: Range<usize>) -> Vec<u8> {
        self.lock().platter[range].to_vec()
    }
}

/// Completes operations until the disk is dropped.
fn serve((state, changed): &(Mutex<DiskState>, Condvar)) {
    let mut guard = state.lock().expect("no thread panics with the disk locked");
    loop {
        match guard.next() {
            Ok(op) => {
                let result = guard.finish(&op);
                drop(guard);
                (op.completion)(result);
                guard = state.lock().expect("no thread panics with the disk locked");
            }
            Err(None) if guard.has_stopped => return,
            Err(due) => {
                let wait = due.map_or(Duration::MAX, |due| due.saturating_duration_since(Instant::now()));
                let waited = changed.wait_timeout(guard, wait.min(Duration::from_secs(1)));
                guard = waited.expect("no thread panics with the disk locked").0;
            }
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.cut_power(Loss::All);
        self.change(|state| state.has_stopped = true);
        if let Some(thread) = self.thread.get_mut().expect("no thread panics with the handle locked").take() {
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").finish_non_exhaustive()
    }
}
