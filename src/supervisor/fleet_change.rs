//! What the operator asks of the main thread.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use crate::config::{Config, DeviceConfig};
use crate::control::change::Refusal;

/// Where to send the result of a change.
pub(super) type Requester = Sender<Result<bool, Refusal>>;

/// What the operator asks of the main thread.
#[derive(Debug)]
pub(super) enum FleetChange {
    /// Serve one more device. The reply: whether it is new.
    Attach(Box<DeviceConfig>, Recorded, Requester),
    /// Write everything and serve the device no more. `cancels`: only if it is still being attached.
    Detach { name: String, cancels: bool, discards: bool, record: Recorded, requester: Requester },
    /// Give up what the image of a device that is being detached does not take. The reply: whether there is one.
    /// The second requester gets the result of the detach.
    Discard(String, Requester, Requester),
    /// Put these keys of a device in force, which its process is told next.
    Set(Box<DeviceConfig>, Vec<&'static str>, Recorded, Requester),
    /// Record for the next daemon that this device is kept, though the files have it no more.
    Keep(String, Requester),
    /// The devices that a daemon with these files serves, and what is in force now; or why it could not.
    Compare(Box<Config>, Sender<Result<FleetPlan, Refusal>>),
}

/// Whether a change is recorded for the next daemon. One that the files say already is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recorded {
    Runtime,
    Files,
}

/// What is to be served, and what is.
#[derive(Debug)]
pub(super) struct FleetPlan {
    pub wanted: Vec<DeviceConfig>,
    /// Keys that were set, whose values in the files differ, by device.
    pub overridden: Vec<(String, Vec<&'static str>)>,
    pub in_force: Vec<Arc<DeviceConfig>>,
}
