//! A device's socket. It serves one front-end after another, each with a new `VhostUserDaemon` and new guest memory:
//! neither can be used for a second connection.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use log::{error, info, warn};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::BackendMemory;
use super::backend::Backend;
use super::config_change::ConfigChange;
use super::relay::{NewOwner, Relay, RelayEnd};
use super::vring::{Session, with_vring_factory};
use crate::broker::Broker;
use crate::device::Device;
use crate::device::control::Workers;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::poll::{wait_any_readable, wait_readable};
use crate::sys::process::{Limit, describe_limit};
use crate::sys::regions::FrontEndRecords;
use crate::sys::socket::{Peer, peer};
use crate::virtio::GuestRam;

/// Serves a device's socket until [`Server::stop`].
#[derive(Debug)]
pub struct Server {
    device: Arc<Device>,
    workers: Arc<Workers>,
    queue_size: u16,
    listener: UnixListener,
    broker: Arc<Broker>,
    /// What the handler of SIGBUS records about memory that the front-end has truncated.
    bus_errors: Option<FrontEndRecords>,
    /// Devices of other front-ends may be served by this process too.
    shares_process: bool,
    stopped: AtomicBool,
    /// The last front-end's failure, if it failed.
    last_failure: Mutex<Option<FrontEndFailure>>,
    /// The connection that is served now, if there is one.
    connection: Mutex<Option<UnixStream>>,
    /// Notifies the front-end of changes of the configuration space.
    config_change: ConfigChange,
    /// Readable once `stopped` is set; ends the poll for a message or a front-end.
    stop: EventFd,
}

impl Server {
    /// A server on a listening socket; [`Server::serve`] runs it.
    ///
    /// # Errors
    /// [`ErrorKind::System`] if eventfd(2) or fcntl(2) fails.
    pub fn new(
        device: Arc<Device>,
        workers: Arc<Workers>,
        queue_size: u16,
        listener: UnixListener,
        broker: Broker,
        bus_errors: Option<FrontEndRecords>,
        shares_process: bool,
    ) -> Result<Self> {
        let system = |e| Error::io(ErrorKind::System, "cannot prepare the socket", e);
        let stop = EventFd::new(EFD_CLOEXEC).map_err(system)?;
        // Another process may share the listener and accept the connection first.
        listener.set_nonblocking(true).map_err(system)?;
        Ok(Self {
            device,
            workers,
            queue_size,
            listener,
            broker: Arc::new(broker),
            bus_errors,
            shares_process,
            stopped: AtomicBool::new(false),
            last_failure: Mutex::default(),
            connection: Mutex::default(),
            config_change: ConfigChange::default(),
            stop,
        })
    }

    /// Serves front-ends until [`Server::stop`]; no ring runs when it returns.
    pub fn serve(&self) {
        while !self.stopped.load(Ordering::Acquire) {
            if let Err(e) = self.serve_one() {
                let limit = describe_limit(Limit::Descriptors);
                error!("{}: cannot serve a front-end: {e} (RLIMIT_NOFILE is {limit})", self.device.name);
                // accept(2) may fail again immediately, for example for lack of descriptors: do not spin.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }

    /// Ends the connection, and [`Server::serve`].
    ///
    /// => The connection closes only after every vring has completed the requests that it took: the front-end then
    ///    reads the used index, and resumes there with the next daemon.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        // The counter is never read, and one write cannot overflow it.
        let _ = self.stop.write(1);
    }

    /// As [`Server::stop`], unless a front-end is connected or is connecting: then returns which one, and continues.
    ///
    /// # Errors
    /// The front-end, in words.
    pub fn stop_unless_in_use(&self) -> std::result::Result<(), String> {
        // No front-end is accepted while the connection is locked.
        let connection = self.connection();
        match connection.as_ref().map(peer) {
            Some(Ok(peer)) => return Err(format!("pid {}, uid {}", peer.pid, peer.uid)),
            Some(Err(e)) => return Err(format!("an unknown process ({e})")),
            None if wait_readable(self.listener.as_raw_fd(), Duration::ZERO) => {
                return Err("a front-end that is connecting".to_owned());
            }
            None => self.stop(),
        }
        Ok(())
    }

    /// Closes the connection in any state of the vrings: the process ends, and one of its threads may hang in the
    /// kernel and keep every descriptor open.
    pub fn force_close(&self) {
        self.stop();
        if let Some(connection) = &*self.connection() {
            // Fails if the front-end has already disconnected.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Notifies the front-end that the configuration space has changed. Does not wait.
    pub fn notify_config_change(&self) {
        self.config_change.notify();
    }

    /// Process ID and user ID of the front-end that is served while another one waits to be accepted; `None` if none
    /// waits.
    pub fn busy_with(&self) -> Option<(u32, u32)> {
        let connection = self.connection();
        let holder = peer(connection.as_ref()?).ok()?;
        wait_readable(self.listener.as_raw_fd(), Duration::ZERO).then_some((holder.pid, holder.uid))
    }

    /// The process and the user that a connection comes from, for the log.
    fn describe(&self, peer: Peer) -> String {
        let user = format!("uid {}", peer.uid);
        match self.broker.name_of(peer.pid) {
            Some(name) => format!("pid {} ({name}), {user}", peer.pid),
            None if peer.pid == 0 => format!("process of another PID namespace, {user}"),
            None => format!("pid {}, {user}", peer.pid),
        }
    }

    /// Process ID and user ID of the front-end that is served.
    pub fn front_end(&self) -> Option<(u32, u32)> {
        let front_end = peer(self.connection().as_ref()?).ok()?;
        Some((front_end.pid, front_end.uid))
    }

    fn connection(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.connection.lock().expect("no thread panics with the connection locked")
    }

    /// Waits for a front-end and serves it until it disconnects.
    fn serve_one(&self) -> io::Result<()> {
        let [stop, _] = wait_any_readable([&self.stop, &self.listener])?;
        if stop {
            // A front-end in the backlog waits for the next daemon, which may inherit the listener.
            return Ok(());
        }
        let Some(front_end) = self.accept()? else { return Ok(()) };
        let peer = peer(&front_end).unwrap_or(Peer { pid: 0, uid: u32::MAX });
        let mut connected_line = Some(format!("front-end connected: {}", self.describe(peer)));
        if self.failure_of(peer).is_none()
            && let Some(connected_line) = connected_line.take()
        {
            info!("{}: {connected_line}", self.device.name);
        }
        self.config_change.begin_session();
        let mut owner = None;
        let (ended, failed_before) = loop {
            let connected_line = connected_line.take();
            let Self { device, workers, broker, bus_errors, shares_process, .. } = self;
            let session = Session::new(device, workers, broker, *bus_errors, *shares_process, peer.pid, connected_line);
            let ended = self.session(&session, &front_end, owner.take());
            let failed_before = session.has_connected_line();
            self.workers.set_memory(&Arc::new(GuestRam::default()));
            match ended {
                Ok(RelayEnd::NewOwner(next)) => {
                    info!("{}: the front-end starts a new session on its connection", self.device.name);
                    // As at a disconnection: the previous guest may not return.
                    self.workers.start_flush();
                    owner = Some(next);
                }
                Ok(RelayEnd::Disconnected) => break (Ok(()), failed_before),
                Err(e) => break (Err(e), failed_before),
            }
        };
        *self.connection() = None;
        self.config_change.begin_session();
        drop(front_end);
        self.on_disconnect(peer, ended, failed_before);
        Ok(())
    }

    /// Accepts a front-end; `None` if none waits, or if the server has stopped.
    fn accept(&self) -> io::Result<Option<UnixStream>> {
        let mut connection = self.connection();
        if self.stopped.load(Ordering::Acquire) {
            return Ok(None);
        }
        let front_end = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e),
        };
        *connection = Some(front_end.try_clone()?);
        Ok(Some(front_end))
    }

    /// The failure of the last front-end, if it was this process. A misconfigured VMM reconnects every second: the log
    /// reports it again only when it gets further.
    fn failure_of(&self, peer: Peer) -> Option<String> {
        let last = self.last_failure.lock().expect("no thread panics with the failure locked");
        last.as_ref().filter(|failure| failure.peer == peer).map(|failure| failure.text.clone())
    }

    /// Runs a session: a `VhostUserDaemon` and the relay to it. No ring runs when it returns. `owner`: the messages
    /// with which the front-end has started a new session.
    fn session(&self, session: &Arc<Session>, front_end: &UnixStream, owner: Option<NewOwner>) -> io::Result<RelayEnd> {
        let (listener, backend_end) = self.broker.connection()?;
        let backend = Backend::new(session, self.queue_size);
        let name = format!("vhost {}", self.device.name);
        let memory = BackendMemory::new(GuestMemoryMmap::new());
        let (daemon, rings) = with_vring_factory(session, || VhostUserDaemon::new(name, backend, memory));
        let mut daemon = daemon.map_err(|e| daemon_error(&e))?;
        daemon.start(&mut Listener::from(listener)).map_err(|e| daemon_error(&e))?;
        let mut relay = Relay::new(front_end, backend_end, &self.stop, session, &rings, &self.config_change);
        let relayed = owner.map_or(Ok(()), |owner| relay.start_session(owner)).and_then(|()| relay.run());
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

    /// Starts to write back the guest's writes, because the guest may not return. The caller of [`Server::stop`]
    /// flushes itself. The next front-end does not wait for the flush, which takes long if the image fails.
    ///
    /// => `failed_before`: the last connection of this process failed, and this one got no further. Then only a
    ///    different failure is reported.
    fn on_disconnect(&self, peer: Peer, ended: io::Result<()>, failed_before: bool) {
        let name = &self.device.name;
        let failure = ended.err().filter(|e| !is_disconnect(e));
        let text = failure.as_ref().map(ToString::to_string);
        if !failed_before || text.is_some() && text != self.failure_of(peer) {
            match failure {
                Some(e) if e.kind() == io::ErrorKind::Unsupported => error!("{name}: refused pid {}: {e}", peer.pid),
                Some(e) => warn!("{name}: closed the connection of the front-end: {e}"),
                None => info!("{name}: front-end disconnected"),
            }
        }
        if text.is_some() || !failed_before {
            *self.last_failure.lock().expect("no thread panics with the failure locked") =
                text.map(|text| FrontEndFailure { peer, text });
        }
        if !self.stopped.load(Ordering::Acquire) {
            self.workers.start_flush();
        }
    }
}

/// The failure of a front-end.
#[derive(Debug)]
struct FrontEndFailure {
    peer: Peer,
    text: String,
}

/// Whether a socket's error only means that the other end has closed or died.
fn is_disconnect(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// Converts an error of vhost-user-backend to an I/O error.
fn daemon_error(error: &DaemonError) -> io::Error {
    io::Error::other(error.to_string())
}
