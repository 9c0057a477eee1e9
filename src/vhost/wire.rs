//! vhost-user messages on the wire: a header of three 32-bit words, a payload, and attached file descriptors.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::MAX_MSG_SIZE;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::sys::socket::receive_with_files;

/// Time limit for the rest of a message to arrive, and for the other end to accept a sent message.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of a header: request, flags, size of the payload.
const HEADER_BYTES: usize = 12;
/// Most descriptors with a message: a memory table has one for each of at most 32 regions.
const FILES_MAX: usize = vhost::vhost_user::message::MAX_ATTACHED_FD_ENTRIES;
/// Protocol version 1 with the reply flag.
const REPLY_FLAGS: u32 = 1 | 1 << 2;
/// The sender requests a reply to a message that has none of its own (REPLY_ACK).
const NEED_REPLY: u32 = 1 << 3;

/// A message, in either direction.
#[derive(Debug)]
pub(super) struct Message {
    pub request: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
    pub files: Vec<File>,
}

impl Message {
    /// A reply to `request`.
    pub fn reply(request: u32, payload: Vec<u8>, files: Vec<File>) -> Self {
        Self { request, flags: REPLY_FLAGS, payload, files }
    }

    /// Whether the sender requests an acknowledgement.
    pub fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// The 64-bit field at byte `at` of the payload, if the payload is that long.
    pub fn u64_at(&self, at: usize) -> Option<u64> {
        Some(u64::from_le_bytes(self.payload.get(at..at + 8)?.try_into().expect("eight bytes")))
    }

    /// Receives a message; `None` if the other end closed the connection between two messages.
    ///
    /// # Errors
    /// The socket's error; [`io::ErrorKind::InvalidData`] for a message longer than the protocol allows;
    /// [`io::ErrorKind::TimedOut`] if the rest of a message does not arrive in time.
    pub fn receive(socket: &UnixStream) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER_BYTES];
        let (got, files) = receive_with_files::<FILES_MAX>(socket, &mut header)?;
        if got == 0 {
            return Ok(None);
        }
        let deadline = Instant::now() + TIMEOUT;
        receive_rest(socket, &mut header[got..], deadline)?;
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let size = word(8) as usize;
        if size > MAX_MSG_SIZE {
            let why = format!("a message of {size} bytes is longer than the protocol allows");
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        let mut payload = vec![0; size];
        receive_rest(socket, &mut payload, deadline)?;
        Ok(Some(Self { request: word(0), flags: word(4), payload, files }))
    }

    /// Sends the message with its descriptors.
    ///
    /// # Errors
    /// The socket's error, for example if the other end accepts no data for [`TIMEOUT`].
    pub fn send(&self, mut socket: &UnixStream) -> io::Result<()> {
        socket.set_write_timeout(Some(TIMEOUT))?;
        let size = u32::try_from(self.payload.len()).expect("a payload is below 4 KiB");
        let words = [self.request, self.flags, size];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).chain(self.payload.clone()).collect();
        let fds: Vec<RawFd> = self.files.iter().map(AsRawFd::as_raw_fd).collect();
        let sent = socket.send_with_fds(&[&bytes[..]], &fds)?;
        io::Write::write_all(&mut socket, &bytes[sent..])
    }
}

/// Fills `bytes` before the deadline.
fn receive_rest(mut socket: &UnixStream, mut bytes: &mut [u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the peer stalled within a message"));
        }
        socket.set_read_timeout(Some(left))?;
        match socket.read(bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => bytes = &mut bytes[got..],
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
