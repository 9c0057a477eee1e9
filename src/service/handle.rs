//! A handle to a served device, for a thread that must not wait for it: the device's image may not answer.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Weak};

use crate::cached_image::CachedImage;
use crate::device::control::Workers;
use crate::device::{Device, Untracked};
use crate::disk_stats::{DiskState, OldestOp};
use crate::vhost::Server;

/// See the module. It does not keep the device alive.
#[derive(Clone, Debug)]
pub struct ServiceHandle {
    pub(super) server: Weak<Server>,
    pub(super) workers: Weak<Workers>,
    pub(super) image: Weak<CachedImage>,
    pub(super) device: Weak<Device>,
    /// Number of the last request to shrink the image; see [`ServiceHandle::execute`].
    pub(super) last_shrink: Arc<AtomicU64>,
}

impl ServiceHandle {
    /// The device's state. Values that cannot be read now, because a worker uses the cache, are taken from `before`.
    pub fn state(&self, before: &DiskState) -> DiskState {
        let server = self.server.upgrade();
        let busy_with = server.as_ref().and_then(|server| server.busy_with());
        let front_end = server.and_then(|server| server.front_end());
        let mut state = DiskState { busy_with, front_end, ..*before };
        let Some(image) = self.image.upgrade() else { return state };
        if let Some(stats) = image.try_stats_and_freeze() {
            (state.cache, state.is_frozen) = stats;
            state.image_bytes = image.limits().size_bytes.get();
        }
        if let Some(oldest) = image.oldest_op() {
            state.oldest = oldest.map(|(kind, span, age)| OldestOp { kind, span, age });
        }
        state.has_volatile_dirty_data = image.arena().file().is_none() && image.has_unstable_data();
        state
    }

    /// Ends the device as a crash would. See [`Workers::abandon`].
    pub fn abandon(&self, untracked: Untracked) {
        if let Some(workers) = self.workers.upgrade() {
            workers.abandon(untracked);
        }
    }

    /// Closes the connection without waiting for the device's threads: the process is about to end.
    pub fn force_close(&self) {
        if let Some(server) = self.server.upgrade() {
            server.force_close();
        }
    }
}
