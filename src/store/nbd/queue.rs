//! One worker's queue on an export: a client, and the socket of its connection.
//!
//! The wake fd is an epoll descriptor over the socket, a timer (ends of quarantines, checks of the peer), an eventfd
//! for events that are already available, and, while there is no connection, the socket of the connector. Nothing here
//! waits: all calls on the sockets are non-blocking.

use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{error, info, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::client::Client;
use super::connect::Connection;
use super::connector::Reconnector;
use super::notifier::Notifier;
use super::receive::LOOK_AHEAD;
use super::remote::{Remote, is_timeout};
use super::server::ServerAttempt;
use super::silence::Silence;
use super::slot::Violation;
use super::suspects::BreakId;
use super::wire::{command, request};
use crate::store::{DRAIN_MAX, Event, IoRequest, Limits, Refused, Segment, StoreQueue, wait_until_drained};
use crate::sys::stream;
use crate::units::counted;

/// Size of the buffer for received bytes that are not data of reads.
const STAGING_BYTES: usize = 256 << 10;
const _: () = assert!(STAGING_BYTES >= LOOK_AHEAD);
/// Most pieces of memory of one recvmsg(2), without the staging.
const PIECES_MAX: usize = 256;
/// Most calls of recvmsg(2) in one turn, so that a server that sends endlessly does not block the worker.
const RECEIVES_MAX: usize = 64;
/// How often to check the peer of a TCP connection while operations are in flight.
const PEER_CHECK: Duration = Duration::from_secs(1);

/// See the documentation of the module.
pub(super) struct NbdQueue {
    limits: Limits,
    remote: Arc<Remote>,
    client: Client,
    epoll: Epoll,
    wake: Notifier,
    timer: TimerFd,
    timer_at: Option<Duration>,
    /// When to check next whether the peer of a TCP connection is dead.
    check_at: Option<Duration>,
    /// `None` for other connections.
    silence: Option<Silence>,
    connection: Option<Connection>,
    /// Establishes new connections. Without one, the first connection that breaks is the last one.
    reconnector: Option<Reconnector>,
    /// A connection was requested from the reconnector, and the epoll descriptor watches it.
    is_connecting: bool,
    /// When the last connection broke, and the ID of the break; `None` before the first one.
    last_break: Option<(Instant, BreakId)>,
    /// The socket's epoll entry includes writability.
    watches_writable: bool,
    staging: Box<[u8]>,
    /// The part of the staging buffer that was not taken yet.
    staged: std::ops::Range<usize>,
    pieces: Vec<Segment>,
    drained: bool,
    /// Lives as long as the queue, so that queues can be counted.
    counted: Option<Arc<()>>,
}

impl NbdQueue {
    /// A queue on `connection`, which gets further connections from `reconnector`.
    ///
    /// # Errors
    /// Errors of epoll_create(2), timerfd_create(2) and eventfd(2).
    pub fn new(
        remote: Arc<Remote>,
        limits: Limits,
        connection: Option<Connection>,
        reconnector: Option<Reconnector>,
    ) -> io::Result<Self> {
        let wake = Notifier::new()?;
        let client = Client::new(remote.promised, &remote.shared, Some(wake.clone()));
        let mut queue = Self {
            limits,
            client,
            epoll: Epoll::new()?,
            wake,
            timer: TimerFd::new().map_err(|e| io::Error::from_raw_os_error(e.errno()))?,
            timer_at: None,
            check_at: None,
            silence: None,
            connection: None,
            reconnector,
            is_connecting: false,
            last_break: None,
            watches_writable: false,
            staging: vec![0; STAGING_BYTES].into_boxed_slice(),
            staged: 0..0,
            pieces: Vec::new(),
            drained: false,
            counted: None,
            remote,
        };
        for fd in [queue.wake.as_raw_fd(), queue.timer.as_raw_fd()] {
            queue.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        }
        match connection {
            Some(connection) => queue.use_connection(connection)?,
            None => queue.request_connection(Duration::ZERO),
        }
        Ok(queue)
    }

    /// Counts the queue, by a clone of `count` that it keeps.
    pub fn counted_in(mut self, count: &Arc<()>) -> Self {
        self.counted = Some(Arc::clone(count));
        self
    }

    pub fn remote(&self) -> &Remote {
        &self.remote
    }

    /// Gives up the operations in flight. Their memory is no longer accessed once the queue is dropped.
    pub fn abandon(&mut self) {
        self.drained = true;
    }

    /// The queue's connection, if nothing is in flight on it.
    pub fn into_connection(mut self) -> Option<Connection> {
        if self.client.in_flight() > 0 {
            return None;
        }
        let may_have_lost = self.remote.shared.losses.is_untold();
        self.connection.take().map(|connection| Connection { may_have_lost, ..connection })
    }

    fn use_connection(&mut self, connection: Connection) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, 0);
        self.epoll.ctl(ControlOperation::Add, connection.socket.as_raw_fd(), event)?;
        (self.watches_writable, self.staged) = (false, 0..0);
        self.silence = stream::acknowledgement(&connection.socket).map(|_| Silence::default());
        self.client.connected(&connection.export, connection.may_have_lost, self.remote.now());
        self.connection = Some(connection);
        Ok(())
    }

    /// Sends as many bytes as the socket accepts.
    fn send(&mut self) -> io::Result<()> {
        let Some(connection) = &self.connection else { return Ok(()) };
        let socket = connection.socket.as_raw_fd();
        while self.client.has_output() {
            self.client.output(&mut self.pieces);
            // SAFETY: the pieces are headers and memory of operations in flight, which the client owns; it does not
            // change before the call returns.
            match unsafe { stream::send(socket, &self.pieces) } {
                Ok(count) => self.client.sent(count),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return self.watch_writable(true),
                Err(e) => return Err(e),
            }
        }
        self.watch_writable(false)
    }

    fn watch_writable(&mut self, watch: bool) -> io::Result<()> {
        if let Some(connection) = &self.connection
            && watch != mem::replace(&mut self.watches_writable, watch)
        {
            let events = if watch { EventSet::IN | EventSet::OUT } else { EventSet::IN };
            let event = EpollEvent::new(events, 0);
            self.epoll.ctl(ControlOperation::Modify, connection.socket.as_raw_fd(), event)?;
        }
        Ok(())
    }

    /// Receives the bytes that have arrived.
    fn receive(&mut self) -> io::Result<()> {
        let Some(connection) = &self.connection else { return Ok(()) };
        let socket = connection.socket.as_raw_fd();
        for _ in 0..RECEIVES_MAX {
            self.take_staged()?;
            // The remaining bytes are the start of a header.
            self.staging.copy_within(self.staged.clone(), 0);
            self.staged = 0..self.staged.len();
            self.client.data_target(PIECES_MAX, &mut self.pieces);
            let direct: usize = self.pieces.iter().map(|piece| piece.len).sum();
            let space = &mut self.staging[self.staged.end..];
            self.pieces.push(Segment { base: space.as_mut_ptr(), len: space.len() });
            let asked = direct + space.len();
            // SAFETY: the pieces are memory of a read in flight, which the client owns, and the queue's own buffer.
            let count = match unsafe { stream::receive(socket, &self.pieces) } {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            };
            let in_place = count.min(direct);
            if in_place > 0 {
                self.client.data_received(in_place as u64, self.remote.now()).map_err(broken)?;
            }
            self.staged.end += count - in_place;
            if count < asked {
                // No more bytes have arrived.
                return self.take_staged();
            }
        }
        // The descriptor stays readable: the rest comes in the next turn.
        Ok(())
    }

    /// Passes the staged bytes to the client.
    fn take_staged(&mut self) -> io::Result<()> {
        while !self.staged.is_empty() {
            let now = self.remote.now();
            let taken = self.client.receive(&self.staging[self.staged.clone()], now).map_err(broken)?;
            self.staged.start += taken;
            if taken == 0 {
                return Ok(());
            }
        }
        self.staged = 0..0;
        Ok(())
    }

    /// Sends and receives; a connection that breaks meanwhile is replaced.
    fn exchange(&mut self) {
        if self.client.is_obsolete() {
            self.hang_up(&io::Error::other("another connection to it broke"));
        }
        if let Err(e) = self.send().and_then(|()| self.receive()).and_then(|()| self.send()) {
            self.hang_up(&e);
        }
    }

    fn hang_up(&mut self, error: &io::Error) {
        let Some(connection) = self.connection.take() else { return };
        let _ = self.epoll.ctl(ControlOperation::Delete, connection.socket.as_raw_fd(), EpollEvent::default());
        let label = &self.remote.label;
        let why = match error.kind() {
            io::ErrorKind::UnexpectedEof => "the server has closed it".to_owned(),
            _ => error.to_string(),
        };
        warn!("{label}: connection lost ({why}); reconnecting");
        let timed_out = self.remote.shared.losses.is_timeout(self.client.is_obsolete(), is_timeout(error));
        let (cause, quarantine) = self.remote.record_break(timed_out);
        self.last_break = Some((Instant::now(), cause));
        // Closed before another one is requested: some servers accept one connection at a time.
        drop(connection);
        self.client.disconnected(cause, quarantine, self.remote.now());
        self.request_connection(quarantine);
    }

    /// Requests another connection; see [`Reconnector::request_connection`].
    fn request_connection(&mut self, quarantine: Duration) {
        let Some(reconnector) = &self.reconnector else {
            self.client.close();
            return self.wake.notify();
        };
        let event = EpollEvent::new(EventSet::IN, 0);
        let watch = || self.epoll.ctl(ControlOperation::Add, reconnector.as_raw_fd(), event);
        match reconnector.request_connection(quarantine).and_then(|()| watch()) {
            Ok(()) => self.is_connecting = true,
            // The next daemon repeats the operations in flight.
            Err(e) => {
                error!("{}: the supervisor has ended ({e}); requests wait for the next daemon", self.remote.label);
            }
        }
    }

    /// Checks whether there is a connection again.
    fn poll_connection(&mut self) {
        let Some(reconnector) = &self.reconnector else { return };
        let reply = match reconnector.take_reply() {
            Ok(None) => return,
            Ok(Some(attempt)) => Ok(attempt),
            Err(e) => Err(e),
        };
        self.is_connecting = false;
        let _ = self.epoll.ctl(ControlOperation::Delete, reconnector.as_raw_fd(), EpollEvent::default());
        let label = self.remote.label.clone();
        match reply {
            Ok(ServerAttempt::Connected { connection, is_server_new }) => {
                self.connected_again(connection, is_server_new);
            }
            Ok(ServerAttempt::Gone(why)) => {
                error!("{label}: {why}; all I/O fails until the daemon is restarted");
                self.client.close();
            }
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                error!("{label}: the supervisor has ended; requests wait for the next daemon");
            }
            Err(e) => {
                warn!("{label}: the new connection failed before use ({e}); reconnecting");
                self.request_connection(Duration::ZERO);
            }
        }
    }

    fn connected_again(&mut self, connection: Connection, is_server_new: bool) {
        let label = self.remote.label.clone();
        if let Some((since, cause)) = self.last_break {
            let (away, open) = (since.elapsed().as_secs_f32(), self.client.unanswered() as u64);
            info!("{label}: reconnected after {away:.1} s; repeating {}", counted(open, "operation"));
            if is_server_new {
                // The process that had received the requests has ended, with all its threads.
                self.remote.shared.suspects.release(cause);
            }
        }
        let may_have_lost = self.last_break.is_some() || self.remote.has_changed();
        if let Err(e) = self.use_connection(Connection { may_have_lost, ..connection }) {
            error!("{label}: cannot watch the connection: {e}");
            self.client.close();
        }
    }

    /// Ends a TCP connection whose peer is dead.
    fn check_peer(&mut self) {
        let (Some(connection), Some(silence)) = (&self.connection, &mut self.silence) else { return };
        let now = self.remote.now();
        if stream::acknowledgement(&connection.socket).is_some_and(|state| silence.is_dead(&state, now)) {
            self.hang_up(&io::Error::from_raw_os_error(libc::ETIMEDOUT));
        }
    }

    /// Arms the timer for the end of the next quarantine, and for the next check of the peer.
    fn set_timer(&mut self) {
        if self.silence.is_some() && self.check_at.is_none() && self.client.in_flight() > 0 {
            self.check_at = Some(self.remote.now() + PEER_CHECK);
        }
        let deadline = self.client.deadline().into_iter().chain(self.check_at).min();
        if deadline != self.timer_at {
            let result = match deadline {
                Some(at) => {
                    let left = at.saturating_sub(self.remote.now()).max(Duration::from_millis(1));
                    self.timer.reset(left, None)
                }
                None => self.timer.clear(),
            };
            debug_assert!(result.is_ok(), "{result:?}");
            self.timer_at = deadline;
        }
    }
}

fn broken(violation: Violation) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, violation.0)
}

impl StoreQueue for NbdQueue {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn wake_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    fn submit(&mut self, request: IoRequest) -> Result<(), Refused> {
        if !self.limits.admissible(&request) {
            return Err(Refused::Invalid(request));
        }
        if self.client.in_flight() >= usize::from(self.limits.depth) {
            return Err(Refused::Full(request));
        }
        if request.op.is_change() {
            self.remote.mark_changed();
        }
        self.client.submit(request, self.remote.now());
        if self.client.has_events() {
            self.wake.notify();
        }
        Ok(())
    }

    fn kick(&mut self) {
        self.set_timer();
        if let Err(e) = self.send() {
            self.hang_up(&e);
        }
    }

    fn reap(&mut self, events: &mut Vec<Event>) {
        self.wake.clear();
        if self.timer_at.is_some_and(|at| at <= self.remote.now()) {
            // Armed again below, for the next quarantine.
            let _ = self.timer.clear();
            self.timer_at = None;
            self.client.advance(self.remote.now());
        }
        self.exchange();
        // After what has arrived: the worker may have been late.
        if self.check_at.is_some_and(|at| at <= self.remote.now()) {
            self.check_at = None;
            self.check_peer();
        }
        if self.is_connecting {
            self.poll_connection();
            self.exchange();
        }
        self.set_timer();
        self.client.take_events(events);
    }

    fn in_flight(&self) -> usize {
        self.client.in_flight()
    }

    fn drain(&mut self, timeout: Duration) -> bool {
        self.drained = true;
        wait_until_drained(self, timeout)
    }
}

impl Drop for NbdQueue {
    fn drop(&mut self) {
        if !self.drained && self.client.in_flight() > 0 && !wait_until_drained(self, DRAIN_MAX) {
            let (label, hanging) = (&self.remote.label, counted(self.client.in_flight() as u64, "operation"));
            error!("{label}: {hanging} did not complete in {} s", DRAIN_MAX.as_secs());
        }
        if let Some(connection) = &self.connection
            && !self.client.has_output()
        {
            let mut header = request(command::DISCONNECT, 0, 0, 0, 0);
            let piece = Segment { base: header.as_mut_ptr(), len: header.len() };
            // SAFETY: the piece is a local array.
            let _ = unsafe { stream::send(connection.socket.as_raw_fd(), &[piece]) };
        }
    }
}

impl fmt::Debug for NbdQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NbdQueue").field("remote", &self.remote.label).finish_non_exhaustive()
    }
}
