//! What the queues of one export share: its name, what its server promised, and what became of its connections.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use log::{info, warn};

use super::connect::{Connection, LastServer, connect};
use super::suspects::{BreakId, Suspects};
use super::wire::{Export, export_flag};
use crate::nbd_uri::NbdUri;
use crate::store::options::NbdOptions;
use crate::store::wake::WakeFd;
use crate::units::counted;

/// How long a server may take to negotiate.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(10);
/// Pauses between attempts to connect again.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How often the log says that a server is away.
const REMIND: Duration = Duration::from_secs(60);
/// After a timeout the network may still hold requests: they are feared this many times as long.
const TIMEOUT_FACTOR: u32 = 6;

/// See the module.
#[derive(Debug)]
pub(super) struct Remote {
    pub uri: NbdUri,
    /// Log lines begin with it.
    pub label: String,
    /// What the server promised when the image was opened.
    pub promised: Export,
    pub read_only: bool,
    pub io_max: u32,
    pub options: NbdOptions,
    pub suspects: Arc<Suspects>,
    opened: Instant,
    breaks: AtomicU64,
    /// A change was submitted on any connection.
    has_changed: AtomicBool,
    /// A connection that no queue uses.
    idle: Mutex<Option<Connection>>,
}

/// The eventfd that wakes a queue's worker, with a flag that saves the worker the system call that finds it silent.
#[derive(Clone, Debug)]
pub(super) struct Notifier {
    wake: WakeFd,
    /// Set after the descriptor was made readable: a worker that sees it too late is woken once more.
    is_notified: Arc<AtomicBool>,
}

impl Notifier {
    pub fn new() -> io::Result<Self> {
        Ok(Self { wake: WakeFd::new()?, is_notified: Arc::default() })
    }

    pub fn notify(&self) {
        self.wake.notify();
        self.is_notified.store(true, Ordering::Release);
    }

    /// Makes the descriptor unreadable, if it was readable.
    pub fn clear(&self) {
        if self.is_notified.swap(false, Ordering::AcqRel) {
            self.wake.clear();
        }
    }
}

impl AsRawFd for Notifier {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// How an attempt to connect again has ended.
#[derive(Debug)]
pub(super) enum Attempt {
    /// There is a connection. `is_server_new`: the last server's process has ended.
    Connected { connection: Connection, is_server_new: bool },
    /// There will be none, for this reason.
    Gone(String),
}

/// The thread that connects again. It is started before the worker is confined, which may make no socket.
#[derive(Debug)]
pub(super) struct Connector {
    breaks: Option<Sender<Break>>,
    attempts: Receiver<Attempt>,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

/// A connection that has broken.
#[derive(Debug)]
pub(super) struct Break {
    pub connection: Connection,
    /// How long to wait before the first attempt.
    pub pause: Duration,
    pub since: Instant,
}

impl Connector {
    /// Starts the thread, which notifies `wake` of each result.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn start(remote: &Arc<Remote>, wake: Notifier) -> io::Result<Self> {
        let ((breaks, receiver), (sender, attempts)) = (channel::<Break>(), channel());
        let stop = Arc::new(AtomicBool::new(false));
        let (remote, is_stopped) = (Arc::clone(remote), Arc::clone(&stop));
        let run = move || {
            for Break { connection, pause, since } in receiver {
                let last = connection.break_up();
                let Some(attempt) = remote.connect_again(&last, pause, since, &is_stopped) else { return };
                if sender.send(attempt).is_err() {
                    return;
                }
                wake.notify();
            }
        };
        let thread = thread::Builder::new().name("nbd connect".to_owned()).spawn(run)?;
        Ok(Self { breaks: Some(breaks), attempts, stop, thread: Some(thread) })
    }

    /// Replaces a connection; returns whether the thread does it.
    pub fn replace(&self, broken: Break) -> bool {
        self.breaks.as_ref().is_some_and(|breaks| breaks.send(broken).is_ok())
    }

    /// The result, once there is one.
    pub fn result(&self) -> Option<Attempt> {
        self.attempts.try_recv().ok()
    }
}

impl Drop for Connector {
    /// Does not wait: the thread ends by itself, after an attempt that is under way.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.breaks = None;
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
        }
    }
}

impl Remote {
    pub fn new(
        uri: NbdUri,
        label: String,
        connection: Connection,
        read_only: bool,
        io_max: u32,
        options: NbdOptions,
    ) -> Self {
        Self {
            uri,
            label,
            promised: connection.export,
            read_only,
            io_max,
            options,
            suspects: Arc::default(),
            opened: Instant::now(),
            breaks: AtomicU64::new(0),
            has_changed: AtomicBool::new(false),
            idle: Mutex::new(Some(connection)),
        }
    }

    /// Connects for the first time. Blocks.
    ///
    /// # Errors
    /// As [`connect`].
    pub fn first_connection(uri: &NbdUri) -> io::Result<Connection> {
        connect(uri, HANDSHAKE_PATIENCE)
    }

    /// The time since the image was opened.
    pub fn now(&self) -> Duration {
        self.opened.elapsed()
    }

    /// A connection for one more queue. Blocks.
    ///
    /// # Errors
    /// As [`connect`], and [`io::ErrorKind::InvalidData`] for an export that lacks what was promised.
    pub fn take_connection(&self) -> io::Result<Connection> {
        let idle = self.idle.lock().expect("no thread panics with the connection locked").take();
        if let Some(connection) = idle.filter(|connection| !is_readable(connection)) {
            return Ok(connection);
        }
        let mut connection = connect(&self.uri, HANDSHAKE_PATIENCE)?;
        connection.may_have_lost = self.has_changed.load(Ordering::Acquire);
        self.check(&connection.export).map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))?;
        Ok(connection)
    }

    /// Keeps a connection for the next queue.
    pub fn put_back(&self, connection: Connection) {
        *self.idle.lock().expect("no thread panics with the connection locked") = Some(connection);
    }

    /// Notes that the image is being changed.
    pub fn note_change(&self) {
        if !self.has_changed.load(Ordering::Relaxed) {
            self.has_changed.store(true, Ordering::Release);
        }
    }

    /// A name for a connection that has broken, and until when its requests are feared.
    pub fn note_break(&self, error: &io::Error) -> (BreakId, Duration) {
        let timed_out = [libc::ETIMEDOUT, libc::EHOSTUNREACH, libc::ENETUNREACH, libc::EHOSTDOWN];
        let is_timeout = error.raw_os_error().is_some_and(|errno| timed_out.contains(&errno));
        let factor = if is_timeout { TIMEOUT_FACTOR } else { 1 };
        (self.breaks.fetch_add(1, Ordering::AcqRel) + 1, self.now() + self.options.quarantine * factor)
    }

    /// An earlier daemon died while it changed the image: its requests are feared, wherever they were.
    pub fn fear_earlier_writes(&self) {
        let now = self.now();
        self.suspects.add(0..self.promised.size_bytes, now + self.options.quarantine, 0, now);
    }

    /// Checks that an export has what was promised when the image was opened.
    ///
    /// # Errors
    /// What it lacks.
    fn check(&self, found: &Export) -> Result<(), String> {
        let promised = &self.promised;
        let lost = |flag: u16| promised.has(flag) && !found.has(flag);
        let (size, was) = (found.size_bytes, promised.size_bytes);
        if size < was {
            return Err(format!("the export has shrunk from {was} to {size} bytes"));
        }
        if size > was {
            info!("{}: the export has grown from {was} to {size} bytes; it is served with its old size", self.label);
        }
        let what = if lost(export_flag::SEND_FLUSH) {
            "FLUSH"
        } else if lost(export_flag::SEND_TRIM) {
            "TRIM"
        } else if promised.can_zero() && !found.can_zero() {
            "WRITE_ZEROES"
        } else if lost(export_flag::CAN_MULTI_CONN) {
            "multi-conn"
        } else if promised.allocation.is_some() && found.allocation.is_none() {
            "base:allocation"
        } else if found.block_min > promised.block_min || found.block_max < self.io_max {
            "its block sizes"
        } else if found.has(export_flag::READ_ONLY) && !self.read_only {
            "permission to write"
        } else {
            return Ok(());
        };
        Err(format!("the export has lost {what}, on which its guest relies"))
    }

    /// Connects again after `pause`, in as many attempts as it takes; `None` once `stop` is set.
    fn connect_again(
        &self,
        last: &LastServer,
        mut pause: Duration,
        down_since: Instant,
        stop: &AtomicBool,
    ) -> Option<Attempt> {
        let mut reminded: Option<Instant> = None;
        loop {
            let until = Instant::now() + pause;
            while Instant::now() < until && !stop.load(Ordering::Acquire) {
                thread::park_timeout(until.saturating_duration_since(Instant::now()));
            }
            if stop.load(Ordering::Acquire) {
                return None;
            }
            let error = match connect(&self.uri, HANDSHAKE_PATIENCE) {
                Ok(connection) => {
                    let connection = Connection { may_have_lost: true, ..connection };
                    return Some(match self.check(&connection.export) {
                        Ok(()) => Attempt::Connected { connection, is_server_new: last.has_ended() },
                        Err(why) => Attempt::Gone(why),
                    });
                }
                Err(error) => error,
            };
            let away = down_since.elapsed();
            if self.options.give_up.is_some_and(|limit| away >= limit) {
                let seconds = counted(away.as_secs(), "second");
                return Some(Attempt::Gone(format!("the server was away for {seconds} ({error})")));
            }
            if away >= PAUSE_MAX && reminded.is_none_or(|at| at.elapsed() >= REMIND) {
                warn!("{}: cannot connect for {} s: {error}; trying on", self.label, away.as_secs());
                reminded = Some(Instant::now());
            }
            pause = (pause * 2).clamp(PAUSE_MIN, PAUSE_MAX);
        }
    }

    /// The pause before the first attempt, after a connection that has lasted so long: a server that breaks every
    /// connection at once is not called without end.
    pub fn pause_after(lasted: Duration, last_pause: Duration) -> Duration {
        if lasted >= PAUSE_MAX { Duration::ZERO } else { (last_pause * 2).clamp(PAUSE_MIN, PAUSE_MAX) }
    }
}

/// Whether a connection that should be silent is not: it has broken.
fn is_readable(connection: &Connection) -> bool {
    crate::sys::poll::wait_readable(connection.socket.as_raw_fd(), Duration::ZERO)
}
