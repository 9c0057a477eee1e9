//! `genblk freeze`: freezes a device, until `genblk thaw` or for as long as a command runs.

use std::io;
use std::path::Path;
use std::process::{Command, ExitStatus};

use serde_json::json;

use super::ControlClient;
use super::change::{DeviceAction, change, freeze_ended_early};
use crate::control::wire::{FreezeParameters, Freezing};
use crate::error::{Error, ErrorKind, Result};

/// Options of `genblk freeze`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreezeOptions {
    /// The device.
    pub device: String,
    /// The freeze ends by itself after this time.
    pub timeout_ms: u32,
    /// Whether reads wait too.
    pub reads: bool,
    /// The command to run meanwhile, with its arguments; empty: none.
    pub command: Vec<std::ffi::OsString>,
    /// Whether to print the reply unchanged.
    pub as_json: bool,
}

/// Freezes a device of the daemon at `socket`. With a command, runs it, thaws the device, and returns the command's
/// status. `print` writes the output.
///
/// # Errors
/// The errors of [`ControlClient::call`]; [`ErrorKind::Control`] if the device was not frozen while the command ran.
pub fn freeze(socket: &Path, options: &FreezeOptions, print: impl Fn(&str)) -> Result<Option<ExitStatus>> {
    let FreezeOptions { device, timeout_ms, reads, command, as_json } = options;
    let parameters = FreezeParameters { device: device.clone(), timeout_ms: Some(*timeout_ms), reads: Some(*reads) };
    // Two connections: the freeze ends when the first one is closed.
    let (mut lease, mut other) = (ControlClient::connect(socket)?, ControlClient::connect(socket)?);
    let results = match command.is_empty() {
        true => lease.call_long("Freeze", &json!(parameters), |_| {})?,
        false => lease.call_first("Freeze", &json!(parameters))?,
    };
    let frozen: Freezing = serde_json::from_value(results.clone())
        .map_err(|e| Error::io(ErrorKind::Control, "an unsupported reply", e.into()))?;
    let after = frozen.frozen_us / 1000;
    let Some((program, arguments)) = command.split_first() else {
        let hint = format!("\"genblk thaw {device}\" ends it; it ends by itself {timeout_ms} ms after its start");
        print(&if *as_json { format!("{results}\n") } else { format!("{device}: frozen in {after} ms; {hint}\n") });
        return Ok(None);
    };
    print(&format!("{device}: frozen in {after} ms\n"));
    let ran = Command::new(program).args(arguments).status();
    let thawed = change(&mut other, device, &DeviceAction::Thaw { lease: frozen.lease }, false);
    drop(lease);
    let status =
        ran.map_err(|e: io::Error| Error::io(ErrorKind::Control, format!("cannot run {}", program.display()), e))?;
    print(&thawed.map_err(|_| freeze_ended_early(device))?);
    Ok(Some(status))
}
