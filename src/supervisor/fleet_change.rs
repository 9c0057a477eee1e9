//! Requests of the operator's threads to the main thread.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use crate::config::{Config, DeviceConfig};
use crate::control::change::Refusal;

/// Where to send the result of a change.
pub(super) type Requester = Sender<Result<bool, Refusal>>;

/// A request to the main thread.
#[derive(Debug)]
pub(super) enum FleetChange {
    /// Serve one more device. The reply: whether it is new.
    Attach(Box<DeviceConfig>, Recorded, Requester),
    /// Write everything and stop serving the device. `cancels`: only if it is still being attached.
    Detach { name: String, cancels: bool, discards: bool, record: Recorded, requester: Requester },
    /// Discard the dirty pages that the image of a device that is being detached does not accept. The reply: whether
    /// the device is being detached. The second requester gets the result of the detach.
    Discard(String, Requester, Requester),
    /// Change these keys of a device's current configuration. The requester sends them to its process afterwards.
    Set(Box<DeviceConfig>, Vec<&'static str>, Recorded, Requester),
    /// Record for the next daemon that this device is kept although the files no longer list it.
    Keep(String, Requester),
    /// The devices that a daemon with these files would serve, and the current ones; or why the files are invalid.
    Compare(Box<Config>, Sender<Result<FleetPlan, Refusal>>),
}

/// Whether a change is recorded for the next daemon. A change that the files already contain is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recorded {
    Runtime,
    Files,
}

/// The devices to be served, and those that are served.
#[derive(Debug)]
pub(super) struct FleetPlan {
    pub wanted: Vec<DeviceConfig>,
    /// How commands override the files, by device: see [`crate::config::RuntimeConfig::overridden`].
    pub overridden: Vec<(String, Vec<&'static str>)>,
    pub current: Vec<Arc<DeviceConfig>>,
}
