//! What a command line can ask for.

use std::path::PathBuf;

use crate::client::exporter::{ExporterOptions, ListenAddress};
use crate::client::{DeviceAction, EventOptions, FreezeOptions, StatOptions, TopOptions};
use crate::config::Config;

/// What the command line asks for.
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
        /// Where the configuration comes from.
        source: String,
        /// The devices.
        config: Config,
    },
    /// List the caches in this directory.
    ListCaches(PathBuf),
    /// Remove the caches in this directory from which nothing would be lost.
    Prune(PathBuf),
    /// Write the dirty pages of cache files to their images.
    Recover {
        /// The cache files.
        caches: Vec<PathBuf>,
        /// Where its image is, if it has moved.
        image: Option<PathBuf>,
        /// Whether to write even to an image that is not shown to be the cache's.
        force: bool,
    },
    /// Remove these cache files.
    Discard {
        /// The cache files.
        caches: Vec<PathBuf>,
        /// Whether to do it without asking.
        force: bool,
    },
    /// Be the disk process of the device of this name: serve what the supervisor at standard input says.
    DiskProcess(String),
    /// Give up the caches of this image below this directory, so that it can be served.
    TakeOver(PathBuf, PathBuf),
    /// List the devices of the daemon at this control socket.
    List {
        /// The control socket.
        socket: PathBuf,
        /// One device; all without it.
        device: Option<String>,
        /// The reply as it came.
        json: bool,
    },
    /// Show what the devices of the daemon at this control socket do.
    Stat(PathBuf, StatOptions),
    /// Change a device of the daemon at this control socket.
    Change {
        /// The control socket.
        socket: PathBuf,
        /// The device.
        device: String,
        /// What to change.
        change: DeviceAction,
        /// The reply as it came.
        json: bool,
    },
    /// Attach the devices of a file to the daemon at this control socket.
    Attach {
        /// The control socket.
        socket: PathBuf,
        /// The file.
        file: PathBuf,
        /// Their names; all, if there are none.
        devices: Vec<String>,
        /// The replies as they came.
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
        /// The reply as it came.
        json: bool,
    },
    /// Make the daemon at this control socket read its configuration file again.
    Reload {
        /// The control socket.
        socket: PathBuf,
        /// Say only what would change.
        dry_run: bool,
        /// The reply as it came.
        json: bool,
    },
    /// Show the configuration of the daemon at this control socket.
    Configuration {
        /// The control socket.
        socket: PathBuf,
        /// One device; all without it.
        device: Option<String>,
        /// The reply as it came.
        json: bool,
    },
    /// Show the events of the daemon at this control socket.
    Events(PathBuf, EventOptions),
    /// Freeze a device of the daemon at this control socket.
    Freeze(PathBuf, FreezeOptions),
    /// Show what the devices of a daemon do on a terminal.
    Top(TopOptions),
    /// Print the metrics of a daemon.
    PrintMetrics(ExporterOptions),
    /// Serve the metrics of a daemon at an address.
    ServeMetrics(ListenAddress, ExporterOptions),
}
