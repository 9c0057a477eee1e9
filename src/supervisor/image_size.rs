//! The operator's `resize`: makes an image grow or shrink, and reports the new size to its guest.
//!
//! A shrink has three steps, because the process that serves an image may not cut it, and no process may use it beyond
//! its end. The disk process completes the guest's requests beyond the new end, writes everything, and uses the image
//! only up to there. Then the keeper cuts the image, if that process still serves it. Then the process notes the new
//! size in the ledger. A process that dies between two steps has left nothing beyond the new end, so its successor
//! serves the image with whatever size it has.

use std::sync::mpsc::channel;

use log::{info, warn};
use serde_json::json;

use super::entry::OverviewEntry;
use super::keeper::KeeperCommand;
use super::operator::{Operator, ask, link_of};
use super::operator_state::ChangeGuard;
use super::slot::SizeStep;
use crate::control::change::{ChangeClient, Refusal};
use crate::disk_protocol::DeviceRequest;
use crate::store::file::IoLock;

impl Operator {
    /// Changes the size of an image, and reports the new size to its guest. Returns it.
    pub(super) fn resize(
        &self,
        device: &str,
        bytes: Option<u64>,
        shrink: bool,
        client: &ChangeClient,
    ) -> Result<u64, Refusal> {
        let entry = self.overview.entry(device)?;
        let _change = ChangeGuard::begin(&entry.operator, &entry.config.name, "resize")?;
        if entry.is_frozen() {
            return Err(Refusal::new("Frozen", json!({ "device": device })));
        }
        let io_lock = link_of(&entry)?.process.io_lock();
        let smaller = match bytes {
            Some(bytes) if shrink => {
                let served = change_size(&entry, io_lock, SizeStep::BeginShrink(bytes))?;
                Some((bytes, served)).filter(|_| bytes < served)
            }
            _ => None,
        };
        let size_bytes = if let Some((bytes, served)) = smaller {
            shrink_image(&entry, io_lock, bytes, served, client)?;
            bytes
        } else {
            let size_bytes = change_size(&entry, io_lock, SizeStep::Grow(bytes))?;
            ask(&entry, DeviceRequest::Grow { size_bytes }, client)?;
            size_bytes
        };
        self.overview.events.add(Some(device), "resized", json!({ "image_bytes": size_bytes }));
        Ok(size_bytes)
    }
}

fn shrink_image(
    entry: &OverviewEntry,
    io_lock: IoLock,
    size_bytes: u64,
    served: u64,
    client: &ChangeClient,
) -> Result<(), Refusal> {
    let name = &entry.config.name;
    if let Err(refusal) = ask(entry, DeviceRequest::Shrink { size_bytes }, client) {
        // It fails only if the process has died.
        let _ = change_size(entry, io_lock, SizeStep::KeepSize);
        return Err(refusal);
    }
    if let Err(refusal) = change_size(entry, io_lock, SizeStep::Truncate(size_bytes)) {
        // It fails only if the process has died: its successor serves the image with its size.
        let _ = ask(entry, DeviceRequest::Grow { size_bytes: served }, client);
        return Err(refusal);
    }
    info!("{name}: the operator has shrunk its image from {served} to {size_bytes} bytes");
    if let Err(refusal) = ask(entry, DeviceRequest::Cut { size_bytes }, client) {
        // Its successor serves the image with the new size.
        warn!("{name}: its image was shrunk, but its process does not know: {}", refusal.reason());
    }
    Ok(())
}

/// Has the keeper carry out a step. Returns the size with which the image is served.
fn change_size(entry: &OverviewEntry, io_lock: IoLock, step: SizeStep) -> Result<u64, Refusal> {
    let name = &entry.config.name;
    let not_served = || Refusal::refused(name.clone(), "it is not served at the moment; try again");
    let (sender, reply) = channel();
    entry.commands.send(KeeperCommand::Size(io_lock, step, sender)).map_err(|_| not_served())?;
    let changed = reply.recv().map_err(|_| not_served())?;
    changed.map_err(|why| Refusal::refused(name.clone(), why))
}
