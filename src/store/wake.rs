//! The eventfd that wakes a queue's worker.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// An eventfd that a worker polls and that any thread may notify. Clones share the descriptor.
#[derive(Clone, Debug)]
pub(super) struct WakeFd(Arc<EventFd>);

impl WakeFd {
    /// A descriptor that is not readable yet.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?)))
    }

    /// Makes the descriptor readable.
    pub(super) fn notify(&self) {
        if let Err(error) = self.0.write(1) {
            // EAGAIN: the counter is at its maximum, so the descriptor is already readable.
            debug_assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "eventfd {}", self.as_raw_fd());
        }
    }

    /// Makes the descriptor unreadable, if it was readable.
    pub(super) fn clear(&self) {
        if let Err(error) = self.0.read() {
            debug_assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "eventfd {}", self.as_raw_fd());
        }
    }
}

impl AsRawFd for WakeFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
