//! Connects to a server and negotiates, on a thread that may wait.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::handshake::{Handshake, HandshakeError};
use super::wire::Export;
use crate::nbd_uri::{NbdUri, ServerAddress};
use crate::sys::{poll, socket, stream};

/// How long after its first connection the process that listened may end because it has become a daemon.
const FORK_TIME: Duration = Duration::from_secs(1);
/// How long each address of a host is tried.
const ADDRESS_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection in the transmission phase.
#[derive(Debug)]
pub(super) struct Connection {
    pub socket: OwnedFd,
    pub export: Export,
    /// Changes that were completed on another connection may be lost, and that was not yet reported to the cache.
    pub may_have_lost: bool,
    /// The process that listens at the other end of a Unix domain socket.
    pub process: Option<OwnedFd>,
}

/// The server's process after its connection broke, if known.
#[derive(Debug)]
pub(super) struct LastServer(Option<OwnedFd>);

impl LastServer {
    /// The server of a connection.
    pub fn of(connection: Option<&mut Connection>) -> Self {
        Self(connection.and_then(|connection| connection.process.take()))
    }

    /// Forgets the process if it ends within [`FORK_TIME`] although its connection lives, and if the connection breaks
    /// earlier: `requester` is readable then. A server that becomes a daemon lives on in another process.
    pub fn confirm(&mut self, requester: &UnixStream) {
        if self.0.is_some() && (poll::wait_readable(requester.as_raw_fd(), FORK_TIME) || self.has_ended()) {
            self.0 = None;
        }
    }

    /// Whether the process is known to have ended: it no longer executes anything.
    pub fn has_ended(&self) -> bool {
        self.0.as_ref().is_some_and(|process| poll::wait_readable(process.as_raw_fd(), Duration::ZERO))
    }
}

/// A stream with a timeout.
trait TimedStream: Read + Write {
    fn set_timeouts(&self, timeout: Duration) -> io::Result<()>;
}

impl TimedStream for UnixStream {
    fn set_timeouts(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }
}

impl TimedStream for TcpStream {
    fn set_timeouts(&self, timeout: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(timeout))?;
        self.set_write_timeout(Some(timeout))
    }
}

/// Connects to an export, and negotiates for at most `timeout`. Blocks.
///
/// # Errors
/// Errors of connect(2); [`io::ErrorKind::TimedOut`]; [`io::ErrorKind::InvalidData`] if it is not an NBD server;
/// [`io::ErrorKind::ConnectionRefused`] with the server's reason if it refuses the export.
pub(super) fn connect(uri: &NbdUri, timeout: Duration) -> io::Result<Connection> {
    let (host, port) = match &uri.server {
        ServerAddress::Unix(path) => {
            let mut stream = socket::connect_to_path_without_waiting(path)?;
            let export = negotiate(&mut stream, &uri.export, timeout)?;
            let process = stream::peer_process(&stream);
            return Ok(Connection { socket: stream.into(), export, may_have_lost: false, process });
        }
        ServerAddress::Tcp(host, port) => (host.as_str(), *port),
    };
    let mut stream = connect_to_host(host, port)?;
    stream.set_nodelay(true)?;
    stream::keep_alive(&stream)?;
    // A closed connection sends no more data, even if it is closed because its process was killed.
    stream::drop_unsent_on_close(&stream);
    let export = negotiate(&mut stream, &uri.export, timeout)?;
    Ok(Connection { socket: stream.into(), export, may_have_lost: false, process: None })
}

fn connect_to_host(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, ADDRESS_TIMEOUT) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    Err(last)
}

fn negotiate(stream: &mut dyn TimedStream, export: &str, timeout: Duration) -> io::Result<Export> {
    let until = Instant::now() + timeout;
    let mut handshake = Handshake::new(export);
    while let Some(needed) = handshake.bytes_needed() {
        let mut bytes = vec![0; needed];
        let mut filled = 0;
        while filled < needed {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(no_answer(timeout));
            }
            stream.set_timeouts(left)?;
            match stream.read(&mut bytes[filled..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => filled += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(no_answer(timeout)),
                Err(e) => return Err(e),
            }
        }
        handshake.receive(&bytes).map_err(|error| match error {
            HandshakeError::Protocol(why) => io::Error::new(io::ErrorKind::InvalidData, why),
            HandshakeError::Refused(why) => io::Error::new(io::ErrorKind::ConnectionRefused, why),
        })?;
        stream.write_all(&handshake.take_output())?;
    }
    Ok(handshake.export().expect("the handshake is over"))
}

fn no_answer(timeout: Duration) -> io::Error {
    let seconds = timeout.as_secs();
    let why = format!("the server does not answer within {seconds} s (it may serve one client at a time: qemu-nbd -e)");
    io::Error::new(io::ErrorKind::TimedOut, why)
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;
    use std::process::Command;
    use std::thread;

    use super::*;

    #[test]
    fn a_server_counts_as_ended_only_if_its_process_ran_for_a_while_with_the_connection() {
        let run = |seconds: &str| {
            let child = Command::new("sleep").arg(seconds).spawn().unwrap();
            // SAFETY: the call takes integers.
            let process = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
            // SAFETY: the kernel installed a new descriptor, which nothing else owns.
            let process = unsafe { OwnedFd::from_raw_fd(i32::try_from(process).unwrap()) };
            (LastServer(Some(process)), child)
        };
        let (ours, _theirs) = UnixStream::pair().unwrap();
        // It has become a daemon.
        let (mut last, mut child) = run("0.2");
        last.confirm(&ours);
        child.wait().unwrap();
        assert!(!last.has_ended());
        let (mut last, mut child) = run("600");
        last.confirm(&ours);
        assert!(!last.has_ended());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(last.has_ended());
        // The connection breaks at once.
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut last, mut child) = run("600");
        let breaks = thread::spawn(move || drop(theirs));
        last.confirm(&ours);
        breaks.join().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!last.has_ended());
    }
}
