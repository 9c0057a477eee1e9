//! Changes by clients: the methods that act on a device, and the path from a call to its replies. A change runs on a
//! separate thread of the host, so that the connection notices immediately if its client disconnects.

use std::cell::Cell;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use super::wire::{
    AttachParameters, ByteExtent, DetachParameters, DeviceParameters, DropParameters, FreezeParameters,
    ReloadParameters, ResizeParameters, SetParameters, ThawParameters, WarmParameters,
};

/// Bounds of the duration of a freeze, and its default, in milliseconds.
const FREEZE_MS: std::ops::RangeInclusive<u32> = 1..=60_000;
const FREEZE_MS_DEFAULT: u32 = 10_000;

/// A change with valid parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Make all completed writes durable.
    Flush {
        /// The device.
        device: String,
    },
    /// Evict clean pages; if `flushed`, write dirty ones and evict them too.
    Drop {
        /// The device.
        device: String,
        /// Whether dirty pages are written first.
        flushed: bool,
    },
    /// Read extents into the cache.
    Warm {
        /// The device.
        device: String,
        /// The extents; without them, the whole disk.
        extents: Option<Vec<ByteExtent>>,
        /// Most bytes of the extents that are read in.
        bytes_max: Option<u64>,
        /// Most bytes per second.
        bytes_per_second: Option<u64>,
    },
    /// List the extents in memory. This changes nothing.
    Resident {
        /// The device.
        device: String,
    },
    /// Change the size of the image, or serve it at its present size.
    Resize {
        /// The device.
        device: String,
        /// The size that the image is to have.
        bytes: Option<u64>,
        /// Whether it may become smaller.
        shrink: bool,
    },
    /// Retry failed operations.
    Resume {
        /// The device.
        device: String,
    },
    /// Make all completed writes durable, and do not change the image until the thaw.
    Freeze {
        /// The device.
        device: String,
        /// The freeze ends by itself after this time.
        timeout_ms: u32,
        /// Whether reads wait too.
        reads: bool,
    },
    /// End a freeze.
    Thaw {
        /// The device.
        device: String,
        /// The number of the freeze; `None`: any freeze.
        lease: Option<u64>,
    },
    /// Serve one more device.
    Attach {
        /// The keys of its table, an object.
        config: Value,
    },
    /// Change keys of a device that may change while it is served.
    Set {
        /// The device.
        device: String,
        /// The keys with their values, an object.
        config: Value,
    },
    /// Reload the configuration file.
    Reload {
        /// Whether to report the changes without making them.
        dry_run: bool,
    },
    /// Write everything and stop serving the device.
    Detach {
        /// The device.
        device: String,
        /// Whether to detach it even while a front-end is connected, or if dirty pages cannot be written.
        force: bool,
        /// Whether to discard dirty pages of a volatile cache that cannot be written.
        discard: bool,
    },
}

/// Methods that take long and change nothing: every client that can connect may call them.
pub(super) const READ_ONLY_METHODS: [&str; 1] = ["Resident"];

/// Why a call is not a valid change.
#[derive(Debug)]
pub(super) enum InvalidCall {
    /// There is no such method.
    Unknown,
    /// This parameter is invalid.
    Invalid(String),
}

impl Change {
    /// The change that a method of the interface requests; the error names an invalid parameter.
    pub(super) fn of<'a>(method: &str, given: &'a Value) -> Result<Self, InvalidCall> {
        fn read<T: serde::de::DeserializeOwned>(given: &Value) -> Result<T, InvalidCall> {
            super::wire::read_parameters(given).map_err(InvalidCall::Invalid)
        }
        let device = |given: &'a Value| read::<DeviceParameters>(given).map(|parameters| parameters.device);
        Ok(match method {
            "Flush" => Self::Flush { device: device(given)? },
            "Drop" => {
                let DropParameters { device, flushed } = read(given)?;
                Self::Drop { device, flushed: flushed.unwrap_or(false) }
            }
            "Resize" => {
                let ResizeParameters { device, bytes, shrink } = read(given)?;
                Self::Resize { device, bytes, shrink: shrink.unwrap_or(false) }
            }
            "Warm" => {
                let WarmParameters { device, extents, bytes_max, bytes_per_second } = read(given)?;
                if bytes_per_second == Some(0) {
                    return Err(InvalidCall::Invalid("bytes_per_second".to_owned()));
                }
                Self::Warm { device, extents, bytes_max, bytes_per_second }
            }
            "Resident" => Self::Resident { device: device(given)? },
            "Resume" => Self::Resume { device: device(given)? },
            "Freeze" => {
                let FreezeParameters { device, timeout_ms, reads } = read(given)?;
                let timeout_ms = timeout_ms.unwrap_or(FREEZE_MS_DEFAULT);
                if !FREEZE_MS.contains(&timeout_ms) {
                    return Err(InvalidCall::Invalid("timeout_ms".to_owned()));
                }
                Self::Freeze { device, timeout_ms, reads: reads.unwrap_or(false) }
            }
            "Thaw" => {
                let ThawParameters { device, lease } = read(given)?;
                Self::Thaw { device, lease }
            }
            "Attach" => Self::Attach { config: read::<AttachParameters>(given)?.config },
            "Set" => {
                let SetParameters { device, config } = read(given)?;
                Self::Set { device, config }
            }
            "Reload" => Self::Reload { dry_run: read::<ReloadParameters>(given)?.dry_run.unwrap_or(false) },
            "Detach" => {
                let DetachParameters { device, force, discard } = read(given)?;
                Self::Detach { device, force: force.unwrap_or(false), discard: discard.unwrap_or(false) }
            }
            _ => return Err(InvalidCall::Unknown),
        })
    }
}

/// An error of the interface.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    /// Its name, without the interface.
    pub error: &'static str,
    /// Its parameters.
    pub parameters: Value,
}

impl Refusal {
    /// The error `error` with these parameters.
    pub fn new(error: &'static str, parameters: Value) -> Self {
        Self { error, parameters }
    }

    /// The request cannot be carried out, for a reason that has no error of its own.
    pub fn refused(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::new("Refused", json!({ "what": what.into(), "why": why.into() }))
    }

    /// The daemon is shutting down.
    pub fn shutting_down() -> Self {
        Self::refused("the daemon", "it is shutting down")
    }

    /// The reason, for the log.
    pub fn reason(&self) -> String {
        let text = |key: &str| self.parameters[key].as_str().unwrap_or_default();
        match self.error {
            "InUse" => format!("in use by {}", text("by")),
            "Refused" => text("why").to_owned(),
            "ImageFault" => format!("the image failed ({})", text("fault")),
            "NotWritten" => format!("dirty data cannot be written to the image ({})", text("fault")),
            error => format!("{error} {}", self.parameters),
        }
    }
}

/// A reply to a change.
#[derive(Debug)]
pub(super) enum ChangeReply {
    /// Another reply follows; only for a client that accepts more than one.
    More(Value),
    /// The last reply.
    Last(Result<Value, Refusal>),
}

/// The connection's end of a change that has begun. Dropping it signals to the change that its client has disconnected.
#[derive(Debug)]
pub struct BegunChange {
    pub(super) steps: Receiver<ChangeReply>,
    _client: Sender<()>,
}

/// The change's end: its client.
#[derive(Debug)]
pub struct ChangeClient {
    steps: Sender<ChangeReply>,
    disconnected: Receiver<()>,
    accepts_progress: bool,
    stall_max: Cell<Option<Duration>>,
}

impl ChangeClient {
    /// Both ends of a change. `accepts_progress`: the client accepts more than one reply.
    pub fn of_change(accepts_progress: bool) -> (BegunChange, Self) {
        let ((steps, receiver), (client, disconnected)) = (channel(), channel());
        let change = Self { steps, disconnected, accepts_progress, stall_max: Cell::default() };
        (BegunChange { steps: receiver, _client: client }, change)
    }

    /// Makes the change stop waiting for an image that completes nothing for this time.
    pub fn set_stall_max(&self, time: Duration) {
        self.stall_max.set(Some(time));
    }

    /// How long the change waits for an image that completes nothing; `None`: without limit.
    pub fn stall_max(&self) -> Option<Duration> {
        self.stall_max.get()
    }

    /// Whether the client accepts more than one reply.
    pub fn accepts_progress(&self) -> bool {
        self.accepts_progress
    }

    /// Sends a reply before the last one, if the client accepts it.
    pub fn send_progress(&self, results: &impl Serialize) {
        if self.accepts_progress {
            // It fails if the client has disconnected.
            let _ = self.steps.send(ChangeReply::More(super::wire::value(results)));
        }
    }

    /// Sends the last reply.
    pub fn end(self, result: Result<Value, Refusal>) {
        // As above.
        let _ = self.steps.send(ChangeReply::Last(result));
    }

    /// Waits for this time; returns early with `true` if the client has disconnected.
    pub fn wait_disconnected(&self, time: Duration) -> bool {
        self.disconnected.recv_timeout(time) == Err(RecvTimeoutError::Disconnected)
    }
}
