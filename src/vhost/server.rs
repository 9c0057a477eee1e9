//! A device's socket: one front-end after the other, each with a fresh daemon of the crate's and fresh guest memory.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use log::{error, info, warn};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::Memory;
use super::backend::Backend;
use super::relay::{Relay, readable};
use super::socketpair;
use super::vring::{Session, with_vring_factory};
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
            // Its daemon has taken it away just now.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
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
    /// The same as a descriptor, readable once that is so, for who waits for a message or a front-end.
    stop: EventFd,
}

impl Server {
    /// A server that does not serve yet.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the host refuses a descriptor.
    pub fn new(device: Arc<Device>, workers: Arc<Workers>, queue_size: u16, listener: UnixListener) -> Result<Self> {
        let system = |e| Error::io(ErrorKind::System, "cannot make a socket ready", e);
        let stop = EventFd::new(EFD_CLOEXEC).map_err(system)?;
        // Somebody else may listen on it too, and be faster.
        listener.set_nonblocking(true).map_err(system)?;
        Ok(Self { device, workers, queue_size, listener, stopped: AtomicBool::new(false), stop })
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
    ///
    /// => The front-end is hung up on when every ring has answered what it took, not before: it looks at the used rings then,
    ///    to tell the next daemon where to go on.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        // Nobody reads it, and it does not overflow.
        let _ = self.stop.write(1);
    }

    /// Waits for a front-end and serves it until it hangs up.
    fn serve_one(&self) -> io::Result<()> {
        let [stop, _] = readable([&self.stop, &self.listener])?;
        if stop {
            // Whoever waits here is for the next daemon, if that gets the listener.
            return Ok(());
        }
        let front_end = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e),
        };
        info!("{}: a front-end is attached", self.device.name);
        let ended = self.session(&front_end);
        drop(front_end);
        self.workers.set_memory(&Arc::new(GuestRam::default()));
        self.detached(ended);
        Ok(())
    }

    /// A session: a daemon of the crate's, and the relay to it. When it returns, no ring runs.
    fn session(&self, front_end: &UnixStream) -> io::Result<()> {
        let (listener, backend_end) = socketpair::private_listener()?;
        let session = Session::new(&self.device, &self.workers);
        let backend = Backend::new(&session, self.queue_size);
        let name = format!("vhost {}", self.device.name);
        let memory = Memory::new(GuestMemoryMmap::new());
        let (daemon, rings) = with_vring_factory(&session, || VhostUserDaemon::new(name, backend, memory));
        let mut daemon = daemon.map_err(|e| refused(&e))?;
        daemon.start(&mut Listener::from(listener)).map_err(|e| refused(&e))?;
        let relayed = Relay::new(front_end, backend_end, &self.stop, &session.inflight).run();
        let served = daemon.wait();
        for ring in &rings {
            ring.close();
        }
        relayed?;
        match served {
            Err(DaemonError::HandleRequest(VhostUserError::Disconnected | VhostUserError::PartialMessage)) => Ok(()),
            served => served.map_err(|e| refused(&e)),
        }
    }

    /// What the guest wrote goes to the image now: it may be gone for good. Who stopped us sees to that himself; and the next
    /// front-end need not wait for it, which could be for long if the image fails.
    fn detached(&self, ended: io::Result<()>) {
        let name = &self.device.name;
        match ended {
            Err(e) if !hung_up(&e) => warn!("{name}: the front-end is detached: {e}"),
            _ => info!("{name}: the front-end is detached"),
        }
        if !self.stopped.load(Ordering::Acquire) {
            self.workers.start_flush();
        }
    }
}

/// Whether a socket's error is no more than the other end's sudden death.
fn hung_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// What the crate has against going on.
fn refused(error: &DaemonError) -> io::Error {
    io::Error::other(error.to_string())
}
