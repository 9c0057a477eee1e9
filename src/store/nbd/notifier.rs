//! The wake-up of a queue's worker by another thread.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::store::wake::WakeFd;

/// The eventfd that wakes a queue's worker, with a flag that avoids a system call when it is not notified.
#[derive(Clone, Debug)]
pub(super) struct Notifier {
    wake: WakeFd,
    /// Set after the descriptor was made readable: a worker that sees it too late is woken again.
    is_notified: Arc<AtomicBool>,
}

impl Notifier {
    pub fn new() -> io::Result<Self> {
        Ok(Self { wake: WakeFd::new()?, is_notified: Arc::default() })
    }

    pub fn notify(&self) {
        self.wake.notify();
        self.is_notified.store(true, Ordering::Release);
    }

    /// Makes the descriptor unreadable, if it was readable.
    pub fn clear(&self) {
        if self.is_notified.swap(false, Ordering::AcqRel) {
            self.wake.clear();
        }
    }
}

impl AsRawFd for Notifier {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}
