//! A device's state, as the main thread publishes it to the threads of the control socket.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Instant;

use super::current_config::CurrentConfig;
use super::handle::DeviceLink;
use super::keeper::KeeperCommand;
use super::operator_state::{FreezeLease, OperatorState};
use crate::config::DeviceConfig;
use crate::control::wire::DeviceState;
use crate::disk_stats::StatsPage;

/// The progress of a device, for the control socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DeviceProgress {
    pub state: DeviceState,
    /// Why it is not served.
    pub why: Option<String>,
    /// Process ID of its disk process.
    pub pid: Option<u32>,
    /// It has been served since it was attached or the daemon started, perhaps by a process that has died.
    pub was_served: bool,
    /// Its front-end may reconnect until then, after a restart.
    pub may_reconnect_until: Option<Instant>,
    /// An attach waits for it to be served.
    pub is_attaching: bool,
    /// It is being detached and would lose dirty pages if it ended now.
    pub needs_final_flush: bool,
}

/// A device, as of the main thread's last check.
#[derive(Clone, Debug)]
pub(super) struct OverviewEntry {
    pub config: Arc<DeviceConfig>,
    /// The current configuration, with the bound that memory pressure sets to the size of the cache.
    pub current: CurrentConfig,
    pub page: Arc<StatsPage>,
    pub progress: DeviceProgress,
    /// The link to its process, while it is served.
    pub link: Option<DeviceLink>,
    /// Changes by the operator that are in progress.
    pub operator: Arc<OperatorState>,
    /// Commands to its keeper.
    pub commands: Sender<KeeperCommand>,
}

/// How long after a freeze begins the statistics page may not show it yet. The process updates the page a few times a
/// second.
const FREEZE_REPORT_MAX_US: u64 = 1_000_000;

impl OverviewEntry {
    /// Whether the device is frozen.
    pub fn is_frozen(&self) -> bool {
        self.freeze().is_some()
    }

    /// The freeze in progress. The process ends a freeze early if a vring stops.
    pub fn freeze(&self) -> Option<FreezeLease> {
        let is_lost = |freeze: &FreezeLease| {
            let told_us = self.page.written_at_ns() / 1000;
            told_us > freeze.number.saturating_add(FREEZE_REPORT_MAX_US) && !self.page.read().is_frozen
        };
        self.operator.freeze(self.link.as_ref()).filter(|freeze| !is_lost(freeze))
    }
}
