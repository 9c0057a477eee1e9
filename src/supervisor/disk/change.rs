//! Attaching and detaching a device while others are served.

use super::{DevicePhase, Disk, Recorded, Requester};
use crate::disk_protocol::Ending;
use crate::error::Error;
use crate::store::file::IoLock;

/// A device that is being detached.
#[derive(Debug)]
pub(in crate::supervisor) struct Detaching {
    /// Where to send the result.
    pub requester: Requester,
    /// Requesters of `detach --discard` that arrived meanwhile and wait for its end.
    pub discarders: Vec<Requester>,
    pub record: Recorded,
    /// Dirty pages of a volatile cache may be discarded.
    discards: bool,
}

/// The processes and groups of the devices that stay: the end of another device must not harm them.
#[derive(Debug)]
pub(in crate::supervisor) struct RemainingDevices {
    processes: Vec<IoLock>,
    groups: Vec<String>,
}

impl RemainingDevices {
    /// The processes and groups of those of `disks` that are not ending.
    pub fn of<'a>(disks: impl Iterator<Item = &'a Disk>) -> Self {
        let staying: Vec<&Disk> = disks.filter(|disk| !disk.is_ending()).collect();
        let groups = staying.iter().map(|disk| disk.config().group.clone()).filter(|group| !group.is_empty());
        let processes = staying.iter().filter_map(|disk| disk.image_key()).map(|(process, _)| process);
        Self { processes: processes.collect(), groups: groups.collect() }
    }

    fn share_process_of(&self, disk: &Disk) -> bool {
        disk.image_key().is_some_and(|(process, _)| self.processes.contains(&process))
            || self.groups.contains(&disk.config().group)
    }
}

impl Disk {
    /// Whether it is ending: it is being detached, or the daemon is shutting down.
    pub fn is_ending(&self) -> bool {
        self.end.is_some()
    }

    /// Whether an attach waits for it to be served.
    pub fn is_attaching(&self) -> bool {
        self.attaching.is_some()
    }

    /// Records the attach that waits for it to be served.
    pub fn set_attaching(&mut self, requester: Requester, record: Recorded) {
        self.attaching = Some((requester, record));
    }

    /// Takes the attach that waits for it to be served.
    pub fn take_attaching(&mut self) -> Option<(Requester, Recorded)> {
        self.attaching.take()
    }

    /// Begins to detach it; `requester` gets the result. `discards`: dirty pages of a volatile cache may be discarded.
    pub fn begin_detach(&mut self, requester: Requester, record: Recorded, discards: bool) {
        self.detaching = Some(Detaching { requester, discarders: Vec::new(), record, discards });
        self.begin_shutdown(Ending::WriteBack);
    }

    /// Lets the detach in progress discard dirty pages that the image does not accept; `requester` gets the result of
    /// the detach too. Returns whether it is being detached.
    pub fn discard(&mut self, requester: Requester) -> bool {
        let Some(detaching) = &mut self.detaching else { return false };
        detaching.discards = true;
        detaching.discarders.push(requester);
        true
    }

    /// The detach, if there is one, and the error with which it ended.
    pub fn into_parts(self) -> (Option<Detaching>, Option<Error>) {
        (self.detaching, self.error)
    }

    /// Whether it is being detached, its rings have stopped, and its end would lose dirty pages because its cache is
    /// volatile. The thread of the change then flushes it until a flush succeeds.
    pub fn needs_final_flush(&self) -> bool {
        let (Some(Detaching { discards: false, .. }), Some(quiesced), Some(handle)) =
            (&self.detaching, self.quiesced, &self.handle)
        else {
            return false;
        };
        // Statistics published before its rings stopped do not cover the last requests.
        let is_stale = handle.silent_for() >= quiesced.elapsed();
        self.phase == DevicePhase::Quiesced && (is_stale || self.state().has_volatile_dirty_data)
    }

    /// Logs waits that take long.
    pub fn check(&mut self, remaining: &RemainingDevices) {
        let Some((ending, since)) = self.end else { return self.check_while_serving() };
        if self.has_ended() {
            return;
        }
        let discards = self.detaching.as_ref().is_none_or(|detaching| detaching.discards);
        let advice = if remaining.share_process_of(self) {
            // Abandoning it would stop workers of a shared process, and other devices wait for what these have begun.
            None
        } else if !discards && self.state().has_volatile_dirty_data {
            None
        } else {
            Some("")
        };
        self.check_shutdown(ending, since, advice);
    }
}
