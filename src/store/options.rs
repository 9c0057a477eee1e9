//! How to open an image.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How operations reach the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// io_uring, or threads where the host does not allow it (a log line says so).
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
    /// Bypass the host's page cache if the file system can.
    pub direct: bool,
    /// How long to wait for another opener's lock to be released.
    pub lock_patience: Duration,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self { read_only: false, engine: IoEngine::Auto, direct: true, lock_patience: Duration::ZERO }
    }
}
