//! What clients may change: the methods that act on a device, and the way from a call to its replies. A change runs on
//! a thread of the host's, so that a connection notices at once that its client has hung up.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use super::wire::{
    AttachParameters, DetachParameters, DeviceParameters, DropParameters, FreezeParameters, ReloadParameters,
    ResizeParameters, SetParameters, ThawParameters,
};

/// Bounds of the time of a freeze, and what it is unless given, in milliseconds.
const FREEZE_MS: std::ops::RangeInclusive<u32> = 1..=60_000;
const FREEZE_MS_DEFAULT: u32 = 10_000;

/// A change whose parameters are right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Make everything durable that has completed.
    Flush {
        /// The device.
        device: String,
    },
    /// Evict clean pages; those that are dirty too, after they were written, if `flushed`.
    Drop {
        /// The device.
        device: String,
        /// Whether dirty pages are written first.
        flushed: bool,
    },
    /// Grow the image, or serve it at its present size.
    Resize {
        /// The device.
        device: String,
        /// The size that the image is to have.
        bytes: Option<u64>,
    },
    /// Retry what failed.
    Resume {
        /// The device.
        device: String,
    },
    /// Make everything durable that has completed, and leave the image alone.
    Freeze {
        /// The device.
        device: String,
        /// It ends by itself after this time.
        timeout_ms: u32,
        /// Whether reads wait, too.
        reads: bool,
    },
    /// End a freeze.
    Thaw {
        /// The device.
        device: String,
        /// The number of the freeze; without it, of whichever there is.
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
    /// Read the configuration file again.
    Reload {
        /// Whether to say only what it would change.
        dry_run: bool,
    },
    /// Write everything and serve the device no more.
    Detach {
        /// The device.
        device: String,
        /// Whether to do it while a front-end is connected, and if the image does not take what is dirty.
        force: bool,
        /// Whether to lose dirty pages that the image does not take, of a cache that ends with its process.
        discard: bool,
    },
}

/// Why a call does not name a change that can be made.
#[derive(Debug)]
pub(super) enum InvalidCall {
    /// There is no such method.
    Unknown,
    /// This parameter is wrong.
    Invalid(String),
}

impl Change {
    /// The change that a method of the interface asks for; `read` reads its parameters, or names the one that is wrong.
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
                let ResizeParameters { device, bytes } = read(given)?;
                Self::Resize { device, bytes }
            }
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

    /// What was asked cannot be done, for a reason that no other error tells.
    pub fn refused(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self::new("Refused", json!({ "what": what.into(), "why": why.into() }))
    }
}

/// A reply to a change.
#[derive(Debug)]
pub(super) enum ChangeReply {
    /// Others follow; only for a client that takes more than one.
    More(Value),
    /// The last one.
    Last(Result<Value, Refusal>),
}

/// The connection's end of a change that was begun. Dropping it tells the change that its client has hung up.
#[derive(Debug)]
pub struct BegunChange {
    pub(super) steps: Receiver<ChangeReply>,
    _client: Sender<()>,
}

/// The change's end: its client.
#[derive(Debug)]
pub struct ChangeClient {
    steps: Sender<ChangeReply>,
    hung_up: Receiver<()>,
    accepts_progress: bool,
}

impl ChangeClient {
    /// Both ends of a change. `accepts_progress`: the client takes more than one reply.
    pub fn of_change(accepts_progress: bool) -> (BegunChange, Self) {
        let ((steps, receiver), (client, hung_up)) = (channel(), channel());
        (BegunChange { steps: receiver, _client: client }, Self { steps, hung_up, accepts_progress })
    }

    /// Whether the client takes more than one reply.
    pub fn accepts_progress(&self) -> bool {
        self.accepts_progress
    }

    /// Sends a reply before the last one, to a client that takes it.
    pub fn send_progress(&self, results: &impl Serialize) {
        if self.accepts_progress {
            // A client that has hung up needs none.
            let _ = self.steps.send(ChangeReply::More(super::wire::value(results)));
        }
    }

    /// Sends the last reply.
    pub fn end(self, result: Result<Value, Refusal>) {
        // As above.
        let _ = self.steps.send(ChangeReply::Last(result));
    }

    /// Waits for this time; returns early with `true` if the client has hung up.
    pub fn has_hung_up_within(&self, time: Duration) -> bool {
        self.hung_up.recv_timeout(time) == Err(RecvTimeoutError::Disconnected)
    }
}
