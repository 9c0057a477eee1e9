//! Threads that run blocking operations and poke a wake-up descriptor: the whole of the thread engine, and the
//! io_uring engine's helper for what a ring can't do.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::file::OpenImage;
use super::{Event, IoRequest, blocking};

/// How long a dropped store waits for its operations: as long as Linux gives a SCSI disk for a command.
pub(super) const DRAIN_MAX: Duration = Duration::from_secs(30);

/// An eventfd that a store's worker polls.
pub(super) fn new_wake() -> io::Result<Arc<EventFd>> {
    Ok(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?))
}

/// Makes the descriptor readable.
pub(super) fn notify(wake: &EventFd) {
    if let Err(error) = wake.write(1) {
        // EAGAIN: the counter is at its end, so the descriptor is readable already.
        debug_assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "eventfd {}", wake.as_raw_fd());
    }
}

/// Makes the descriptor unreadable, if it was readable.
pub(super) fn clear(wake: &EventFd) {
    if let Err(error) = wake.read() {
        debug_assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "eventfd {}", wake.as_raw_fd());
    }
}

/// Threads over one image.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    image: Arc<OpenImage>,
    wake: Arc<EventFd>,
    state: Mutex<PoolState>,
    work: Condvar,
    idle: Condvar,
}

#[derive(Debug)]
struct PoolState {
    queue: VecDeque<IoRequest>,
    events: Vec<Event>,
    running: usize,
    closing: bool,
}

impl Pool {
    /// Starts `threads` threads for at most `depth` operations at a time.
    pub(super) fn new(image: Arc<OpenImage>, wake: Arc<EventFd>, threads: usize, depth: usize) -> io::Result<Self> {
        let state = PoolState {
            queue: VecDeque::with_capacity(depth),
            events: Vec::with_capacity(depth),
            running: 0,
            closing: false,
        };
        let shared = Shared { image, wake, state: Mutex::new(state), work: Condvar::new(), idle: Condvar::new() };
        let mut pool = Self { shared: Arc::new(shared), threads: Vec::with_capacity(threads) };
        for number in 0..threads {
            let shared = Arc::clone(&pool.shared);
            // On failure the pool is dropped, which stops those that did start.
            let thread = thread::Builder::new().name(format!("store-{number}")).spawn(move || shared.run())?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Queues an operation; a busy thread may take it at once, a sleeping one after [`Pool::start`].
    pub(super) fn push(&self, request: IoRequest) {
        self.shared.lock().queue.push_back(request);
    }

    /// Wakes threads for what is queued.
    pub(super) fn start(&self) {
        let queued = self.shared.lock().queue.len();
        for _ in 0..queued.min(self.threads.len()) {
            self.shared.work.notify_one();
        }
    }

    /// Moves the finished operations' events to `events`; returns how many.
    pub(super) fn take(&self, events: &mut Vec<Event>) -> usize {
        let mut state = self.shared.lock();
        let count = state.events.len();
        events.append(&mut state.events);
        count
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().expect("no thread panics while it holds a pool's state")
    }

    /// A thread's life: runs operations until the pool closes and the queue is empty.
    fn run(&self) {
        let mut state = self.lock();
        loop {
            if let Some(mut request) = state.queue.pop_front() {
                state.running += 1;
                drop(state);
                let event = blocking::execute(&self.image, &mut request);
                state = self.lock();
                state.running -= 1;
                state.events.push(event);
                // Poked under the lock: whoever sees the event in take() has cleared the poke, or gets it afterwards
                // and finds nothing.
                notify(&self.wake);
            } else if state.closing {
                break;
            } else {
                self.idle.notify_all();
                state = self.work.wait(state).expect("no thread panics while it holds a pool's state");
            }
        }
        self.idle.notify_all();
    }
}

impl Drop for Pool {
    /// Finishes what was queued, then stops the threads. A thread that hangs in the kernel is left behind after
    /// [`DRAIN_MAX`].
    fn drop(&mut self) {
        let deadline = Instant::now() + DRAIN_MAX;
        let mut state = self.shared.lock();
        state.closing = true;
        self.shared.work.notify_all();
        while state.running > 0 || !state.queue.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let (running, path) = (state.running, self.shared.image.path().display());
                log::error!("image {path}: {running} operations hang; their threads are left behind");
                // What no thread has begun must not run after the caller took its memory back.
                state.queue.clear();
                return;
            }
            state = self.shared.idle.wait_timeout(state, left).expect("no thread panics with a pool's state").0;
        }
        drop(state);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("image {}: a store's thread panicked", self.shared.image.path().display());
            }
        }
    }
}
