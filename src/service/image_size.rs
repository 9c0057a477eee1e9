//! Changes of the size of an image that is served.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::handle::ServiceHandle;
use crate::cached_image::CachedImage;
use crate::device::control::Workers;
use crate::disk_protocol::DeviceReply;
use crate::units::SECTOR_BYTES;

/// How long a shrink waits for the guest's requests beyond the new end, and then for the end of the cache's operations.
const SHRINK_TIMEOUT: Duration = Duration::from_secs(30);
/// The pause before the cache is asked again.
const SHRINK_PAUSE: Duration = Duration::from_millis(5);

impl ServiceHandle {
    fn image(&self) -> Result<Arc<CachedImage>, DeviceReply> {
        self.image.upgrade().ok_or(DeviceReply::NotServed)
    }

    /// Reports this capacity to the guest, and accepts requests up to it.
    fn set_capacity(&self, size_bytes: u64) {
        if let (Some(device), Some(server)) = (self.device.upgrade(), self.server.upgrade())
            && device.set_capacity(size_bytes / SECTOR_BYTES)
        {
            server.notify_config_change();
        }
    }

    /// Follows an image that has grown to this size.
    ///
    /// => A request that was sent before a shrink, and is executed after it, is void.
    pub(super) fn grow(&self, size_bytes: u64, order: u64) -> DeviceReply {
        let Some(image) = self.image.upgrade() else { return DeviceReply::NotServed };
        if self.last_shrink.load(Ordering::Acquire) > order {
            return DeviceReply::Done;
        }
        if let Err(fault) = image.grow(size_bytes) {
            return DeviceReply::Failed { fault };
        }
        // Use the image's present size: of two concurrent requests, the larger one counts.
        self.set_capacity(image.limits().size_bytes.get());
        DeviceReply::Done
    }

    /// Uses the image only up to this size, after everything is on it: the supervisor is about to cut it. If that
    /// fails, the device keeps its size.
    ///
    /// => The capacity changes first, so no request for sectors beyond the new end is accepted while the earlier ones
    ///    complete.
    pub(super) fn shrink(&self, workers: &Workers, size_bytes: u64, order: u64) -> DeviceReply {
        let before = match self.image() {
            Ok(image) => image.limits().size_bytes.get(),
            Err(reply) => return reply,
        };
        if size_bytes == 0 || size_bytes >= before {
            return DeviceReply::Refused { why: format!("it has {before} bytes") };
        }
        self.last_shrink.fetch_max(order, Ordering::AcqRel);
        self.set_capacity(size_bytes);
        match self.drain_tail(workers, size_bytes) {
            Ok(()) => DeviceReply::Done,
            Err(reply) => {
                if let Ok(image) = self.image() {
                    image.announce_shrink(None);
                }
                self.set_capacity(before);
                reply
            }
        }
    }

    /// Completes the requests for sectors beyond a new end, makes everything durable, and drops the pages there.
    ///
    /// => It holds the image only for moments: the device may end meanwhile.
    fn drain_tail(&self, workers: &Workers, size_bytes: u64) -> Result<(), DeviceReply> {
        self.image()?.announce_shrink(Some(size_bytes));
        if !workers.drain_beyond(size_bytes / SECTOR_BYTES, SHRINK_TIMEOUT) {
            let why = "the guest's requests beyond the new end do not complete; the disk keeps its size".to_owned();
            return Err(DeviceReply::Refused { why });
        }
        let until = Instant::now() + SHRINK_TIMEOUT;
        loop {
            workers.flush().map_err(|fault| DeviceReply::Failed { fault: fault.to_string() })?;
            let is_left = self.image()?.shrink();
            // Pages were dropped: requests that wait for a page may continue.
            workers.wake();
            if is_left {
                return Ok(());
            }
            if Instant::now() >= until {
                let why = "the image's operations beyond the new end do not complete; the disk keeps its size";
                return Err(DeviceReply::Refused { why: why.to_owned() });
            }
            // A timed futex wait, which every sandbox allows.
            thread::park_timeout(SHRINK_PAUSE);
        }
    }

    /// The image was cut to this size, after [`Self::shrink`].
    pub(super) fn end_shrink(&self, size_bytes: u64) -> DeviceReply {
        match self.image() {
            Ok(image) => {
                image.end_shrink(size_bytes);
                DeviceReply::Done
            }
            Err(reply) => reply,
        }
    }
}
