//! The state of a daemon at one time: the replies to all methods that query it.

use std::path::Path;
use std::time::Instant;

use super::ControlClient;
use crate::control::wire::{
    Description, DeviceStatistics, DeviceStatus, Devices, ListParameters, Statistics, StatisticsParameters,
};
use crate::error::Result;

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct DaemonSample {
    /// The daemon's description.
    pub description: Description,
    /// The status of each device.
    pub devices: Vec<DeviceStatus>,
    /// When the statistics were taken, in microseconds since 1970.
    pub time_us: u64,
    /// The statistics of each device.
    pub statistics: Vec<DeviceStatistics>,
}

impl DaemonSample {
    /// Queries the daemon at a control socket; fails if the replies do not come before `until`.
    ///
    /// # Errors
    /// The errors of [`ControlClient::connect_until`] and [`ControlClient::call`].
    pub fn take(socket: &Path, until: Instant) -> Result<Self> {
        let mut client = ControlClient::connect_until(socket, until)?;
        let description = client.call("Describe", &serde_json::json!({}))?;
        let Devices { devices } = client.call("List", &ListParameters::default())?;
        let Statistics { time_us, devices: statistics } =
            client.call("Statistics", &StatisticsParameters::default())?;
        Ok(Self { description, devices, time_us, statistics })
    }
}
