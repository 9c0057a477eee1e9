//! Executes the operator's requests to a device. May wait for the image.

use std::collections::VecDeque;
use std::thread;
use std::time::{Duration, Instant};

use super::handle::ServiceHandle;
use super::settings::{rate_limits, settings};
use crate::cache::WarmStep;
use crate::config::CacheMode;
use crate::device::HeldRequests;
use crate::device::control::Workers;
use crate::disk_protocol::{DeviceReply, DeviceRequest, DeviceSettings};
use crate::units::{Fault, PAGE_BYTES, PageNo, PageSpan};

/// How long warming pauses while the guest or the store is busy.
const WARM_PAUSE: Duration = Duration::from_millis(5);

/// Reads in pages for at most this long.
fn warm(workers: &Workers, extents: &[(u64, u64)], time: Duration) -> DeviceReply {
    let until = Instant::now() + time;
    let mut left: VecDeque<(u64, u64)> = extents.iter().copied().collect();
    while let Some(&(first, count)) = left.front() {
        if Instant::now() >= until {
            break;
        }
        let span = PageSpan::new(PageNo(first), count.min(u64::MAX - first));
        let Some((next, step)) = workers.warm(span) else { return DeviceReply::NotServed };
        match step {
            WarmStep::Full => return DeviceReply::Warmed { left: left.into(), is_full: true },
            // A timed futex wait, which every sandbox allows.
            WarmStep::Busy => thread::park_timeout(WARM_PAUSE),
            WarmStep::Done => {}
        }
        left.pop_front();
        let rest = span.end().0.saturating_sub(next.0);
        if rest > 0 {
            left.push_front((next.0, rest));
        }
    }
    DeviceReply::Warmed { left: left.into(), is_full: false }
}

impl ServiceHandle {
    /// Applies those of the new settings that may change while the device is served.
    fn configure(&self, workers: &Workers, new: &DeviceSettings) -> DeviceReply {
        let (Some(device), Some(image)) = (self.device.upgrade(), self.image.upgrade()) else {
            return DeviceReply::NotServed;
        };
        let cache = match settings(new, image.limits()) {
            Ok(cache) => cache,
            Err(error) => return DeviceReply::Failed { fault: error.to_string() },
        };
        let frames = cache.frames as usize;
        if let Err(error) = image.reserve(frames) {
            return DeviceReply::Refused { why: error.to_string() };
        }
        workers.reconfigure(cache);
        image.follow_size(frames);
        drop(image);
        device.reconfigure(new.cache.mode == CacheMode::Writeback, new.poll_us);
        device.limiter.set(&rate_limits(new));
        workers.wake();
        DeviceReply::Done
    }

    /// Allocates the memory for a cache of this size; a later request sets the size.
    fn reserve(&self, size_bytes: u64) -> DeviceReply {
        let Some(image) = self.image.upgrade() else { return DeviceReply::NotServed };
        match image.reserve(usize::try_from(size_bytes / PAGE_BYTES).unwrap_or(usize::MAX)) {
            Ok(()) => DeviceReply::Done,
            Err(error) => DeviceReply::Refused { why: error.to_string() },
        }
    }

    /// Executes a request and returns its reply. `order`: the number of the request among those of the device, which
    /// are executed at the same time.
    pub fn execute(&self, request: &DeviceRequest, order: u64) -> DeviceReply {
        let Some(workers) = self.workers.upgrade() else { return DeviceReply::NotServed };
        let done = |result: Result<(), Fault>| match result {
            Ok(()) => DeviceReply::Done,
            Err(fault) => DeviceReply::Failed { fault: fault.to_string() },
        };
        match *request {
            DeviceRequest::Flush => done(workers.flush()),
            DeviceRequest::StopAccepting => match self.server.upgrade().map(|server| server.stop_unless_in_use()) {
                Some(Ok(())) => DeviceReply::Done,
                Some(Err(by)) => DeviceReply::InUse { by },
                None => DeviceReply::NotServed,
            },
            DeviceRequest::Warm { ref extents, time_ms } => {
                warm(&workers, extents, Duration::from_millis(time_ms.into()))
            }
            DeviceRequest::Resident { from } => match workers.resident(from) {
                Some((pages, next)) => {
                    DeviceReply::Resident { pages: pages.into_iter().map(|page| page.0).collect(), next }
                }
                None => DeviceReply::NotServed,
            },
            DeviceRequest::DropClean => DeviceReply::Dropped { pages: workers.drop_clean() },
            DeviceRequest::Freeze { time_ms, holds_reads } => {
                let held = if holds_reads { HeldRequests::All } else { HeldRequests::Changes };
                done(workers.freeze(Duration::from_millis(time_ms.into()), held))
            }
            DeviceRequest::Reserve { size_bytes } => self.reserve(size_bytes),
            DeviceRequest::Configure { ref settings } => self.configure(&workers, settings),
            DeviceRequest::Grow { size_bytes } => self.grow(size_bytes, order),
            DeviceRequest::Shrink { size_bytes } => self.shrink(&workers, size_bytes, order),
            DeviceRequest::Cut { size_bytes } => self.end_shrink(size_bytes),
            DeviceRequest::Thaw => DeviceReply::Thawed { was_frozen: workers.thaw() },
        }
    }
}
