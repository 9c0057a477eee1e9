//! Attaching and detaching devices while others are served. A change is in the runtime file before its reply is sent.

use std::mem;

use log::{info, warn};
use serde_json::json;

use super::disk::{Detaching, Disk};
use super::fleet::Fleet;
use super::fleet_change::{FleetChange, FleetPlan, Recorded, Requester};
use crate::config::{Config, DeviceConfig, check_conflicts, differing_keys, with_keys_of};
use crate::control::change::Refusal;
use crate::disk_protocol::Ending;
use crate::error::Error;

/// Prefix of the error for a device that was detached although its cache still holds dirty data.
pub(super) const DETACHED_DIRTY: &str = "detached, but dirty data remains: ";

impl Fleet {
    /// Begins a change that the operator requested.
    pub(super) fn on_change(&mut self, change: FleetChange) {
        let (requester, refusal) = match change {
            FleetChange::Attach(device, record, requester) => match self.check_attach(&device) {
                Ok(true) => return self.attach(&device, record, requester),
                Ok(false) => (requester, Ok(false)),
                Err(refusal) => (requester, Err(refusal)),
            },
            FleetChange::Discard(name, requester, waiter) => {
                let disk = self.find(&name).and_then(|index| self.disks.get_mut(&index));
                (requester, Ok(disk.is_some_and(|disk| disk.discard(waiter))))
            }
            FleetChange::Detach { name, cancels, discards, record, requester } => match self.find(&name) {
                _ if self.end.is_some() => (requester, Err(Refusal::shutting_down())),
                Some(index) if cancels && !self.disks[&index].is_attaching() => {
                    (requester, Err(Refusal::new("Busy", json!({ "what": format!("{name}: attach") }))))
                }
                Some(index) => return self.detach(index, discards, record, requester),
                None => (requester, Err(no_such_device(&name))),
            },
            FleetChange::Set(.., requester) if self.end.is_some() => (requester, Err(Refusal::shutting_down())),
            FleetChange::Set(device, keys, record, requester) => {
                let set = self.set(&device, &keys, record);
                (requester, set.map(|()| true))
            }
            FleetChange::Keep(name, requester) => {
                let kept = self.keep(&name);
                (requester, kept.map(|()| true))
            }
            FleetChange::Compare(files, requester) => return drop(requester.send(self.compare(&files))),
        };
        // It fails if the client has disconnected.
        let _ = requester.send(refusal);
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.disks.iter().find(|(_, disk)| disk.name() == name).map(|(index, _)| *index)
    }

    /// Whether a device is to be attached; `false`: it is attached already.
    fn check_attach(&self, device: &DeviceConfig) -> Result<bool, Refusal> {
        if self.end.is_some() {
            return Err(Refusal::shutting_down());
        }
        if let Some(index) = self.find(&device.name) {
            let disk = &self.disks[&index];
            let differs = differing_keys(&disk.config(), device);
            if disk.is_ending() {
                return Err(Refusal::new("Busy", json!({ "what": format!("{}: detach", device.name) })));
            }
            if disk.is_attaching() {
                return Err(Refusal::new("Busy", json!({ "what": format!("{}: attach", device.name) })));
            }
            return match differs.is_empty() {
                true => Ok(false),
                false => Err(Refusal::new("DeviceExists", json!({ "device": device.name, "differs": differs }))),
            };
        }
        let others: Vec<DeviceConfig> = self.disks.values().map(|disk| DeviceConfig::clone(&disk.config())).collect();
        match check_conflicts(device, &others) {
            Ok(()) => Ok(true),
            Err(problems) => {
                let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
                Err(Refusal::new("Invalid", json!({ "problems": problems })))
            }
        }
    }

    /// Replaces the current configuration of a device.
    fn set(&mut self, device: &DeviceConfig, keys: &[&str], record: Recorded) -> Result<(), Refusal> {
        let index = self.find(&device.name).ok_or_else(|| no_such_device(&device.name))?;
        // Other keys may have changed since the operator's thread read them.
        let device = with_keys_of(&self.disks[&index].config(), device, keys);
        if let Some(runtime) = self.runtime.as_mut().filter(|_| record == Recorded::Runtime) {
            let before = runtime.changes.clone();
            runtime.changes.record_set(&device, keys);
            if let Err(e) = runtime.save() {
                runtime.changes = before;
                let why = format!("it cannot be recorded for the next daemon: {e}");
                return Err(Refusal::refused(device.name, why));
            }
        }
        info!("{}: set by the operator: {}", device.name, keys.join(", "));
        self.disks[&index].configure(device);
        // Before the reply: the next change reads the current configuration here.
        self.overview.update(self.disks.values().map(Disk::entry));
        Ok(())
    }

    /// Records that a device is kept although the files no longer list it: its guest outlives this daemon.
    fn keep(&mut self, name: &str) -> Result<(), Refusal> {
        if self.end.is_some() {
            return Err(Refusal::shutting_down());
        }
        let index = self.find(name).ok_or_else(|| no_such_device(name))?;
        let config = self.disks[&index].config();
        let Some(runtime) = &mut self.runtime else { return Ok(()) };
        runtime.changes.record_kept(&config);
        runtime.save().map_err(|e| Refusal::refused(name, format!("cannot be recorded for the next daemon: {e}")))
    }

    /// The devices that a daemon with these files would serve, and the current ones.
    fn compare(&mut self, files: &Config) -> Result<FleetPlan, Refusal> {
        if let Some(runtime) = &mut self.runtime {
            runtime.note_files(files);
        }
        let mut problems = Vec::new();
        let wanted = match &self.runtime {
            Some(runtime) => runtime.changes.without_kept().apply(&files.devices, &mut problems),
            None => files.devices.clone(),
        };
        if !problems.is_empty() {
            return Err(Refusal::new("Invalid", json!({ "problems": problems })));
        }
        let current = self.disks.values().filter(|disk| !disk.is_ending()).map(Disk::config).collect();
        let changes = self.runtime.as_ref().map(|runtime| runtime.changes.without_kept());
        let overridden = changes.map(|changes| changes.overridden(&files.devices, &wanted));
        Ok(FleetPlan { overridden: overridden.unwrap_or_default(), wanted, current })
    }

    fn attach(&mut self, device: &DeviceConfig, record: Recorded, requester: Requester) {
        let index = self.next_disk;
        match Disk::start(index, device, &self.context, &self.events) {
            Ok(mut disk) => {
                info!("{}: being attached by the operator", device.name);
                self.next_disk += 1;
                disk.set_attaching(requester, record);
                self.disks.insert(index, disk);
            }
            Err(error) => drop(requester.send(Err(Refusal::refused(device.name.clone(), error.to_string())))),
        }
    }

    /// Completes the attach of a device that is now served.
    pub(super) fn confirm_attach(&mut self, index: usize) {
        let disk = self.disks.get_mut(&index).expect("it was found");
        let Some((requester, record)) = disk.take_attaching() else { return };
        let device = DeviceConfig::clone(&disk.config());
        let Some(runtime) = self.runtime.as_mut().filter(|_| record == Recorded::Runtime) else {
            return drop(requester.send(Ok(true)));
        };
        let before = runtime.changes.clone();
        runtime.changes.record_attached(&device);
        if let Err(e) = runtime.save() {
            runtime.changes = before;
            disk.begin_shutdown(Ending::WriteBack);
            let why = format!("it cannot be recorded for the next daemon: {e}");
            return drop(requester.send(Err(Refusal::refused(device.name, why))));
        }
        let _ = requester.send(Ok(true));
    }

    /// Refuses attaches in progress because the daemon ends; they are no longer recorded.
    pub(super) fn refuse_attaches(&mut self) {
        for (requester, _) in self.disks.values_mut().filter_map(Disk::take_attaching) {
            // It fails if the client has disconnected.
            let _ = requester.send(Err(Refusal::shutting_down()));
        }
    }

    /// Refuses the attach of a device that cannot be served. It is not retried.
    pub(super) fn refuse_attach(&mut self, index: usize, error: &Error) {
        let disk = self.disks.get_mut(&index).expect("it was found");
        warn!("{}: not attached: {error}", disk.name());
        if let Some((requester, _)) = disk.take_attaching() {
            let _ = requester.send(Err(Refusal::refused(disk.name(), error.to_string())));
        }
        disk.begin_shutdown(Ending::HandOver);
    }

    fn detach(&mut self, index: usize, discards: bool, record: Recorded, requester: Requester) {
        let disk = self.disks.get_mut(&index).expect("it was found");
        let attaching = disk.take_attaching();
        if disk.is_ending() {
            let busy = format!("{}: another change", disk.name());
            return drop(requester.send(Err(Refusal::new("Busy", json!({ "what": busy })))));
        }
        info!("{}: being detached by the operator", disk.name());
        let mut record = record;
        if let Some((attacher, _)) = attaching {
            // It was not attached yet, so there is nothing to record, and its image may never answer.
            record = Recorded::Files;
            let _ = attacher.send(Err(Refusal::refused(disk.name(), "it was detached before it was served")));
        }
        disk.begin_detach(requester, record, discards);
    }

    /// Removes the devices that were detached and have ended.
    pub(super) fn remove_ended(&mut self) {
        if self.end.is_some() {
            return;
        }
        let is_gone = |disk: &Disk| disk.is_ending() && disk.has_ended();
        let (ended, remaining): (Vec<_>, Vec<_>) =
            mem::take(&mut self.disks).into_iter().partition(|(_, disk)| is_gone(disk));
        self.disks = remaining.into_iter().collect();
        if !ended.is_empty() {
            // Before the replies: a client that gets one may list the devices next.
            self.overview.update(self.disks.values().map(Disk::entry));
        }
        for (_, disk) in ended {
            let name = disk.name().to_owned();
            let (detaching, error) = disk.into_parts();
            let Some(Detaching { requester, discarders, record, .. }) = detaching else { continue };
            let recorded = self.runtime.as_mut().map_or(Ok(()), |runtime| match record {
                Recorded::Runtime => {
                    runtime.record_detached(&name);
                    runtime.save()
                }
                Recorded::Files if runtime.changes.forget_kept(&name) => runtime.save(),
                Recorded::Files => Ok(()),
            });
            let unrecorded = recorded.map_err(|e| {
                let why =
                    format!("detached, but that could not be recorded, and the next daemon will attach it again: {e}");
                Refusal::refused(&*name, why)
            });
            for discarder in discarders {
                // Unwritten data was discarded. The send fails if the client has disconnected.
                let _ = discarder.send(unrecorded.clone().map(|()| true));
            }
            let _ = requester.send(match (error, unrecorded) {
                (None, unrecorded) => unrecorded.map(|()| true),
                (Some(error), _) => {
                    let text = error.to_string();
                    let why = text.strip_prefix(&name).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(&text);
                    Err(Refusal::refused(&*name, format!("{DETACHED_DIRTY}{why}")))
                }
            });
        }
    }
}

fn no_such_device(name: &str) -> Refusal {
    Refusal::new("NoSuchDevice", json!({ "device": name, "devices": [] }))
}
