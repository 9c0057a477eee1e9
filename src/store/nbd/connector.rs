//! Connections for the queues of an export that run in another process: a confined process cannot create sockets.
//!
//! The process that opened the image has a thread, the *connector*, at one end of a socket pair, and the process that
//! serves the image has the other end ([`Connector`]). A queue requests a socket pair of its own ([`Reconnector`]), at
//! which a thread establishes one connection after the other: the queue sends a request when its last connection has
//! broken, and receives the descriptor of the next one when it is established. Both threads end when the other end is
//! closed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use log::debug;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::connect::{Connection, LastServer};
use super::server::{ExportServer, ServerAttempt};
use super::wire::Export;
use crate::sys::socket::{message_pair, receive_with_files, send_with_files};

/// Longest message in bytes.
const BYTES_MAX: usize = 4096;
/// Longest text of an error in a message, in characters.
const TEXT_MAX: usize = 500;
/// Most descriptors of a message.
const FILES_MAX: usize = 3;
/// Most queues, and thus threads, of an image: more than any valid configuration needs.
const QUEUES_MAX: usize = 1024;

/// A request of the process that serves an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum ConnectorRequest {
    /// A socket pair for another queue.
    Attach,
    /// A connection to replace one that has broken, or a first one.
    Connect {
        /// For how long after the server's next answer requests on the last connection may be executed.
        quarantined_ms: u64,
    },
}

/// The reply to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum ConnectorReply {
    /// With the queue's socket, the image's lock if there is one, and a connection to this export if there is one.
    Attached { has_lock: bool, export: Option<Export>, may_have_lost: bool },
    /// With a connection to this export.
    Connected { export: Export, is_server_new: bool },
    /// There will be no connection.
    Gone { why: String },
    /// The host lacks a thread or a descriptor.
    Failed { why: String },
}

fn send<M: Serialize>(socket: &UnixStream, message: &M, files: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_with_files(socket, &serde_json::to_vec(message)?, files)
}

/// The next message; `None` at the end of the connection.
fn receive<M: DeserializeOwned>(socket: &UnixStream) -> io::Result<Option<(M, Vec<File>)>> {
    let mut bytes = [0; BYTES_MAX];
    match receive_with_files::<FILES_MAX>(socket, &mut bytes) {
        Ok((0, _)) => Ok(None),
        Ok((len, files)) => Ok(Some((serde_json::from_slice(&bytes[..len])?, files))),
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(None),
        Err(e) => Err(e),
    }
}

fn text_of(error: &impl ToString) -> String {
    error.to_string().chars().take(TEXT_MAX).collect()
}

/// Starts a connector for one process; returns that process's end.
///
/// # Errors
/// Errors of socketpair(2) and pthread_create(3).
pub(super) fn spawn(server: &Arc<ExportServer>) -> io::Result<UnixStream> {
    let (ours, theirs) = message_pair()?;
    server.begin_service();
    let server = Arc::clone(server);
    let serve = move || {
        while let Ok(Some((ConnectorRequest::Attach, _))) = receive(&ours) {
            let attached = match server.queues() {
                QUEUES_MAX.. => Err(io::Error::other("too many queues")),
                _ => attach(&server, &ours),
            };
            if let Err(e) = attached
                && send(&ours, &ConnectorReply::Failed { why: text_of(&e) }, &[]).is_err()
            {
                return;
            }
        }
    };
    thread::Builder::new().name("nbd connector".to_owned()).spawn(serve)?;
    Ok(theirs)
}

/// Starts the thread of another queue, and sends the queue its resources.
fn attach(server: &Arc<ExportServer>, requester: &UnixStream) -> io::Result<()> {
    let (ours, theirs) = message_pair()?;
    theirs.set_nonblocking(true)?;
    let mut idle = server.take_idle();
    if idle.is_some() {
        server.answered();
    }
    let last = LastServer::of(idle.as_mut());
    let (of_queue, since, count) = (Arc::clone(server), Instant::now(), server.count_queue());
    thread::Builder::new().name("nbd connect".to_owned()).spawn(move || {
        connect_queue(&of_queue, &ours, last, since);
        drop(count);
    })?;
    let reply = ConnectorReply::Attached {
        has_lock: server.lock.is_some(),
        export: idle.as_ref().map(|idle| idle.export),
        may_have_lost: idle.as_ref().is_some_and(|idle| idle.may_have_lost),
    };
    let lock = server.lock.as_ref().map(AsFd::as_fd);
    let connection = idle.as_ref().map(|idle| idle.socket.as_fd());
    let files: Vec<BorrowedFd<'_>> = [Some(theirs.as_fd()), lock, connection].into_iter().flatten().collect();
    send(requester, &reply, &files)
}

/// Body of a queue's thread.
fn connect_queue(server: &ExportServer, requester: &UnixStream, mut last: LastServer, mut since: Instant) {
    let mut pause = Duration::ZERO;
    last.confirm(requester);
    while let Ok(Some((ConnectorRequest::Connect { quarantined_ms }, _))) = receive(requester) {
        server.quarantine(Duration::from_millis(quarantined_ms));
        pause = ExportServer::pause_after(since.elapsed(), pause);
        let sent = match server.connect_again(&last, pause, requester) {
            None => return,
            Some(ServerAttempt::Gone(why)) => send(requester, &ConnectorReply::Gone { why: text_of(&why) }, &[]),
            Some(ServerAttempt::Connected { mut connection, is_server_new }) => {
                last = LastServer::of(Some(&mut connection));
                server.answered();
                let reply = ConnectorReply::Connected { export: connection.export, is_server_new };
                send(requester, &reply, &[connection.socket.as_fd()])
            }
        };
        since = Instant::now();
        if let Err(e) = sent {
            debug!("{}: cannot send a connection to the disk process: {e}", server.remote.label);
            return;
        }
        last.confirm(requester);
    }
}

/// The end of the process that serves an image.
#[derive(Debug)]
pub(super) struct Connector(Mutex<UnixStream>);

impl Connector {
    pub fn new(socket: OwnedFd) -> Self {
        Self(Mutex::new(socket.into()))
    }

    /// The resources of another queue. Does not wait for a server.
    ///
    /// # Errors
    /// [`io::ErrorKind::Other`] if the host lacks a thread or a descriptor; [`io::ErrorKind::UnexpectedEof`] if the
    /// process that connects has ended.
    pub fn attach(&self) -> io::Result<(Reconnector, Option<Connection>)> {
        let socket = self.0.lock().expect("no thread panics with the socket locked");
        send(&socket, &ConnectorRequest::Attach, &[])?;
        let (reply, files) = receive(&socket)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut files = files.into_iter().map(OwnedFd::from);
        let mut next = || files.next().ok_or(io::ErrorKind::InvalidData);
        match reply {
            ConnectorReply::Attached { has_lock, export, may_have_lost } => {
                let queue = next()?.into();
                let lock = has_lock.then(&mut next).transpose()?;
                let connection = match export {
                    Some(export) => Some(Connection { socket: next()?, export, may_have_lost, process: None }),
                    None => None,
                };
                Ok((Reconnector { socket: queue, _lock: lock }, connection))
            }
            ConnectorReply::Failed { why } | ConnectorReply::Gone { why } => Err(io::Error::other(why)),
            ConnectorReply::Connected { .. } => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// A queue's end. It holds the image's lock, because its process may outlive the one that opened the image.
#[derive(Debug)]
pub(super) struct Reconnector {
    socket: UnixStream,
    _lock: Option<OwnedFd>,
}

impl Reconnector {
    /// Requests a connection. The descriptor becomes readable when there is a reply. A server that answers again may
    /// execute requests on the last connection for `quarantine`.
    ///
    /// # Errors
    /// EPIPE if the process that connects has ended.
    pub fn request_connection(&self, quarantine: Duration) -> io::Result<()> {
        let quarantined_ms = u64::try_from(quarantine.as_millis()).unwrap_or(u64::MAX);
        send(&self.socket, &ConnectorRequest::Connect { quarantined_ms }, &[])
    }

    /// The reply, if there is one. Does not wait.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the process that connects has ended; another one if the reply is lost.
    pub fn take_reply(&self) -> io::Result<Option<ServerAttempt>> {
        let (reply, files) = match receive(&self.socket) {
            Ok(message) => message.ok_or(io::ErrorKind::UnexpectedEof)?,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(e) => return Err(e),
        };
        match (reply, files.into_iter().next()) {
            (ConnectorReply::Connected { export, is_server_new }, Some(socket)) => {
                let connection = Connection { socket: socket.into(), export, may_have_lost: false, process: None };
                Ok(Some(ServerAttempt::Connected { connection, is_server_new }))
            }
            (ConnectorReply::Gone { why }, _) => Ok(Some(ServerAttempt::Gone(why))),
            _ => Err(io::Error::other("the connector sent an unexpected reply")),
        }
    }
}

impl AsRawFd for Reconnector {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
