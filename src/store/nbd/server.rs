//! The access to a server, for the process that opened the image by its name: it establishes and checks connections.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use log::{info, warn};

use super::connect::{Connection, LastServer, connect};
use super::host_lock::HostLock;
use super::remote::Remote;
use super::suspects::{EARLIER, Suspects};
use super::wire::{Export, export_flag};
use crate::nbd_uri::NbdUri;
use crate::sys::poll::wait_readable;
use crate::units::counted;

/// How long a server may take to negotiate.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pauses between attempts to reconnect.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How often the log reports that a server is unreachable.
const REMIND: Duration = Duration::from_secs(60);

/// The result of an attempt to reconnect.
#[derive(Debug)]
pub(super) enum ServerAttempt {
    /// A connection is established. `is_server_new`: the last server's process has ended.
    Connected { connection: Connection, is_server_new: bool },
    /// There will be no connection, for this reason.
    Gone(String),
}

/// Why an export cannot be served as it is now.
#[derive(Debug)]
enum ExportChange {
    /// Data is gone.
    Shrunk(String),
    /// It lacks a property.
    Lacking(String),
}

/// See the documentation of the module.
#[derive(Debug)]
pub(super) struct ExportServer {
    pub uri: NbdUri,
    pub remote: Arc<Remote>,
    pub read_only: bool,
    pub io_max: u32,
    /// How long to try to reconnect; `None`: forever.
    pub give_up: Option<Duration>,
    pub lock: Option<HostLock>,
    /// Each thread that connects a queue has a clone, to be counted.
    queues: Arc<()>,
    /// Requests of the broken connections of the processes that serve the image.
    suspects: Suspects,
    state: Mutex<ExportServerState>,
}

#[derive(Debug)]
struct ExportServerState {
    /// A connection that no queue uses.
    idle: Option<Connection>,
    /// A process serves the image, or has served it.
    has_served: bool,
}

impl ExportServer {
    /// The server of `connection`.
    pub fn new(
        uri: NbdUri,
        remote: Arc<Remote>,
        connection: Connection,
        access: (bool, u32),
        give_up: Option<Duration>,
        lock: Option<HostLock>,
    ) -> Self {
        let state = Mutex::new(ExportServerState { idle: Some(connection), has_served: false });
        let (read_only, io_max) = access;
        Self {
            uri,
            remote,
            read_only,
            io_max,
            give_up,
            lock,
            queues: Arc::default(),
            suspects: Suspects::default(),
            state,
        }
    }

    fn state(&self) -> MutexGuard<'_, ExportServerState> {
        self.state.lock().expect("no thread panics with the state locked")
    }

    /// Connects for the first time. Blocks.
    ///
    /// # Errors
    /// As [`connect`].
    pub fn first_connection(uri: &NbdUri) -> io::Result<Connection> {
        connect(uri, HANDSHAKE_TIMEOUT)
    }

    /// The idle connection, if it has not broken.
    pub fn take_idle(&self) -> Option<Connection> {
        // A connection that is readable although no reply is due has broken.
        self.state().idle.take().filter(|idle| !wait_readable(idle.socket.as_raw_fd(), Duration::ZERO))
    }

    /// A connection for one operation. Blocks. `has_changed`: changes were completed on another one.
    ///
    /// # Errors
    /// As [`connect`], and [`io::ErrorKind::InvalidData`] for an export that lacks a property that it had when the
    /// image was opened.
    pub fn take_connection(&self, has_changed: bool) -> io::Result<Connection> {
        if let Some(idle) = self.take_idle() {
            return Ok(idle);
        }
        let connection = connect(&self.uri, HANDSHAKE_TIMEOUT)?;
        self.check(&connection.export).map_err(|(ExportChange::Shrunk(why) | ExportChange::Lacking(why))| {
            io::Error::new(io::ErrorKind::InvalidData, why)
        })?;
        Ok(Connection { may_have_lost: has_changed, ..connection })
    }

    /// Keeps a connection for the next use.
    pub fn put_back(&self, connection: Connection) {
        self.state().idle = Some(connection);
    }

    /// A value that counts as a queue while it lives.
    pub fn count_queue(&self) -> Arc<()> {
        Arc::clone(&self.queues)
    }

    /// Number of queues.
    pub fn queues(&self) -> usize {
        Arc::strong_count(&self.queues) - 1
    }

    /// A process will serve the image.
    pub fn begin_service(&self) {
        self.state().has_served = true;
    }

    /// The server may execute requests of an earlier process.
    ///
    /// => What it had answered while that process ran does not show that it answers now, so no earlier connection is
    /// used.
    pub fn quarantine_earlier_writes(&self) {
        let mut state = self.state();
        if state.has_served {
            state.idle = None;
        }
        drop(state);
        self.remote.quarantine_earlier_writes(self.remote.quarantine);
    }

    /// A process has lost a connection; for this long after the server's next answer its requests may be executed.
    pub fn quarantine(&self, for_how_long: Duration) {
        self.suspects.add(0..u64::MAX, for_how_long, EARLIER, self.remote.now());
    }

    /// The server has answered.
    pub fn answered(&self) {
        for suspects in [&self.suspects, &*self.remote.shared.suspects] {
            suspects.answered(EARLIER, self.remote.now());
        }
    }

    /// For how long after the server's next answer it may execute requests of earlier processes.
    pub fn quarantined_for(&self) -> Duration {
        self.suspects.longest(self.remote.now()).max(self.remote.quarantined_for())
    }

    /// Checks that an export still has the properties that it had when the image was opened, as far as they are needed.
    ///
    /// # Errors
    /// What has changed.
    fn check(&self, found: &Export) -> Result<(), ExportChange> {
        let promised = &self.remote.promised;
        let lost = |flag: u16| promised.has(flag) && !found.has(flag);
        let (size, was) = (found.size_bytes, promised.size_bytes);
        if size < was {
            return Err(ExportChange::Shrunk(format!("the export has shrunk from {was} to {size} bytes")));
        }
        if size > was {
            let label = &self.remote.label;
            info!("{label}: the export has grown from {was} to {size} bytes; it is served with its old size");
        }
        let what = if lost(export_flag::SEND_FLUSH) {
            "FLUSH"
        } else if lost(export_flag::SEND_TRIM) {
            "TRIM"
        } else if promised.can_zero() && !found.can_zero() {
            "WRITE_ZEROES"
        } else if lost(export_flag::CAN_MULTI_CONN) && self.queues() > 1 && !self.read_only {
            "multi-conn"
        } else if found.block_min > promised.block_min || found.block_max < self.io_max {
            "its block sizes"
        } else if found.has(export_flag::READ_ONLY) && !self.read_only {
            "permission to write"
        } else {
            return Ok(());
        };
        Err(ExportChange::Lacking(format!("the export has lost {what}, on which its guest relies")))
    }

    /// Reconnects after `pause`, with as many attempts as needed; `None` once the other end of `requester` is closed.
    pub fn connect_again(
        &self,
        last: &LastServer,
        mut pause: Duration,
        requester: &UnixStream,
    ) -> Option<ServerAttempt> {
        let (down_since, mut reminded) = (Instant::now(), None::<Instant>);
        loop {
            // The other end sends nothing before it has a reply, so this means that it was closed.
            if wait_readable(requester.as_raw_fd(), pause) {
                return None;
            }
            let error = match connect(&self.uri, HANDSHAKE_TIMEOUT) {
                Ok(connection) => match self.check(&connection.export) {
                    Ok(()) => {
                        return Some(ServerAttempt::Connected { connection, is_server_new: last.has_ended() });
                    }
                    Err(ExportChange::Shrunk(why)) => return Some(ServerAttempt::Gone(why)),
                    // Its operator can restart it as it was.
                    Err(ExportChange::Lacking(why)) => io::Error::new(io::ErrorKind::InvalidData, why),
                },
                Err(error) => error,
            };
            let away = down_since.elapsed();
            if self.give_up.is_some_and(|limit| away >= limit) {
                let seconds = counted(away.as_secs(), "second");
                return Some(ServerAttempt::Gone(format!("the server was away for {seconds} ({error})")));
            }
            if away >= PAUSE_MAX && reminded.is_none_or(|at| at.elapsed() >= REMIND) {
                let label = &self.remote.label;
                warn!("{label}: cannot connect for {} s: {error}; still retrying", away.as_secs());
                reminded = Some(Instant::now());
            }
            pause = (pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
        }
    }

    /// The pause before the first attempt, after a connection that lasted this long: a server that breaks every
    /// connection immediately is not contacted in a tight loop.
    pub fn pause_after(lasted: Duration, last_pause: Duration) -> Duration {
        if lasted >= PAUSE_MAX { Duration::ZERO } else { (last_pause * 2).clamp(PAUSE_MIN, PAUSE_MAX) }
    }
}
