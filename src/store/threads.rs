//! The engine for hosts that do not allow io_uring: a pool of threads with plain system calls.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use super::image::OpenImage;
use super::pool::{Pool, Threads};
use super::wake::WakeFd;
use super::{Event, IoRequest, Limits, Refused, StoreQueue, wait_until_drained};

/// Threads of each worker's pool. With one, a Sync would delay every read. With four for changes, two remain for the
/// write-back during a Sync and a long Zero, and enough operations overlap to give the disk a queue. Reads have two
/// more threads that no write occupies. More would compete with the guest for processors, while the host's page cache
/// completes most operations immediately; a load that needs more depth needs io_uring.
const THREADS: Threads = Threads { for_changes: 4, for_reads: 2 };

/// One worker's queue on an image: a pool of [`THREADS`], each of which runs one operation at a time to completion.
///
/// => `submit` hands the request to the pool; a thread that is busy may take it before `kick`, which wakes sleeping
///    ones.
/// => A thread adds its event and notifies the wake fd; `reap` clears the wake fd before it takes events, so that an
///    event added meanwhile makes it readable again.
#[derive(Debug)]
pub(super) struct ThreadQueue {
    image: Arc<OpenImage>,
    wake: WakeFd,
    pool: Pool,
    /// Operations submitted whose events have not been reaped.
    in_flight: usize,
}

impl ThreadQueue {
    /// Starts the pool. Fails with the error of eventfd(2) or of pthread_create(3).
    pub(super) fn new(image: Arc<OpenImage>) -> io::Result<Self> {
        let wake = WakeFd::new()?;
        let depth = usize::from(image.limits.depth);
        let pool = Pool::new(Arc::clone(&image), wake.clone(), THREADS, depth)?;
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
        self.pool.wake_threads();
    }

    fn reap(&mut self, events: &mut Vec<Event>) {
        self.wake.clear();
        self.in_flight -= self.pool.take_events(events);
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn drain(&mut self, timeout: Duration) -> bool {
        self.pool.abandon_on_drop();
        wait_until_drained(self, timeout)
    }
}
