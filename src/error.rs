//! The daemon's error type: a stable kind to match on, a context in words, and the cause.

use std::error::Error as StdError;
use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

/// The kind of an error: coarse enough to stay stable, and fine enough to act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorKind {
    /// The configuration or the command line is wrong (exit status 2).
    Config,
    /// The image is missing, of a wrong type or size, or could not be opened.
    Image,
    /// Another process holds the image's lock.
    Locked,
    /// The socket could not be bound, or a running daemon owns it.
    Socket,
    /// Memory for the cache is not available.
    Memory,
    /// The cache file of a previous daemon cannot be read, or does not belong to the image.
    Ledger,
    /// An operating-system facility (eventfd, epoll, io_uring, thread) failed.
    System,
    /// The front-end violated the vhost-user protocol.
    Protocol,
    /// A running daemon refused the request of a command.
    Control,
    /// No daemon listens on the control socket (exit status 3).
    NoDaemon,
}

/// Result of the daemon's own operations.
pub type Result<T> = std::result::Result<T, Error>;

/// An error with its context.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    context: String,
    cause: Option<io::Error>,
}

impl Error {
    /// An error of `kind`; `context` describes the failure and names the object.
    pub fn new(kind: ErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), cause: None }
    }

    /// An error with the operating system's reason as its cause.
    pub fn io(kind: ErrorKind, context: impl Into<String>, cause: io::Error) -> Self {
        Self { kind, context: context.into(), cause: Some(cause) }
    }

    /// The error with advice at the end of its text.
    #[must_use]
    pub fn with_hint(self, hint: &str) -> Self {
        let context = format!("{self}; {hint}");
        Self { kind: self.kind, context, cause: None }
    }

    /// The kind of the error.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether the host lacked resources: a descriptor, memory, or a readable disk. The object may be fine.
    pub fn is_lack_of_resources(&self) -> bool {
        const ERRNOS: [i32; 4] = [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EIO];
        self.cause.as_ref().and_then(io::Error::raw_os_error).is_some_and(|errno| ERRNOS.contains(&errno))
    }

    /// Whether the operation failed for lack of permission.
    pub fn is_lack_of_rights(&self) -> bool {
        let refused = |cause: &io::Error| matches!(cause.raw_os_error(), Some(libc::EACCES | libc::EPERM));
        self.cause.as_ref().is_none_or(refused)
    }

    /// The process's exit status for this error: 2 for a wrong configuration, 1 for everything else.
    pub fn exit_status(&self) -> u8 {
        match self.kind {
            ErrorKind::Config => 2,
            ErrorKind::NoDaemon => 3,
            _ => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cause {
            Some(cause) => write!(f, "{}: {cause}", self.context),
            None => f.write_str(&self.context),
        }
    }
}

/// The text ends with its cause, so [`StdError::source`] stays `None`: a reporter that walks the chain prints it once.
impl StdError for Error {}
