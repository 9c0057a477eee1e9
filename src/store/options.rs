//! How to open an image.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How operations reach the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// io_uring, or threads if the host does not allow it (which is logged).
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// A pool of threads with plain system calls.
    Threads,
}

/// How to open an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Open for reading only; any number of readers may share an image.
    pub read_only: bool,
    /// How operations reach the kernel.
    pub engine: IoEngine,
    /// Bypass the host's page cache if the file system supports that.
    pub direct: bool,
    /// How long to wait for another opener's lock to be released.
    pub lock_timeout: Duration,
    /// Options of an image on an NBD server.
    pub nbd: NbdOptions,
}

/// How to treat an NBD server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NbdOptions {
    /// A server without FLUSH has no volatile cache: its completed writes are durable.
    pub trusts_without_flush: bool,
    /// How long to try to reconnect; `None`: forever.
    pub give_up: Option<Duration>,
    /// How long a server may still execute requests of a connection that has broken.
    pub quarantine: Duration,
}

impl Default for NbdOptions {
    fn default() -> Self {
        Self { trusts_without_flush: false, give_up: None, quarantine: Duration::from_secs(5) }
    }
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            engine: IoEngine::Auto,
            direct: true,
            lock_timeout: Duration::ZERO,
            nbd: NbdOptions::default(),
        }
    }
}
