//! Messages on a varlink connection: each is a JSON object and a NUL.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest message in bytes.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// One end of a connection.
#[derive(Debug)]
pub struct VarlinkConnection {
    stream: UnixStream,
    /// Bytes that were received and belong to messages that were not returned yet.
    received: Vec<u8>,
}

impl VarlinkConnection {
    /// Sends and receives messages on `stream`.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, received: Vec::new() }
    }

    /// The stream, for its options.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Receives a message; `None` if the other end has closed the connection between two of them.
    ///
    /// # Errors
    /// Those of read(2); [`io::ErrorKind::InvalidData`] if it is no JSON of this type, or too long;
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
            if searched > MESSAGE_BYTES_MAX {
                let why = format!("a message is longer than {MESSAGE_BYTES_MAX} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk)? {
                0 if searched == 0 => return Ok(None),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => self.received.extend_from_slice(&chunk[..count]),
            }
        }
    }

    /// Sends a message.
    ///
    /// # Errors
    /// Those of write(2).
    pub fn send(&mut self, message: &impl Serialize) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(message)?;
        bytes.push(0);
        self.stream.write_all(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pair() -> (UnixStream, VarlinkConnection) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, VarlinkConnection::new(theirs))
    }

    #[test]
    fn messages_arrive_one_by_one_however_they_are_cut() {
        let (mut raw, mut connection) = pair();
        raw.write_all(b"{\"a\":1}\0{\"b\"").unwrap();
        assert_eq!(connection.receive::<Value>().unwrap(), Some(json!({"a": 1})));
        raw.write_all(b":2}\0").unwrap();
        assert_eq!(connection.receive::<Value>().unwrap(), Some(json!({"b": 2})));
        drop(raw);
        assert_eq!(connection.receive::<Value>().unwrap(), None);
    }

    #[test]
    fn a_message_that_is_no_json_or_never_ends_is_an_error() {
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
}
