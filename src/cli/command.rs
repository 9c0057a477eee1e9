//! The commands of the command line: the arguments of each, and the resulting action.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::builder::{PathBufValueParser, TypedValueParser};

use super::{Action, help};
use crate::client::exporter::{ExporterOptions, ListenAddress};
use crate::client::{DeviceAction, EventOptions, FreezeOptions, Numbers, StatOptions, TopOptions, View, WarmOptions};
use crate::config::{SYSTEMD, parse_size};
use crate::error::{Error, ErrorKind, Result};

/// Commands other than serving.
#[derive(Clone, Debug, clap::Subcommand)]
pub(super) enum ClientCommand {
    /// List the caches that daemons left; with CACHE, write one to its image
    #[command(after_long_help = help::RECOVER)]
    Recover(RecoverArguments),
    /// Serve one image for the daemon that starts this process
    #[command(hide = true)]
    DiskProcess {
        /// Name of the device, for tools that list processes
        name: String,
    },
    /// List the disks of a running daemon
    #[command(after_long_help = help::LIST)]
    List {
        /// A device; if omitted, all devices
        device: Option<String>,
        #[command(flatten)]
        control: ControlSocket,
    },
    /// Show statistics of the disks of a running daemon: rates, latencies, hits
    #[command(after_long_help = help::STAT, override_usage = "genblk stat [OPTIONS] [DEVICE] [INTERVAL [COUNT]]")]
    Stat(StatArguments),
    /// Add the disks of a file to a running daemon
    #[command(after_long_help = help::ATTACH)]
    Attach {
        /// A TOML file with a table for each device, or with the keys of one device
        file: PathBuf,
        /// Which disks of the file to serve; if omitted, all
        devices: Vec<String>,
        #[command(flatten)]
        control: ControlSocket,
    },
    /// Write all dirty data of a disk to its image, and stop serving it
    #[command(after_long_help = help::DETACH)]
    Detach {
        #[command(flatten)]
        device: OneDevice,
        /// Detach it even while a guest uses it; if its image fails, its cache stays for "genblk recover"
        #[arg(long)]
        force: bool,
        /// If its cache is volatile (survive = "never"), discard dirty data that cannot be written to its image
        #[arg(long, requires = "force")]
        discard: bool,
    },
    /// Change keys of a disk while it is served
    #[command(after_long_help = help::SET)]
    Set {
        #[command(flatten)]
        device: OneDevice,
        /// Configuration keys with their new values, such as cache.mode=writethrough
        #[arg(required = true, value_name = "KEY=VALUE")]
        settings: Vec<String>,
    },
    /// Reload the configuration file
    #[command(after_long_help = help::RELOAD)]
    Reload {
        /// Only show what would change
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        control: ControlSocket,
    },
    /// Show the current configuration
    #[command(after_long_help = help::CONFIG)]
    Config {
        /// A device; if omitted, all devices
        device: Option<String>,
        #[command(flatten)]
        control: ControlSocket,
    },
    /// Show recent events of a running daemon and its disks
    #[command(after_long_help = help::EVENTS)]
    Events {
        /// A device; if omitted, all devices and the daemon itself
        device: Option<String>,
        /// Keep printing events as they occur
        #[arg(short = 'f', long)]
        follow: bool,
        #[command(flatten)]
        control: ControlSocket,
    },
    /// Make all completed writes of a disk durable
    #[command(after_long_help = help::FLUSH)]
    Flush(OneDevice),
    /// Drop a disk's clean pages from its cache
    #[command(after_long_help = help::DROP)]
    Drop {
        #[command(flatten)]
        device: OneDevice,
        /// Write dirty pages first, then drop them too
        #[arg(long)]
        flushed: bool,
    },
    /// Read a disk, or a list of its extents, into its cache
    #[command(after_long_help = help::WARM)]
    Warm {
        #[command(flatten)]
        device: OneDevice,
        /// A list that "genblk resident" has printed; "-": standard input; without this, the whole disk
        #[arg(long, value_name = "FILE")]
        from: Option<PathBuf>,
    },
    /// List the extents of a disk that are in its cache
    #[command(after_long_help = help::RESIDENT)]
    Resident(OneDevice),
    /// Change the size of a disk while a guest uses it
    #[command(after_long_help = help::RESIZE)]
    Resize {
        #[command(flatten)]
        device: OneDevice,
        /// The new size, such as 20G; if omitted, the guest's disk grows to the present size of the image
        #[arg(value_parser = image_size)]
        size: Option<u64>,
        /// Allow a smaller size; the data beyond the new end is lost
        #[arg(long, requires = "size")]
        shrink: bool,
    },
    /// Retry failed operations and stopped write-back, because the image works again
    #[command(after_long_help = help::RESUME)]
    Resume(OneDevice),
    /// Write all dirty data of a disk and hold new writes, for a copy or snapshot on the host
    #[command(after_long_help = help::FREEZE)]
    Freeze {
        #[command(flatten)]
        device: OneDevice,
        /// Time after which the freeze ends by itself, counted from its start: 1ms to 60s
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = milliseconds)]
        timeout: u32,
        /// Hold reads as well as writes
        #[arg(long)]
        reads: bool,
        /// Run this while the disk is frozen, then thaw it; genblk exits with its status
        #[arg(last = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// End a freeze
    #[command(after_long_help = help::THAW)]
    Thaw(OneDevice),
    /// Watch the disks of a running daemon on a terminal
    ///
    /// Shows a line for each disk, redrawn each second, and details of the selected one: rates, latencies by how
    /// requests were served, memory, dirty data. The bottom line lists the keys. The terminal needs 80 columns and 24
    /// lines; with at least 104 columns, memory and dirty data have bars.
    #[command(after_long_help = help::TOP)]
    Top {
        /// Seconds between two updates
        #[arg(value_name = "INTERVAL", default_value = "1", value_parser = interval)]
        interval: Duration,
        /// Print one screen as text after one interval, and exit
        #[arg(long)]
        once: bool,
        /// Use no colours, as with NO_COLOR in the environment
        #[arg(long)]
        no_color: bool,
        /// Control socket of the daemon
        #[arg(long, value_name = "PATH", env = "GENBLK_CONTROL", default_value = "/run/genblk/control.sock")]
        socket: PathBuf,
    },
    /// Export metrics of a running daemon to Prometheus
    #[command(after_long_help = help::EXPORTER)]
    Exporter {
        /// Serve GET /metrics over HTTP on this TCP address (127.0.0.1:9950), on a Unix domain socket at this path
        /// (/run/genblk-exporter.sock), or on the socket passed by systemd (systemd)
        #[arg(long, value_name = "ADDRESS", required_unless_present = "once")]
        listen: Option<ListenAddress>,
        /// Print the metrics to standard output and exit, for example for node_exporter's textfile directory
        #[arg(long, conflicts_with = "listen")]
        once: bool,
        /// Show only the sum and the count of histograms
        #[arg(long)]
        no_histograms: bool,
        /// Control socket of the daemon
        #[arg(long, value_name = "PATH", env = "GENBLK_CONTROL", default_value = "/run/genblk/control.sock")]
        socket: PathBuf,
    },
    /// Give up completed writes that a lost cache of IMAGE may hold, so that IMAGE can be served
    #[command(after_long_help = help::TAKE_OVER)]
    TakeOver {
        /// The image; its caches are set aside, and a claim of another host is revoked
        image: PathBuf,
        /// Directory to search for its caches
        #[arg(long, value_name = "DIR", default_value = "/dev/shm", value_parser = directory())]
        memory_dir: PathBuf,
    },
}

/// Options of every command to a running daemon.
#[derive(Clone, Debug, clap::Args)]
pub struct ControlSocket {
    /// Control socket of the daemon
    #[arg(long, value_name = "PATH", env = "GENBLK_CONTROL", default_value = "/run/genblk/control.sock")]
    socket: PathBuf,
    /// Print the daemon's reply as one line of JSON
    #[arg(long)]
    json: bool,
}

/// A device of a running daemon.
#[derive(Clone, Debug, clap::Args)]
pub struct OneDevice {
    /// Name of the device
    device: String,
    #[command(flatten)]
    control: ControlSocket,
}

impl OneDevice {
    fn change(self, change: DeviceAction) -> Action {
        let ControlSocket { socket, json } = self.control;
        Action::Change { socket, device: self.device, change, json }
    }
}

/// A time such as 500ms or 10s, in milliseconds.
fn milliseconds(text: &str) -> std::result::Result<u32, String> {
    let (number, factor) = match text.strip_suffix("ms") {
        Some(number) => (number, 1),
        None => (text.strip_suffix('s').unwrap_or(text), 1000),
    };
    let time = number.parse::<u32>().ok().and_then(|number| number.checked_mul(factor));
    time.filter(|time| (1..=60_000).contains(time)).ok_or_else(|| "must be 1ms to 60s".to_owned())
}

/// A size of an image.
fn image_size(text: &str) -> std::result::Result<u64, String> {
    parse_size(text).ok_or_else(|| "takes a size such as 20G".to_owned())
}

/// Arguments of `genblk stat`.
#[derive(Clone, Debug, clap::Args)]
pub struct StatArguments {
    /// A device (default: all), the seconds between reports (default: a single report), and their number (default: no
    /// limit)
    #[arg(value_name = "[DEVICE] [INTERVAL [COUNT]]", num_args = 0..=3)]
    arguments: Vec<String>,
    /// Latencies, one line per kind of request
    #[arg(short = 'l', long, group = "view")]
    latencies: bool,
    /// Histograms of the latencies of requests, in powers of two
    #[arg(short = 'w', long, group = "view")]
    histograms: bool,
    /// Sizes of requests and of operations on the image, in powers of two
    #[arg(short = 'r', long, group = "view")]
    sizes: bool,
    /// The caches: hits, readahead, evictions, dirty data
    #[arg(short = 'c', long, group = "view")]
    cache: bool,
    /// What delays requests, in numbers and in words: the image, a lack of memory, write-back, limits
    #[arg(short = 'x', long, group = "view")]
    why: bool,
    /// Output for programs: separated by tabs, without a header
    #[arg(short = 'H', long)]
    scripted: bool,
    /// Exact numbers: bytes and nanoseconds
    #[arg(short = 'p', long)]
    parsable: bool,
    /// Print the time (seconds since 1970) above each report
    #[arg(short = 'T', long)]
    time: bool,
    /// Omit the first report, which covers the time since the daemon started
    #[arg(short = 'y', long)]
    omit_first: bool,
    #[command(flatten)]
    control: ControlSocket,
}

/// Seconds between two reports.
fn interval(text: &str) -> std::result::Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.1..=86_400.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "must be 0.1 to 86400 seconds".to_owned())
}

impl StatArguments {
    fn action(self) -> Result<Action> {
        let wrong = |text: &str| {
            let usage = "[DEVICE] [INTERVAL [COUNT]]: an interval of 0.1 to 86400 seconds, and a count of 1 or more";
            Error::new(ErrorKind::Config, format!("{text:?} is an unexpected argument; genblk stat takes {usage}"))
        };
        let mut arguments = self.arguments.iter().cloned().peekable();
        let device = arguments.next_if(|first| first.parse::<f64>().is_err());
        let interval = arguments.next().map(|text| interval(&text).map_err(|_| wrong(&text)));
        let count = arguments.next().map(|text| {
            let count = text.parse().ok().filter(|count| *count > 0);
            count.ok_or_else(|| wrong(&text))
        });
        if let Some(more) = arguments.next() {
            return Err(wrong(&more));
        }
        let view = match self {
            Self { latencies: true, .. } => View::Latencies,
            Self { histograms: true, .. } => View::Histograms,
            Self { sizes: true, .. } => View::Sizes,
            Self { cache: true, .. } => View::Cache,
            Self { why: true, .. } => View::Causes,
            _ => View::Overview,
        };
        let options = StatOptions {
            device,
            view,
            interval: interval.transpose()?,
            count: count.transpose()?,
            for_programs: self.scripted,
            numbers: if self.parsable { Numbers::Exact } else { Numbers::Short },
            with_time: self.time,
            without_first: self.omit_first,
            as_json: self.control.json,
        };
        Ok(Action::Stat(self.control.socket, options))
    }
}

/// Arguments of `genblk recover`.
#[derive(Clone, Debug, clap::Args)]
pub struct RecoverArguments {
    /// A listed cache: write its dirty pages to its image, then remove it
    #[arg(value_name = "CACHE")]
    caches: Vec<PathBuf>,
    /// The new path of CACHE's image, if it has moved
    #[arg(long, value_name = "PATH", requires = "caches", conflicts_with = "discard")]
    image: Option<PathBuf>,
    /// Remove CACHE without writing anything to its image
    #[arg(long, requires = "caches")]
    discard: bool,
    /// Discard dirty pages without asking; write to an image even if it cannot be shown to be CACHE's
    #[arg(long, requires = "caches")]
    force: bool,
    /// Remove all caches that hold no unwritten data
    #[arg(long, conflicts_with = "caches")]
    prune: bool,
    /// Directory to search: a memory directory, or a folder of caches in it
    #[arg(long, value_name = "DIR", default_value = "/dev/shm", conflicts_with = "caches")]
    #[arg(value_parser = directory())]
    memory_dir: PathBuf,
}

impl RecoverArguments {
    fn action(self) -> Result<Action> {
        let Self { mut caches, image, discard, force, prune, memory_dir } = self;
        if image.is_some() && caches.len() > 1 {
            return Err(Error::new(ErrorKind::Config, "--image names the image of one CACHE; recover them one by one"));
        }
        let is_folder = caches.len() == 1 && image.is_none() && !discard && !force && caches[0].is_dir();
        Ok(match caches.len() {
            0 if prune => Action::Prune(memory_dir),
            0 => Action::ListCaches(memory_dir),
            _ if is_folder => Action::ListCaches(caches.remove(0)),
            _ if discard => Action::Discard { caches, force },
            _ => Action::Recover { caches, image, force },
        })
    }
}

/// A directory with cache files; systemd's file descriptor store is not one.
fn directory() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| match path == Path::new(SYSTEMD) {
        true => Err("a cache kept by systemd is reachable only from its unit; start the unit to write it back"),
        false => Ok(path),
    })
}

impl ClientCommand {
    pub(super) fn action(self) -> Result<Action> {
        Ok(match self {
            Self::Recover(arguments) => return arguments.action(),
            Self::DiskProcess { name } => Action::DiskProcess(name),
            Self::TakeOver { image, memory_dir } => Action::TakeOver(image, memory_dir),
            Self::List { device, control: ControlSocket { socket, json } } => Action::List { socket, device, json },
            Self::Stat(arguments) => return arguments.action(),
            Self::Attach { file, devices, control: ControlSocket { socket, json } } => {
                Action::Attach { socket, file, devices, json }
            }
            Self::Detach { device, force, discard } => device.change(DeviceAction::Detach { force, discard }),
            Self::Set { device: OneDevice { device, control: ControlSocket { socket, json } }, settings } => {
                Action::Set { socket, device, settings, json }
            }
            Self::Reload { dry_run, control: ControlSocket { socket, json } } => {
                Action::Reload { socket, dry_run, json }
            }
            Self::Config { device, control: ControlSocket { socket, json } } => {
                Action::Configuration { socket, device, json }
            }
            Self::Events { device, follow, control: ControlSocket { socket, json } } => {
                Action::Events(socket, EventOptions { device, follow, as_json: json })
            }
            Self::Flush(device) => device.change(DeviceAction::Flush),
            Self::Drop { device, flushed } => device.change(DeviceAction::Drop { flushed }),
            Self::Resize { device, size, shrink } => device.change(DeviceAction::Resize { bytes: size, shrink }),
            Self::Warm { device: OneDevice { device, control }, from } => {
                Action::Warm(control.socket, WarmOptions { device, from, as_json: control.json })
            }
            Self::Resident(OneDevice { device, control: ControlSocket { socket, json } }) => {
                Action::Resident { socket, device, json }
            }
            Self::Resume(device) => device.change(DeviceAction::Resume),
            Self::Thaw(device) => device.change(DeviceAction::Thaw { lease: None }),
            Self::Freeze { device: OneDevice { device, control }, timeout, reads, command } => {
                let options = FreezeOptions { device, timeout_ms: timeout, reads, command, as_json: control.json };
                Action::Freeze(control.socket, options)
            }
            Self::Top { interval, once, no_color, socket } => {
                let is_forbidden = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
                let with_colour = !no_color && !is_forbidden;
                Action::Top(TopOptions { socket, interval, once, with_colour })
            }
            Self::Exporter { listen, socket, no_histograms, once: _ } => {
                let options = ExporterOptions { socket, with_buckets: !no_histograms };
                match listen {
                    Some(address) => Action::ServeMetrics(address, options),
                    None => Action::PrintMetrics(options),
                }
            }
        })
    }
}
