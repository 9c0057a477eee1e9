//! The engine for hosts that forbid io_uring: a pool of threads with plain system calls.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::file::OpenImage;
use super::pool::{self, Pool};
use super::{Event, IoRequest, Limits, Refused, StoreQueue};

/// Threads of each worker's pool. One alone would let a Sync hold up every read; four leave two for transfers beside a
/// Sync and a long Zero, and enough overlap that a disk sees a queue. More would fight the guest's processors for what
/// the host's page cache serves at once: who needs depth has io_uring.
const THREADS: usize = 4;

/// One worker's store on a thread pool.
#[derive(Debug)]
pub(super) struct ThreadQueue {
    image: Arc<OpenImage>,
    wake: Arc<EventFd>,
    pool: Pool,
    in_flight: usize,
}

impl ThreadQueue {
    pub(super) fn new(image: Arc<OpenImage>) -> io::Result<Self> {
        let wake = pool::new_wake()?;
        let depth = usize::from(image.limits.depth);
        let pool = Pool::new(Arc::clone(&image), Arc::clone(&wake), THREADS, depth)?;
        Ok(Self { image, wake, pool, in_flight: 0 })
    }
}

impl StoreQueue for ThreadQueue {
    fn limits(&self) -> &Limits {
        &self.image.limits
    }

    fn wake_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    fn submit(&mut self, request: IoRequest) -> Result<(), Refused> {
        if !self.image.limits.admissible(&request) {
            return Err(Refused::Invalid(request));
        }
        if self.in_flight >= usize::from(self.image.limits.depth) {
            return Err(Refused::Full(request));
        }
        self.in_flight += 1;
        self.pool.push(request);
        Ok(())
    }

    fn kick(&mut self) {
        self.pool.start();
    }

    fn reap(&mut self, events: &mut Vec<Event>) {
        pool::clear(&self.wake);
        self.in_flight -= self.pool.take(events);
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}
