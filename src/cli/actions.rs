//! The actions that a command line can request.

use std::path::PathBuf;

use crate::client::exporter::{ExporterOptions, ListenAddress};
use crate::client::{DeviceAction, EventOptions, FreezeOptions, StatOptions, TopOptions, WarmOptions};
use crate::config::Config;

/// The action that a command line requests.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Print this and exit with status 0.
    Print(String),
    /// Serve these devices, as many of them as can be served.
    Serve(Config),
    /// Serve the device of the command line, in one process.
    ServeOne(Config),
    /// Serve all of these devices, or none.
    ServeAll(Config),
    /// Check whether these devices could be served.
    Check {
        /// The origin of the configuration, for messages.
        source: String,
        /// The devices.
        config: Config,
    },
    /// List the caches in this directory.
    ListCaches(PathBuf),
    /// Remove the caches in this directory that hold no unwritten data.
    Prune(PathBuf),
    /// Write the dirty pages of cache files to their images.
    Recover {
        /// The cache files.
        caches: Vec<PathBuf>,
        /// The new path of the image, if it has moved.
        image: Option<PathBuf>,
        /// Whether to write even to an image that cannot be shown to be the cache's.
        force: bool,
    },
    /// Remove these cache files.
    Discard {
        /// The cache files.
        caches: Vec<PathBuf>,
        /// Whether to do it without asking.
        force: bool,
    },
    /// Run the disk process of the device with this name, controlled by the supervisor through standard input.
    DiskProcess(String),
    /// Give up the caches of this image below this directory, so that it can be served.
    TakeOver(PathBuf, PathBuf),
    /// List the devices of the daemon at this control socket.
    List {
        /// The control socket.
        socket: PathBuf,
        /// One device; `None`: all.
        device: Option<String>,
        /// Whether to print the reply unchanged.
        json: bool,
    },
    /// Show statistics of the devices of the daemon at this control socket.
    Stat(PathBuf, StatOptions),
    /// Change a device of the daemon at this control socket.
    Change {
        /// The control socket.
        socket: PathBuf,
        /// The device.
        device: String,
        /// The change.
        change: DeviceAction,
        /// Whether to print the reply unchanged.
        json: bool,
    },
    /// List what of a device is in memory, of the daemon at this control socket.
    Resident {
        /// The control socket.
        socket: PathBuf,
        /// The device.
        device: String,
        /// The replies as they came.
        json: bool,
    },
    /// Read a list into the cache of a device, of the daemon at this control socket.
    Warm(PathBuf, WarmOptions),
    /// Attach the devices of a file to the daemon at this control socket.
    Attach {
        /// The control socket.
        socket: PathBuf,
        /// The file.
        file: PathBuf,
        /// Their names; empty: all.
        devices: Vec<String>,
        /// Whether to print the replies unchanged.
        json: bool,
    },
    /// Set keys of a device of the daemon at this control socket.
    Set {
        /// The control socket.
        socket: PathBuf,
        /// The device.
        device: String,
        /// The keys, each written KEY=VALUE.
        settings: Vec<String>,
        /// Whether to print the reply unchanged.
        json: bool,
    },
    /// Make the daemon at this control socket reload its configuration file.
    Reload {
        /// The control socket.
        socket: PathBuf,
        /// Whether to report what would change without changing it.
        dry_run: bool,
        /// Whether to print the reply unchanged.
        json: bool,
    },
    /// Show the configuration of the daemon at this control socket.
    Configuration {
        /// The control socket.
        socket: PathBuf,
        /// One device; `None`: all.
        device: Option<String>,
        /// Whether to print the reply unchanged.
        json: bool,
    },
    /// Show the events of the daemon at this control socket.
    Events(PathBuf, EventOptions),
    /// Freeze a device of the daemon at this control socket.
    Freeze(PathBuf, FreezeOptions),
    /// Watch the devices of a daemon on a terminal.
    Top(TopOptions),
    /// Print the metrics of a daemon.
    PrintMetrics(ExporterOptions),
    /// Serve the metrics of a daemon at an address.
    ServeMetrics(ListenAddress, ExporterOptions),
}
