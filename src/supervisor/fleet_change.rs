//! What the operator asks of the main thread.

use std::sync::mpsc::Sender;

use crate::config::DeviceConfig;
use crate::control::change::Refusal;

/// Who waits for the end of a change.
pub(super) type Requester = Sender<Result<bool, Refusal>>;

/// What the operator asks of the main thread.
#[derive(Debug)]
pub(super) enum FleetChange {
    /// Serve one more device. The reply: whether it is new.
    Attach(Box<DeviceConfig>, Requester),
    /// Write everything and serve the device no more.
    Detach { name: String, discards: bool, requester: Requester },
    /// Give up what the image of a device that is being detached does not take. The reply: whether there is one.
    Discard(String, Requester),
}
