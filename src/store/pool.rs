//! Threads that run blocking operations and notify a wake fd. They are the whole thread engine, and the io_uring
//! engine's helper for operations that a ring cannot do.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::image::OpenImage;
use super::pool_queue::PoolQueue;
use super::wake::WakeFd;
use super::{DRAIN_MAX, Event, IoRequest, blocking};
use crate::sandbox::{self, ThreadKind};
use crate::units::counted;

/// The numbers of a pool's threads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Threads {
    /// Most threads that run operations which change the image; they run reads as well.
    pub(super) for_changes: usize,
    /// Further threads, for reads and maps only: no read waits for a slow write or a long zero.
    pub(super) for_reads: usize,
}

/// Threads over one image.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<PoolShared>,
    /// How long dropping the pool waits for its operations.
    drain_max: Duration,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct PoolShared {
    image: Arc<OpenImage>,
    wake: WakeFd,
    state: Mutex<PoolState>,
    /// Operations are queued, or the pool closes.
    work: Condvar,
    /// A thread has found the queue empty.
    idle: Condvar,
}

#[derive(Debug)]
struct PoolState {
    queue: PoolQueue,
    /// Events not yet taken.
    events: Vec<Event>,
    /// Operations that threads run now.
    running: usize,
    /// Threads that are waiting for work.
    idle: usize,
    closing: bool,
}

impl Pool {
    /// Starts threads for at most `depth` operations at a time, which notify `wake`.
    pub(super) fn new(image: Arc<OpenImage>, wake: WakeFd, threads: Threads, depth: usize) -> io::Result<Self> {
        let state = PoolState {
            queue: PoolQueue::new(threads.for_changes),
            events: Vec::with_capacity(depth),
            running: 0,
            idle: 0,
            closing: false,
        };
        let threads = threads.for_changes + threads.for_reads;
        let shared = PoolShared { image, wake, state: Mutex::new(state), work: Condvar::new(), idle: Condvar::new() };
        let mut pool = Self { shared: Arc::new(shared), drain_max: DRAIN_MAX, threads: Vec::with_capacity(threads) };
        for number in 0..threads {
            let shared = Arc::clone(&pool.shared);
            // On failure the pool is dropped, which stops the threads already started.
            let thread = thread::Builder::new().name(format!("store-{number}")).spawn(move || shared.run())?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Makes dropping the pool leave the operations that threads run, instead of waiting for them.
    pub(super) fn abandon_on_drop(&mut self) {
        self.drain_max = Duration::ZERO;
    }

    /// Queues an operation. A busy thread may take it immediately, a sleeping one after [`Pool::wake_threads`].
    pub(super) fn push(&self, request: IoRequest) {
        self.shared.lock().queue.push(request);
    }

    /// Wakes threads for the queued operations.
    pub(super) fn wake_threads(&self) {
        let queued = self.shared.lock().queue.len();
        for _ in 0..queued.min(self.threads.len()) {
            self.shared.work.notify_one();
        }
    }

    /// Moves the events of completed operations to `events`; returns their number.
    pub(super) fn take_events(&self, events: &mut Vec<Event>) -> usize {
        let mut state = self.shared.lock();
        let count = state.events.len();
        events.append(&mut state.events);
        count
    }
}

impl PoolShared {
    fn lock(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().expect("no thread panics while it holds a pool's state")
    }

    /// Body of a thread: runs operations until the pool closes and the queue is empty.
    fn run(&self) {
        sandbox::confine(ThreadKind::Store);
        let mut state = self.lock();
        loop {
            if let Some((lane, mut request)) = state.queue.pop() {
                state.running += 1;
                if state.idle > 0 && state.queue.is_ready() {
                    // This thread may have taken a different operation than the one for which an idle thread was woken.
                    self.work.notify_one();
                }
                drop(state);
                let event = blocking::execute(&self.image, &mut request);
                state = self.lock();
                state.running -= 1;
                state.queue.completed(lane);
                state.events.push(event);
                // Notified under the lock: a worker that takes the event either clears this notification with it, or
                // has cleared the wake fd just before, and finds it readable again without an event.
                self.wake.notify();
            } else if state.closing && state.queue.len() == 0 {
                break;
            } else {
                self.idle.notify_all();
                state.idle += 1;
                state = self.work.wait(state).expect("no thread panics while it holds a pool's state");
                state.idle -= 1;
            }
        }
        // A thread that waits for its turn to change the image must also be able to end.
        self.work.notify_all();
        self.idle.notify_all();
    }
}

impl Drop for Pool {
    /// Completes the queued operations, then stops the threads. After `drain_max` it abandons a thread that hangs in
    /// the kernel.
    fn drop(&mut self) {
        let deadline = Instant::now() + self.drain_max;
        let mut state = self.shared.lock();
        state.closing = true;
        self.shared.work.notify_all();
        while state.running > 0 || state.queue.len() > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                if !self.drain_max.is_zero() {
                    let (hanging, label) = (counted(state.running as u64, "operation"), self.shared.image.label());
                    log::error!(
                        "{label}: {hanging} did not complete in {} s; abandoning them",
                        self.drain_max.as_secs()
                    );
                }
                // No thread may start an operation after the caller has freed its memory.
                state.queue.clear();
                self.shared.work.notify_all();
                return;
            }
            state = self.shared.idle.wait_timeout(state, left).expect("no thread panics with a pool's state").0;
        }
        drop(state);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("{}: an I/O thread panicked", self.shared.image.label());
            }
        }
    }
}
