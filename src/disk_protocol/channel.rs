//! One end of the connection between the supervisor and a disk process.

use std::fmt;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::VERSION;
use crate::sys::socket::{message_pair, receive_with_files, send_with_files};

/// Longest message in bytes. The longest one in use contains a tenure record and a few dozen extents.
const BYTES_MAX: usize = 64 << 10;
/// Most descriptors of a message.
const FILES_MAX: usize = 8;

/// A message on the wire.
#[derive(Debug, Serialize, Deserialize)]
struct Envelope<M> {
    version: u32,
    message: M,
}

/// The version alone: nothing else can be read from another version's message.
#[derive(Debug, Deserialize)]
struct Version {
    version: u32,
}

/// One end: it sends `Out` and receives `In`.
pub struct Channel<Out, In> {
    socket: UnixStream,
    direction: PhantomData<fn(Out) -> In>,
}

impl<Out, In> fmt::Debug for Channel<Out, In> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("socket", &self.socket).finish()
    }
}

/// An event from the other end.
#[derive(Debug)]
pub enum Received<In> {
    /// A message, with its descriptors.
    Message(In, Vec<File>),
    /// The other end is closed: its process has ended.
    Closed,
}

impl<Out: Serialize, In: DeserializeOwned> Channel<Out, In> {
    /// Both ends of a new connection.
    ///
    /// # Errors
    /// Errors of socketpair(2).
    pub fn pair() -> io::Result<(Self, Channel<In, Out>)> {
        let (ours, theirs) = message_pair()?;
        Ok((Self::from_socket(ours), Channel { socket: theirs, direction: PhantomData }))
    }

    /// The end whose socket this is.
    pub fn from_socket(socket: UnixStream) -> Self {
        Self { socket, direction: PhantomData }
    }

    /// The socket, for a process that inherits it.
    pub fn into_socket(self) -> OwnedFd {
        self.socket.into()
    }

    /// Sends a message. Does not wait for the other end to read.
    ///
    /// # Errors
    /// EAGAIN if the other end has left too many messages unread, EPIPE if it is closed.
    pub fn send(&self, message: &Out, files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = encode(message)?;
        if bytes.len() > BYTES_MAX || files.len() > FILES_MAX {
            let (len, files) = (bytes.len(), files.len());
            return Err(io::Error::other(format!("a message of {len} bytes with {files} descriptors is too large")));
        }
        match send_with_files(&self.socket, &bytes, files) {
            // The other end was closed with unread messages.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Err(io::ErrorKind::BrokenPipe.into()),
            sent => sent,
        }
    }

    /// Waits for a message.
    ///
    /// # Errors
    /// Errors of recvmsg(2); [`io::ErrorKind::InvalidData`] for a message that is invalid or of another version.
    pub fn receive(&self) -> io::Result<Received<In>> {
        let mut bytes = vec![0; BYTES_MAX + 1];
        match receive_with_files::<FILES_MAX>(&self.socket, &mut bytes) {
            Ok((0, _)) => Ok(Received::Closed),
            Ok((len, _)) if len > BYTES_MAX => Err(invalid("it is too long")),
            Ok((len, files)) => Ok(Received::Message(decode(&bytes[..len])?, files)),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => Ok(Received::Closed),
            Err(e) => Err(e),
        }
    }

    /// Closes both directions of the connection.
    pub fn close(&self) {
        // It fails if the other end is already closed.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl<Out, In> AsRawFd for Channel<Out, In> {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// A message as bytes.
pub(crate) fn encode<M: Serialize>(message: &M) -> io::Result<Vec<u8>> {
    serde_json::to_vec(&Envelope { version: VERSION, message }).map_err(io::Error::other)
}

/// The message of these bytes.
pub(crate) fn decode<M: DeserializeOwned>(bytes: &[u8]) -> io::Result<M> {
    let Version { version } = serde_json::from_slice(bytes).map_err(|e| invalid(&e.to_string()))?;
    if version != VERSION {
        return Err(invalid(&format!("it has version {version}, but this process uses version {VERSION}")));
    }
    let frame: Envelope<M> = serde_json::from_slice(bytes).map_err(|e| invalid(&e.to_string()))?;
    Ok(frame.message)
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("cannot read a message between daemon and disk process: {why}"))
}
