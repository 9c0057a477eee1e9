//! The data that one process of the daemon passes to another for the I/O of an image: a descriptor, and the properties
//! that were determined when the image was opened by its path.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use super::Limits;
use super::options::IoEngine;
use super::raw_record::Known;
use crate::image_id::ImageId;

/// First of the bytes that fences lock: far behind those that QEMU locks.
const IO_LOCK_BASE: u64 = 1 << 40;

/// The properties of an image that were determined when it was opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageParts {
    /// A regular file or a block device; the descriptor is an open file description of its own.
    File(FileParts),
    /// An export of an NBD server; the descriptor leads to the connector.
    Nbd(NbdParts),
}

/// The properties of a regular file or a block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileParts {
    /// Its properties and capabilities.
    pub(super) limits: Limits,
    /// Its path, for messages only.
    pub(super) path: String,
    /// The prefix of log lines about it.
    pub(super) label: String,
    pub(super) identity: ImageId,
    pub(super) data_runs: Vec<Range<u64>>,
    pub(super) is_direct: bool,
    /// Logical block size of a block device in bytes; `None` for a regular file.
    pub(super) device_block: Option<u32>,
    /// The number of a block device; `None` for a regular file.
    pub(super) device_number: Option<u64>,
    /// Whether fstat(2) on its file system never waits.
    #[serde(rename = "tells_times_at_once")]
    pub(super) is_on_local_fs: bool,
    /// Its first and last bytes, and the formats that the guest is known to have written.
    pub(super) known: Known,
    pub(super) engine: IoEngine,
    /// The record of the current tenure, if the image carries it.
    pub(super) tenure: Option<Vec<u8>>,
    /// Whether this host has that record, which the process that opened the image writes.
    #[serde(default, skip_serializing_if = "is_false")]
    pub(super) is_recorded_on_host: bool,
}

/// A message without the word means no.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
fn is_false(word: &bool) -> bool {
    !*word
}

/// The properties of an export of an NBD server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NbdParts {
    pub(super) limits: Limits,
    /// Its canonical URI, for messages only.
    pub(super) uri: String,
    /// The prefix of log lines about it.
    pub(super) label: String,
    pub(super) promised: Export,
    /// See [`super::options::NbdOptions::quarantine`].
    pub(super) quarantine_ms: u64,
    /// For how long after its next answer the server may still execute requests of an earlier process.
    pub(super) quarantined_ms: u64,
}

/// An export, as described by its server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Export {
    pub size_bytes: u64,
    /// See `nbd::wire::export_flag`.
    pub flags: u16,
    /// Offsets and lengths are multiples of this.
    pub block_min: u32,
    pub block_preferred: u32,
    /// Longest read or write.
    pub block_max: u32,
    /// Replies have chunks.
    pub is_structured: bool,
    /// The ID of the context base:allocation, if the server has it.
    pub allocation: Option<u32>,
}

/// A lock that a handed-out descriptor holds while a process or the kernel uses it. The kernel may complete operations
/// of a killed process after its end, and these still change the image and the cache's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoLock(pub(super) u64);

impl IoLock {
    /// A lock that differs from those of all other processes of the host, and from earlier ones of this process.
    pub fn unique() -> Self {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        // A host has at most 2^22 process IDs.
        Self(IO_LOCK_BASE + (u64::from(std::process::id()) << 32) + u64::from(serial))
    }
}
