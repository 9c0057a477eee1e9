//! A view of a device that is served, for a thread that must not wait for it: the device's image may not answer.

use std::path::{Path, PathBuf};
use std::sync::Weak;
use std::time::Duration;

use crate::cached_image::CachedImage;
use crate::device::Untracked;
use crate::device::control::Workers;
use crate::vhost::{BoundSocket, Server};

/// See the module. It does not keep the device alive.
#[derive(Debug)]
pub struct Handle {
    pub(super) path: PathBuf,
    /// The socket's file, if the daemon bound it.
    pub(super) socket: Weak<BoundSocket>,
    pub(super) server: Weak<Server>,
    pub(super) workers: Weak<Workers>,
    pub(super) image: Weak<CachedImage>,
}

impl Handle {
    /// Path of the image.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What devices on one cached image have in common, and others not.
    pub fn image_key(&self) -> usize {
        self.image.as_ptr().addr()
    }

    /// The operation on the image that has been in flight for longest, if there is one, and for how long; `None` if
    /// that is not known at the moment.
    pub fn oldest_op(&self) -> Option<Option<(String, Duration)>> {
        self.image.upgrade()?.oldest_op()
    }

    /// Numbers of which one changes while the image completes operations; `None` if that is not known at the moment.
    pub fn progress(&self) -> Option<[u64; 4]> {
        let stats = self.image.upgrade()?.try_stats()?;
        Some([stats.dirty_pages, stats.store_reads, stats.store_writes, stats.syncs])
    }

    /// See [`CachedImage::look_at_cache_file`].
    pub fn look_at_cache_file(&self) {
        if let Some(image) = self.image.upgrade() {
            image.look_at_cache_file();
        }
    }

    /// Whether the end of the daemon loses completed writes that are only in a cache that ends with it; `true` if that
    /// is not known.
    pub fn has_unkept_data(&self) -> bool {
        self.image.upgrade().is_some_and(|image| image.arena().file().is_none() && image.has_unstable_data())
    }

    /// The front-end that is served while another one waits to be accepted, for messages; `None` if none waits.
    pub fn busy_with(&self) -> Option<String> {
        self.server.upgrade()?.busy_with()
    }

    /// Ends the device as a crash would. See [`Workers::abandon`].
    pub fn abandon(&self, untracked: Untracked) {
        if let Some(workers) = self.workers.upgrade() {
            workers.abandon(untracked);
        }
    }

    /// Closes the connection and the socket, whatever the device's threads do: the process is about to end.
    pub fn force_close(&self) {
        let Some(server) = self.server.upgrade() else { return };
        server.force_close();
        // An inherited socket stays: the next daemon inherits it too.
        if let Some(socket) = self.socket.upgrade() {
            server.stop_listening();
            socket.remove();
        }
    }
}
