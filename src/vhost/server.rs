//! A device's socket. It serves one front-end after another, each with a new `VhostUserDaemon` and new guest memory:
//! neither can be used for a second connection.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use log::{error, info, warn};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::Memory;
use super::backend::Backend;
use super::relay::{Ended, NewOwner, Relay};
use super::socketpair;
use super::vring::{Session, with_vring_factory};
use crate::device::Device;
use crate::device::control::Workers;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::poll::wait_any_readable;
use crate::sys::process::name_of;
use crate::sys::socket::peer;
use crate::virtio::GuestRam;

/// Serves a device's socket until [`Server::stop`].
#[derive(Debug)]
pub struct Server {
    device: Arc<Device>,
    workers: Arc<Workers>,
    queue_size: u16,
    listener: UnixListener,
    stopped: AtomicBool,
    /// Readable once `stopped` is set; ends the poll for a message or a front-end.
    stop: EventFd,
}

impl Server {
    /// A server on a listening socket; [`Server::serve`] runs it.
    ///
    /// # Errors
    /// [`ErrorKind::System`] if eventfd(2) or fcntl(2) fails.
    pub fn new(device: Arc<Device>, workers: Arc<Workers>, queue_size: u16, listener: UnixListener) -> Result<Self> {
        let system = |e| Error::io(ErrorKind::System, "cannot prepare the socket", e);
        let stop = EventFd::new(EFD_CLOEXEC).map_err(system)?;
        // Another process may share the listener and accept the connection first.
        listener.set_nonblocking(true).map_err(system)?;
        Ok(Self { device, workers, queue_size, listener, stopped: AtomicBool::new(false), stop })
    }

    /// Serves front-ends until [`Server::stop`]; when it returns, no ring runs.
    pub fn serve(&self) {
        while !self.stopped.load(Ordering::Acquire) {
            if let Err(e) = self.serve_one() {
                error!("{}: {e}", self.device.name);
                // accept(2) may fail again at once, for example for lack of descriptors: do not spin.
                std::thread::sleep(std::time::Duration::from_millis(100));
            }
        }
    }

    /// Ends the connection, and [`Server::serve`].
    ///
    /// => The connection closes only after every vring has completed the requests it took: the front-end reads the used
    ///    index at that moment, and resumes there with the next daemon.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        // The counter is never read, and one write cannot overflow it.
        let _ = self.stop.write(1);
    }

    /// Waits for a front-end and serves it until it disconnects.
    fn serve_one(&self) -> io::Result<()> {
        let [stop, _] = wait_any_readable([&self.stop, &self.listener])?;
        if stop {
            // A front-end in the backlog waits for the next daemon, which may inherit the listener.
            return Ok(());
        }
        let front_end = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e),
        };
        info!("{}: front-end connected: {}", self.device.name, describe_peer(&front_end));
        let mut owner = None;
        let ended = loop {
            let ended = self.session(&front_end, owner.take());
            self.workers.set_memory(&Arc::new(GuestRam::default()));
            match ended {
                Ok(Ended::NewOwner(next)) => {
                    info!("{}: the front-end begins anew on its connection", self.device.name);
                    // As at a disconnection: the guest of before may not return.
                    self.workers.start_flush();
                    owner = Some(next);
                }
                Ok(Ended::Disconnected) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        drop(front_end);
        self.on_disconnect(ended);
        Ok(())
    }

    /// Runs a session: a `VhostUserDaemon` and the relay to it. When it returns, no ring runs. `owner`: the front-end has
    /// begun anew with this.
    fn session(&self, front_end: &UnixStream, owner: Option<NewOwner>) -> io::Result<Ended> {
        let (listener, backend_end) = socketpair::private_listener()?;
        let session = Session::new(&self.device, &self.workers);
        let backend = Backend::new(&session, self.queue_size);
        let name = format!("vhost {}", self.device.name);
        let memory = Memory::new(GuestMemoryMmap::new());
        let (daemon, rings) = with_vring_factory(&session, || VhostUserDaemon::new(name, backend, memory));
        let mut daemon = daemon.map_err(|e| daemon_error(&e))?;
        daemon.start(&mut Listener::from(listener)).map_err(|e| daemon_error(&e))?;
        let mut relay = Relay::new(front_end, backend_end, &self.stop, &session.inflight, &rings);
        let relayed = owner.map_or(Ok(()), |owner| relay.begin_anew(owner)).and_then(|()| relay.run());
        let served = daemon.wait();
        for ring in &rings {
            ring.close();
        }
        let ended = relayed?;
        match served {
            Err(DaemonError::HandleRequest(VhostUserError::Disconnected | VhostUserError::PartialMessage)) => Ok(ended),
            served => served.map_err(|e| daemon_error(&e)).map(|()| ended),
        }
    }

    /// Starts writing back what the guest wrote, since it may not return. [`Server::stop`]'s caller flushes by itself.
    /// The next front-end does not wait for the flush, which takes long if the image fails.
    fn on_disconnect(&self, ended: io::Result<()>) {
        let name = &self.device.name;
        match ended {
            Err(e) if !is_disconnect(&e) => warn!("{name}: front-end disconnected: {e}"),
            _ => info!("{name}: front-end disconnected"),
        }
        if !self.stopped.load(Ordering::Acquire) {
            self.workers.start_flush();
        }
    }
}

/// The process and the user that a connection comes from, for the log.
fn describe_peer(front_end: &UnixStream) -> String {
    let Ok(peer) = peer(front_end) else { return "unknown process".to_owned() };
    let user = format!("uid {}", peer.uid);
    match name_of(peer.pid) {
        Some(name) => format!("pid {} ({name}), {user}", peer.pid),
        None if peer.pid == 0 => format!("process of another PID namespace, {user}"),
        None => format!("pid {}, {user}", peer.pid),
    }
}

/// Whether a socket's error only says that the other end has closed or died.
fn is_disconnect(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// An error of vhost-user-backend as an I/O error.
fn daemon_error(error: &DaemonError) -> io::Error {
    io::Error::other(error.to_string())
}
