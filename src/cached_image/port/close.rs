//! The end of a worker's use of an image.

use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::warn;

use super::WorkerPort;
use crate::sys::poll::wait_readable;
use crate::units::counted;

/// How long a worker that is ending sleeps at most before it checks again for completed operations.
const COMPLETION_WAIT: Duration = Duration::from_millis(10);

impl WorkerPort {
    /// Ends the use of the store: waits for at most `timeout` until the operations in flight have completed. The rest
    /// is left to the kernel, which still uses the cache's memory and the image: the memory, the lock of its file and
    /// the image's lock then stay until the process ends.
    ///
    /// => Only [`WorkerPort`]'s drop may follow.
    pub fn close(&mut self, timeout: Duration) {
        self.closed = true;
        if self.is_shared() && !timeout.is_zero() {
            self.complete_for_others(Instant::now() + timeout);
        }
        if !self.store.drain(timeout) {
            let (name, left) = (&self.image.name, counted(self.store.in_flight() as u64, "operation"));
            warn!("{name}: {left} still in flight; the image stays locked until they complete");
            mem::forget(Arc::clone(&self.image));
        }
    }

    /// Completes the operations that this worker has submitted: another device of the image may wait for a page that
    /// one of them reads in.
    fn complete_for_others(&mut self, until: Instant) {
        loop {
            let now = self.image.now();
            self.reap(true);
            self.with_cache(now, |_, notices| notices.clear());
            self.submit();
            let left = until.saturating_duration_since(Instant::now());
            if self.store.in_flight() == 0 && self.backlog.is_empty() && self.reaped.is_empty() || left.is_zero() {
                return;
            }
            if self.store.in_flight() > 0 && self.reaped.is_empty() {
                self.store_ready |= wait_readable(self.store.wake_fd(), left.min(COMPLETION_WAIT));
            }
        }
    }
}
