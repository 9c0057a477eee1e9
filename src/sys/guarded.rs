//! Writes that block for no longer than some tens of milliseconds, and usually only once.
//!
//! An eventfd that another process has sent belongs to that process as well: at any time it can fill the counter and
//! clear O_NONBLOCK, and then a write blocks until the other process reads. No flag of a single write prevents that
//! (pwritev2(2) does not support eventfds). So a watchdog thread checks periodically whether a thread is still in
//! the same write, and interrupts it by a signal. The cost for a write is one store before it and one after it.

use std::fs::File;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::{self, Thread};
use std::time::Duration;

use super::poll::is_writable;
use super::signal::with_all_blocked;

/// The interval of the watchdog's checks. A blocking write takes one to two intervals.
///
/// => Each check can preempt a worker or a guest in the middle of its requests. With 4 ms, the 99th percentile of
///    cached reads by a polling driver was 25 us instead of 17.
const PERIOD: Duration = Duration::from_millis(20);
/// After this many intervals without any write, the watchdog sleeps until there is one.
const IDLE_PERIODS_MAX: u32 = 5;

/// The progress of one thread's writes.
#[derive(Debug)]
struct WritingThread {
    thread: libc::pid_t,
    /// Number of starts and ends of writes: odd during a write.
    steps: AtomicU64,
    /// A write of this thread has blocked. From then on it asks before each write whether it would block: another
    /// process can pass hundreds of descriptors that do.
    has_blocked: AtomicBool,
}

/// The threads that write, and the watchdog.
#[derive(Debug, Default)]
struct Registry {
    writers: Mutex<Vec<Arc<WritingThread>>>,
    /// The watchdog sleeps until it is woken.
    asleep: AtomicBool,
    watchdog: OnceLock<Option<Thread>>,
}

static REGISTRY: Registry =
    Registry { writers: Mutex::new(Vec::new()), asleep: AtomicBool::new(false), watchdog: OnceLock::new() };

/// The entry of a thread in the registry, until the thread ends.
struct Registered(Arc<WritingThread>);

thread_local! {
    static WRITER: Registered = Registered::new();
}

impl Registered {
    fn new() -> Self {
        // SAFETY: a plain system call.
        let thread = unsafe { libc::gettid() };
        let writer = Arc::new(WritingThread { thread, steps: AtomicU64::new(0), has_blocked: AtomicBool::new(false) });
        REGISTRY.writers().push(Arc::clone(&writer));
        Self(writer)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        REGISTRY.writers().retain(|writer| !Arc::ptr_eq(writer, &self.0));
    }
}

/// Starts the watchdog, unless it is running. Its thread first calls `confine`. Without the watchdog, writes may block.
pub fn start_watchdog(confine: impl FnOnce() + Send + 'static) {
    REGISTRY.watchdog.get_or_init(|| {
        let watch = || {
            confine();
            REGISTRY.watch();
        };
        let spawn = || thread::Builder::new().name("watchdog".to_owned()).spawn(watch);
        let made = install_handler().and_then(|()| with_all_blocked(spawn));
        made.ok().map(|handle| handle.thread().clone())
    });
}

/// Adds 1 to an eventfd.
///
/// # Errors
/// The error of write(2); [`io::ErrorKind::WouldBlock`] and [`io::ErrorKind::Interrupted`] if the counter is full: the
/// latter after some milliseconds, because O_NONBLOCK is not set, and usually only once for a thread.
pub fn add_one(mut eventfd: &File) -> io::Result<()> {
    WRITER.with(|Registered(writer)| {
        if writer.has_blocked.load(Ordering::Relaxed) && !is_writable(eventfd.as_raw_fd()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        // The order is the same for all threads: either the watchdog sees this step before it sleeps, or this thread
        // sees that the watchdog sleeps.
        writer.steps.fetch_add(1, Ordering::SeqCst);
        if REGISTRY.asleep.load(Ordering::SeqCst) {
            REGISTRY.wake();
        }
        let result = eventfd.write(&1u64.to_ne_bytes()).map(|_| ());
        writer.steps.fetch_add(1, Ordering::Relaxed);
        if result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::Interrupted) {
            writer.has_blocked.store(true, Ordering::Relaxed);
        }
        result
    })
}

impl Registry {
    fn writers(&self) -> MutexGuard<'_, Vec<Arc<WritingThread>>> {
        self.writers.lock().expect("no thread panics with the writers locked")
    }

    #[cold]
    fn wake(&self) {
        self.asleep.store(false, Ordering::SeqCst);
        if let Some(Some(watchdog)) = self.watchdog.get() {
            watchdog.unpark();
        }
    }

    /// The loop of the watchdog.
    fn watch(&self) {
        let (mut seen, mut idle) = (Vec::new(), 0);
        loop {
            let steps = self.interrupt_stuck(&seen);
            idle = if steps == seen { idle + 1 } else { 0 };
            seen = steps;
            if idle < IDLE_PERIODS_MAX {
                thread::sleep(PERIOD);
                continue;
            }
            self.asleep.store(true, Ordering::SeqCst);
            if self.steps() == seen {
                thread::park();
            }
            self.asleep.store(false, Ordering::SeqCst);
            idle = 0;
        }
    }

    fn steps(&self) -> Vec<(libc::pid_t, u64)> {
        self.writers().iter().map(|writer| (writer.thread, writer.steps.load(Ordering::SeqCst))).collect()
    }

    /// Interrupts the threads that are still in the write recorded in `seen`; returns the present state.
    fn interrupt_stuck(&self, seen: &[(libc::pid_t, u64)]) -> Vec<(libc::pid_t, u64)> {
        // Locked until the signals are sent, so that no thread of the list ends meanwhile.
        let writers = self.writers();
        let now: Vec<_> = writers.iter().map(|writer| (writer.thread, writer.steps.load(Ordering::SeqCst))).collect();
        for &(thread, steps) in &now {
            if steps % 2 == 1 && seen.contains(&(thread, steps)) {
                // SAFETY: plain system calls. The thread lives, the signal has a handler, and one that comes late, when
                // the write has ended, at most makes another system call of that thread return EINTR.
                unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal()) };
            }
        }
        now
    }
}

/// The signal that interrupts a write. Nothing else uses it.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

/// Makes the signal interrupt system calls, without any other effect.
fn install_handler() -> io::Result<()> {
    extern "C" fn ignore(_: libc::c_int) {}
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: all-zero bytes are a valid sigaction: no flags (so no SA_RESTART), and an empty mask. The handler does
    // nothing, so it is safe at any moment. The call reads one sigaction, and with a null pointer writes none.
    let result = unsafe {
        (*action.as_mut_ptr()).sa_sigaction = ignore as *const () as libc::sighandler_t;
        libc::sigaction(signal(), action.as_ptr(), std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{FromRawFd, IntoRawFd};
    use std::time::Instant;

    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    fn full_blocking_eventfd() -> File {
        let eventfd = EventFd::new(0).unwrap();
        eventfd.write(u64::MAX - 1).unwrap();
        // SAFETY: the descriptor is open, and nothing else owns it.
        unsafe { File::from_raw_fd(eventfd.into_raw_fd()) }
    }

    #[test]
    fn a_blocking_write_to_a_full_eventfd_is_interrupted() {
        start_watchdog(|| {});
        for pause in [Duration::ZERO, PERIOD * (IDLE_PERIODS_MAX + 50)] {
            thread::sleep(pause);
            let write = || {
                let begun = Instant::now();
                (add_one(&full_blocking_eventfd()).unwrap_err().kind(), begun.elapsed())
            };
            let (error, elapsed) = thread::spawn(write).join().unwrap();
            assert_eq!(error, io::ErrorKind::Interrupted);
            assert!(elapsed < Duration::from_secs(1), "{elapsed:?}");
        }
    }

    #[test]
    fn a_thread_whose_write_has_blocked_does_not_block_on_the_next_full_eventfd() {
        start_watchdog(|| {});
        let kinds = || [0; 3].map(|_| add_one(&full_blocking_eventfd()).unwrap_err().kind());
        let blocked = thread::spawn(kinds).join().unwrap();
        assert_eq!(blocked, [io::ErrorKind::Interrupted, io::ErrorKind::WouldBlock, io::ErrorKind::WouldBlock]);
    }
}
