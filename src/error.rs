//! One error type for the daemon: a small stable kind to match on, the words of what was being done, and the cause.

use std::error::Error as StdError;
use std::fmt;
use std::io;

/// What went wrong, coarse enough to stay stable and fine enough to act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The configuration or the command line is wrong (exit status 2).
    Config,
    /// The image is missing, of a wrong type or size, or could not be opened.
    Image,
    /// Another process holds the image's lock.
    Locked,
    /// The socket could not be bound, or a live daemon owns it.
    Socket,
    /// Memory for the cache could not be had.
    Memory,
    /// A ledger that a dead daemon left can't be read, or is not what it seems.
    Ledger,
    /// An operating-system facility (eventfd, epoll, io_uring, thread) failed.
    System,
    /// The front-end broke the vhost-user protocol.
    Protocol,
}

/// Result of the daemon's own operations.
pub type Result<T> = std::result::Result<T, Error>;

/// An error with its context.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    source: Option<io::Error>,
}

impl Error {
    /// An error of `kind`; `context` says what was being done, to what.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// An error with the operating system's reason.
    pub fn io(kind: ErrorKind, context: impl Into<String>, source: io::Error) -> Self {
        Self { kind, context: context.into(), source: Some(source) }
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The process's exit status for this error: 2 for a wrong configuration, 1 for everything else.
    pub fn exit_status(&self) -> u8 {
        match self.kind {
            ErrorKind::Config => 2,
            _ => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Some(source) => write!(f, "{}: {source}", self.context),
            None => f.write_str(&self.context),
        }
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_ref().map(|e| e as &(dyn StdError + 'static))
    }
}
