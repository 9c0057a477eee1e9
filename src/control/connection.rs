//! Messages on a varlink connection: each is a JSON object followed by a NUL.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest message in bytes, unless the receiver accepts longer ones.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// One end of a connection.
#[derive(Debug)]
pub struct VarlinkConnection {
    stream: UnixStream,
    /// Received bytes of messages that were not returned yet.
    received: Vec<u8>,
    /// Longest message that is accepted, in bytes.
    bytes_max: usize,
    /// Deadline of every send and receive.
    until: Option<Instant>,
}

impl VarlinkConnection {
    /// Sends and receives messages on `stream`.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, received: Vec::new(), bytes_max: MESSAGE_BYTES_MAX, until: None }
    }

    /// Accepts messages up to this length.
    #[must_use]
    pub fn with_longest_message(self, bytes: usize) -> Self {
        Self { bytes_max: bytes, ..self }
    }

    /// Makes every call end at `until`, whatever the other end does.
    #[must_use]
    pub fn with_deadline(self, until: Instant) -> Self {
        Self { until: Some(until), ..self }
    }

    /// From now on, every call ends at `until`, whatever the other end does; `None`: there is no deadline.
    ///
    /// # Errors
    /// Errors of setsockopt(2).
    pub fn set_deadline(&mut self, until: Option<Instant>) -> io::Result<()> {
        self.until = until;
        self.stream.set_read_timeout(None)?;
        self.stream.set_write_timeout(None)
    }

    /// Bounds how long the next system call may wait, if there is a deadline.
    fn bound_next_call(&self) -> io::Result<()> {
        let Some(until) = self.until else { return Ok(()) };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.set_write_timeout(Some(left))
    }

    /// The stream, for its options.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Receives a message; `None` if the other end has closed the connection between two messages.
    ///
    /// # Errors
    /// Errors of read(2); [`io::ErrorKind::InvalidData`] if the message is not JSON of this type, or too long;
    /// [`io::ErrorKind::UnexpectedEof`] if the connection ends within a message.
    pub fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.received[searched..].iter().position(|byte| *byte == 0) {
                let message: Vec<u8> = self.received.drain(..=searched + end).collect();
                let object = &message[..message.len() - 1];
                return serde_json::from_slice(object)
                    .map(Some)
                    .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e));
            }
            searched = self.received.len();
            if searched > self.bytes_max {
                let why = format!("a message is longer than {} bytes", self.bytes_max);
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
            let mut chunk = [0; 4096];
            self.bound_next_call()?;
            match self.stream.read(&mut chunk)? {
                0 if searched == 0 => return Ok(None),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => self.received.extend_from_slice(&chunk[..count]),
            }
        }
    }

    /// Whether the other end has closed the connection. Does not wait. Messages that arrived stay for
    /// [`VarlinkConnection::receive`].
    pub fn has_ended(&mut self) -> bool {
        let mut chunk = [0; 4096];
        if self.received.len() > MESSAGE_BYTES_MAX || self.stream.set_nonblocking(true).is_err() {
            return false;
        }
        let read = self.stream.read(&mut chunk);
        let is_blocking = self.stream.set_nonblocking(false).is_ok();
        match read {
            Ok(0) => true,
            Ok(count) => {
                self.received.extend_from_slice(&chunk[..count]);
                !is_blocking
            }
            Err(e) => !is_blocking || !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        }
    }

    /// Sends a message.
    ///
    /// # Errors
    /// Errors of write(2).
    pub fn send(&mut self, message: &impl Serialize) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(message)?;
        bytes.push(0);
        self.bound_next_call()?;
        self.stream.write_all(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;

    fn pair() -> (UnixStream, VarlinkConnection) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, VarlinkConnection::new(theirs))
    }

    #[test]
    fn messages_arrive_one_by_one_however_the_stream_is_split() {
        let (mut raw, mut connection) = pair();
        raw.write_all(b"{\"a\":1}\0{\"b\"").unwrap();
        assert_eq!(connection.receive::<Value>().unwrap(), Some(json!({"a": 1})));
        raw.write_all(b":2}\0").unwrap();
        assert_eq!(connection.receive::<Value>().unwrap(), Some(json!({"b": 2})));
        drop(raw);
        assert_eq!(connection.receive::<Value>().unwrap(), None);
    }

    #[test]
    fn invalid_json_and_endless_messages_are_errors() {
        let (mut raw, mut connection) = pair();
        raw.write_all(b"hello\0").unwrap();
        assert_eq!(connection.receive::<Value>().unwrap_err().kind(), io::ErrorKind::InvalidData);
        raw.write_all(b"{\"half\"").unwrap();
        drop(raw);
        assert_eq!(connection.receive::<Value>().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let (mut raw, mut connection) = pair();
        let sender = std::thread::spawn(move || raw.write_all(&vec![b' '; 2 * MESSAGE_BYTES_MAX]));
        assert_eq!(connection.receive::<Value>().unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(connection);
        let _ = sender.join().unwrap();
    }

    #[test]
    fn a_message_sent_byte_by_byte_still_times_out() {
        let (mut raw, connection) = pair();
        let until = Instant::now() + Duration::from_millis(50);
        let sender = std::thread::spawn(move || {
            while raw.write_all(b" ").is_ok() {
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let mut connection = connection.with_deadline(until);
        let kind = connection.receive::<Value>().unwrap_err().kind();
        assert!(matches!(kind, io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock), "{kind}");
        assert!(Instant::now() >= until);
        drop(connection);
        sender.join().unwrap();
    }

    #[test]
    fn a_receiver_can_raise_its_message_limit() {
        let (mut raw, connection) = pair();
        let text = "x".repeat(2 * MESSAGE_BYTES_MAX);
        let message = serde_json::to_vec(&text).unwrap();
        let sender = std::thread::spawn(move || raw.write_all(&[message, vec![0]].concat()));
        let received = connection.with_longest_message(4 * MESSAGE_BYTES_MAX).receive::<String>();
        assert!(received.unwrap().is_some_and(|received| received == text));
        sender.join().unwrap().unwrap();
    }
}
