//! `src/sync.rs` with loom's atomics, and an eventfd that loom can schedule.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use loom::sync::{Arc, Condvar, Mutex};

pub use loom::sync::atomic::{AtomicBool, AtomicU16, Ordering, fence};

pub const EFD_CLOEXEC: i32 = 0;
pub const EFD_NONBLOCK: i32 = 0;

thread_local! {
    /// The last eventfd that was made: loom runs all threads of a model on one.
    static LAST: RefCell<Option<EventFd>> = const { RefCell::new(None) };
}

/// An eventfd: a count, and whoever waits for it. Clones are the same one.
#[derive(Clone, Debug)]
pub struct EventFd(Arc<(Mutex<u64>, Condvar)>);

impl EventFd {
    pub fn new(_flags: i32) -> io::Result<Self> {
        let made = Self(Arc::new((Mutex::new(0), Condvar::new())));
        LAST.with(|last| *last.borrow_mut() = Some(made.clone()));
        Ok(made)
    }

    /// The last one that was made.
    pub fn last() -> Self {
        LAST.with(|last| last.borrow_mut().take()).expect("one was made")
    }

    pub fn write(&self, count: u64) -> io::Result<()> {
        *self.0.0.lock().unwrap() += count;
        self.0.1.notify_all();
        Ok(())
    }

    pub fn read(&self) -> io::Result<u64> {
        match std::mem::take(&mut *self.0.0.lock().unwrap()) {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            count => Ok(count),
        }
    }

    /// epoll_wait(2) for it alone: returns once it is readable, and does not read it.
    pub fn wait(&self) {
        let mut count = self.0.0.lock().unwrap();
        while *count == 0 {
            count = self.0.1.wait(count).unwrap();
        }
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        -1
    }
}

/// A word of a ring.
impl crate::notification::RingWord for AtomicU16 {
    fn load(&self, order: Ordering) -> u16 {
        Self::load(self, order)
    }

    fn store(&self, value: u16, order: Ordering) {
        Self::store(self, value, order);
    }
}
