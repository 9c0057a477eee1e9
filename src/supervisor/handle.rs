//! A handle to a served device for the main thread, which must not wait for it.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::process::Process;
use super::slot::ImageSlot;
use super::socket::ListenSocket;
use crate::disk_protocol::ToDisk;
use crate::disk_stats::{DiskState, StatsPage};
use crate::listener::BoundSocket;
use crate::store::file::IoLock;
use crate::sys::process::name_of;
use crate::sys::socket::stop_listening;

/// The link to a device in its process.
#[derive(Clone, Debug)]
pub(super) struct DeviceLink {
    pub device: u32,
    /// Number of the device for which its image was opened.
    image_of: u32,
    pub process: Arc<Process>,
}

impl DeviceLink {
    /// What devices with one image and one process have in common, and others not.
    pub fn image_key(&self) -> (IoLock, u32) {
        (self.process.io_lock(), self.image_of)
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct DeviceHandle {
    device: u32,
    /// Number of the device for which its image was opened.
    image_of: u32,
    process: Arc<Process>,
    page: Arc<StatsPage>,
    /// Its process serves a cache that an earlier process or daemon left.
    pub is_restored: bool,
    listener: UnixListener,
    /// The socket's file, if the daemon bound it.
    socket: Weak<BoundSocket>,
}

impl DeviceHandle {
    /// The handle of a device.
    ///
    /// # Errors
    /// Errors of dup(2).
    pub fn new(
        device: u32,
        slot: &ImageSlot,
        process: &Arc<Process>,
        page: &Arc<StatsPage>,
        socket: &ListenSocket,
    ) -> io::Result<Self> {
        Ok(Self {
            device,
            image_of: slot.image_of(),
            is_restored: slot.is_restored,
            process: Arc::clone(process),
            page: Arc::clone(page),
            listener: socket.listener.try_clone()?,
            socket: socket.bound.as_ref().map_or_else(Weak::new, Arc::downgrade),
        })
    }

    /// Equal for two devices if and only if they share one image and one process.
    pub fn image_key(&self) -> (IoLock, u32) {
        (self.process.io_lock(), self.image_of)
    }

    /// The link to the device.
    pub fn link(&self) -> DeviceLink {
        DeviceLink { device: self.device, image_of: self.image_of, process: Arc::clone(&self.process) }
    }

    /// Process ID of its disk process, if it has one.
    pub fn pid(&self) -> Option<u32> {
        self.process.pid()
    }

    /// The device's published state.
    pub fn state(&self) -> DiskState {
        self.page.read()
    }

    /// The time since the process last updated its statistics page.
    pub fn silent_for(&self) -> Duration {
        self.page.silent_for().unwrap_or_default()
    }

    /// The front-end that is served while another one waits to be accepted, for messages; `None` if none waits.
    pub fn busy_with(&self) -> Option<String> {
        let (pid, uid) = self.state().busy_with?;
        let user = format!("uid {uid}");
        Some(match name_of(pid) {
            Some(name) => format!("pid {pid} ({name}), {user}"),
            None if pid == 0 => format!("process of another PID namespace, {user}"),
            None => format!("pid {pid}, {user}"),
        })
    }

    /// Ends the device as a crash would.
    pub fn abandon(&self, waits_for_untracked: bool) {
        self.process.command(&ToDisk::Abandon { device: self.device, waits_for_untracked });
    }

    /// Closes the connection and the socket without waiting for the device's threads.
    pub fn force_close(&self) {
        self.process.command(&ToDisk::ForceClose { device: self.device });
        // An inherited socket stays: the next daemon inherits it too.
        if let Some(socket) = self.socket.upgrade() {
            stop_listening(&self.listener);
            socket.remove();
        }
    }

    /// Kills the process; returns `false` if the device runs in a thread.
    pub fn kill(&self) -> bool {
        self.process.kill();
        self.process.is_killable()
    }
}
