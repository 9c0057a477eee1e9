//! The commands that change a device of a running daemon. Each prints one line, or the daemon's reply with `--json`.

use serde_json::{Value, json};

use super::ControlClient;
use super::table::Numbers;
use crate::control::wire::{Dropped, Thawed};
use crate::error::{Error, ErrorKind, Result};

/// A change of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceAction {
    /// `genblk flush`.
    Flush,
    /// `genblk drop`.
    Drop {
        /// Whether dirty pages are written first.
        flushed: bool,
    },
    /// `genblk resize`.
    Resize {
        /// The size in bytes; `None`: the disk grows to the present size of the image.
        bytes: Option<u64>,
        /// Whether it may become smaller.
        shrink: bool,
    },
    /// `genblk resume`.
    Resume,
    /// `genblk thaw`.
    Thaw {
        /// The number of the freeze; `None`: any freeze.
        lease: Option<u64>,
    },
    /// `genblk detach`.
    Detach {
        /// Whether to detach it even while a front-end is connected, or if the image fails.
        force: bool,
        /// Whether to discard dirty pages of a volatile cache that cannot be written.
        discard: bool,
    },
}

/// Changes a device; returns the text to print.
///
/// # Errors
/// The errors of [`ControlClient::call`]; [`ErrorKind::Control`] if a thaw found that the device had not been frozen
/// throughout.
pub fn change(client: &mut ControlClient, device: &str, change: &DeviceAction, as_json: bool) -> Result<String> {
    let (method, parameters) = match change {
        DeviceAction::Flush => ("Flush", json!({ "device": device })),
        DeviceAction::Drop { flushed } => ("Drop", json!({ "device": device, "flushed": flushed })),
        // A daemon of an earlier version does not know `shrink`.
        DeviceAction::Resize { bytes, shrink: false } => ("Resize", json!({ "device": device, "bytes": bytes })),
        DeviceAction::Resize { bytes, shrink: true } => {
            ("Resize", json!({ "device": device, "bytes": bytes, "shrink": true }))
        }
        DeviceAction::Resume => ("Resume", json!({ "device": device })),
        DeviceAction::Thaw { lease } => ("Thaw", json!({ "device": device, "lease": lease })),
        DeviceAction::Detach { force, discard } => {
            ("Detach", json!({ "device": device, "force": force, "discard": discard }))
        }
    };
    let results = client.call_long(method, &parameters, |_| {})?;
    if as_json {
        return Ok(format!("{results}\n"));
    }
    Ok(format!("{device}: {}\n", in_words(device, change, &results)?))
}

fn in_words(device: &str, change: &DeviceAction, results: &Value) -> Result<String> {
    let unknown = |e| Error::io(ErrorKind::Control, "an unsupported reply", e);
    Ok(match change {
        DeviceAction::Flush => "all completed writes are durable on the image".to_owned(),
        DeviceAction::Resize { .. } => {
            format!("the guest's disk has {} bytes", results["image_bytes"].as_u64().unwrap_or_default())
        }
        DeviceAction::Resume => "resumed".to_owned(),
        DeviceAction::Detach { discard: true, .. } => {
            "detached; data that could not be written to the image was discarded".to_owned()
        }
        DeviceAction::Detach { .. } => "detached; all data is on the image".to_owned(),
        DeviceAction::Drop { .. } => {
            let Dropped { dropped_bytes } = serde_json::from_value(results.clone()).map_err(|e| unknown(e.into()))?;
            format!("{} of clean pages dropped", Numbers::Short.bytes(dropped_bytes))
        }
        DeviceAction::Thaw { .. } => {
            let thawed: Thawed = serde_json::from_value(results.clone()).map_err(|e| unknown(e.into()))?;
            if !thawed.held {
                return Err(freeze_ended_early(device));
            }
            format!("thawed after {} ms; nothing was written meanwhile", thawed.frozen_us / 1000)
        }
    })
}

/// The error for a freeze that ended early.
pub(super) fn freeze_ended_early(device: &str) -> Error {
    Error::new(ErrorKind::Control, format!("{device}: the freeze ended early: a copy made meanwhile is inconsistent"))
}
