//! What the main thread shows of a device to the threads of the control socket.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use super::handle::DeviceLink;
use super::keeper::KeeperCommand;
use super::operator_state::{FreezeLease, OperatorState};
use crate::config::DeviceConfig;
use crate::control::wire::DeviceState;
use crate::disk_stats::StatsPage;

/// How far a device is, for the control socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeviceProgress {
    pub state: DeviceState,
    /// Why it is not served.
    pub why: Option<String>,
    /// Process ID of its disk process.
    pub pid: Option<u32>,
    /// It was served since it was attached or the daemon started, maybe by a process that has died.
    pub was_served: bool,
    /// The operator waits for it to be served.
    pub is_attaching: bool,
    /// It is being detached, and would lose dirty pages if it ended.
    pub keeps_data: bool,
}

/// A device, as of the main thread's last check.
#[derive(Clone, Debug)]
pub(super) struct OverviewEntry {
    pub config: Arc<DeviceConfig>,
    pub page: Arc<StatsPage>,
    pub progress: DeviceProgress,
    /// The way to its process, while it is served.
    pub link: Option<DeviceLink>,
    /// What the operator does with it.
    pub operator: Arc<OperatorState>,
    /// Commands to its keeper.
    pub commands: Sender<KeeperCommand>,
}

/// How long after the begin of a freeze its process may not have told of it yet. It tells a few times a second.
const FREEZE_TOLD_US: u64 = 1_000_000;

impl OverviewEntry {
    /// Whether the device is frozen.
    pub fn is_frozen(&self) -> bool {
        self.freeze().is_some()
    }

    /// The freeze that lasts. A vring that stops ends one early, in the process.
    pub fn freeze(&self) -> Option<FreezeLease> {
        let is_lost = |freeze: &FreezeLease| {
            let told_us = self.page.written_at_ns() / 1000;
            told_us > freeze.number.saturating_add(FREEZE_TOLD_US) && !self.page.read().is_frozen
        };
        self.operator.freeze(self.link.as_ref()).filter(|freeze| !is_lost(freeze))
    }
}
