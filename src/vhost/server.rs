//! A device's socket: one front-end after the other, each with a fresh daemon of the crate's and fresh guest memory.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use log::{error, info, warn};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, ShutdownHandle, VhostUserDaemon};

use super::Memory;
use super::backend::Backend;
use super::ring::making_rings_for;
use crate::device::Device;
use crate::device::control::Workers;
use crate::error::{Error, ErrorKind, Result};
use crate::virtio::GuestRam;

/// Binds a socket at `path`. A socket that a dead daemon left behind is taken away first.
///
/// # Errors
/// [`ErrorKind::Socket`] when a live daemon listens there, when something other than a socket is there, or when the
/// system refuses.
pub fn bind(path: &Path) -> Result<UnixListener> {
    let shown = path.display();
    let refused = |e| Error::io(ErrorKind::Socket, format!("cannot listen on {shown}"), e);
    if let Ok(metadata) = fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(Error::new(ErrorKind::Socket, format!("cannot listen on {shown}: it exists and is no socket")));
        }
        match UnixStream::connect(path) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                warn!("{shown} was left behind by a daemon that is gone: it is taken over");
                fs::remove_file(path).map_err(refused)?;
            }
            _ => {
                let context = format!("cannot listen on {shown}: a live daemon does already");
                return Err(Error::new(ErrorKind::Socket, context));
            }
        }
    }
    UnixListener::bind(path).map_err(refused)
}

/// Serves a device's socket until it is told to stop.
#[derive(Debug)]
pub struct Server {
    device: Arc<Device>,
    workers: Arc<Workers>,
    queue_size: u16,
    listener: UnixListener,
    stopped: AtomicBool,
    connection: Mutex<Connection>,
}

/// The way to end the connection that is served now.
#[derive(Default)]
struct Connection(Option<ShutdownHandle>);

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Connection").field(&self.0.is_some()).finish()
    }
}

impl Server {
    /// A server that does not serve yet.
    pub fn new(device: Arc<Device>, workers: Arc<Workers>, queue_size: u16, listener: UnixListener) -> Self {
        let (stopped, connection) = (AtomicBool::new(false), Mutex::default());
        Self { device, workers, queue_size, listener, stopped, connection }
    }

    /// Serves front-ends until [`Server::stop`]; when it returns, no ring runs.
    pub fn serve(&self) {
        while !self.stopped.load(Ordering::Acquire) {
            if let Err(e) = self.serve_one() {
                error!("{}: {e}", self.device.name);
                // A listener that fails at once would fail for ever: give the host time.
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    }

    /// Ends the connection, and [`Server::serve`].
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        // SAFETY: a plain system call on our own descriptor; a thread that waits in accept() returns with an error.
        unsafe { libc::shutdown(self.listener.as_raw_fd(), libc::SHUT_RDWR) };
        if let Some(connection) = &self.connection.lock().expect("nobody panics holding this").0 {
            connection.shutdown();
        }
    }

    fn serve_one(&self) -> std::result::Result<(), DaemonError> {
        let name = &self.device.name;
        let copy = self.listener.try_clone().map_err(DaemonError::StartDaemon)?;
        let backend = Backend::new(&self.device, &self.workers, self.queue_size);
        let memory = Memory::new(GuestRam::new());
        let (daemon, rings) =
            making_rings_for(&self.workers, || VhostUserDaemon::new(format!("vhost {name}"), backend, memory));
        let mut daemon = daemon?;
        if let Err(e) = daemon.start(&mut Listener::from(copy)) {
            return if self.stopped.load(Ordering::Acquire) { Ok(()) } else { Err(e) };
        }
        info!("{name}: a front-end is attached");
        *self.connection.lock().expect("nobody panics holding this") = Connection(daemon.shutdown_handle());
        if self.stopped.load(Ordering::Acquire) {
            daemon.request_shutdown();
        }
        let ended = daemon.wait();
        *self.connection.lock().expect("nobody panics holding this") = Connection(None);
        for ring in &rings {
            ring.close();
        }
        self.workers.set_memory(&Arc::new(GuestRam::new()));
        self.detached(ended);
        Ok(())
    }

    /// What the guest wrote goes to the image now: it may be gone for good.
    fn detached(&self, ended: std::result::Result<(), DaemonError>) {
        let name = &self.device.name;
        match ended {
            Ok(()) | Err(DaemonError::HandleRequest(VhostUserError::Disconnected | VhostUserError::PartialMessage)) => {
                info!("{name}: the front-end is detached");
            }
            Err(e) => warn!("{name}: the front-end is detached: {e}"),
        }
        if let Err(fault) = self.workers.flush() {
            error!("{name}: not everything could be written to the image: {fault:?}; it is tried again");
        }
    }
}
