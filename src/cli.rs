//! The command line: a configuration file, or one device given by options.
//!
//! The options of a single device go through the table of keys of the configuration file, so they have the same
//! defaults and checks; only the names in the messages differ. The names `--socket-path`, `--fd`,
//! `--print-capabilities`, `--blk-file` and `--read-only` are those of QEMU's "Backend program conventions"
//! (docs/interop/vhost-user.rst), by which management programs find and start a back-end.

mod actions;
mod help;
#[cfg(test)]
mod manual;

use std::env;
use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::error::ErrorKind as ClapKind;

use crate::client::exporter::{ExporterOptions, ListenAddress};
use crate::client::{DeviceAction, FreezeOptions, Numbers, StatOptions, TopOptions, View};
use crate::config::{Config, DeviceBuilder, Origin, SYSTEMD, Setting, Value, finish, key, parse_size, report};
use crate::error::{Error, ErrorKind, Result};

pub use actions::Action;

/// What management programs may rely on (docs/interop/vhost-user.json, VHostUserBackendCapabilitiesBlock).
pub const CAPABILITIES: &str =
    "{\n  \"type\": \"block\",\n  \"features\": [\n    \"read-only\",\n    \"blk-file\"\n  ]\n}\n";

/// Name of a device given by options.
const DEVICE_NAME: &str = "disk0";

const PRINT_CAPABILITIES: &str = "--print-capabilities";

/// Commands other than serving.
#[derive(Clone, Debug, clap::Subcommand)]
pub enum ClientCommand {
    /// List the caches that daemons left; with CACHE, write one to its image
    #[command(after_long_help = help::RECOVER)]
    Recover {
        /// A cache from the list: write its dirty pages to its image, then remove it
        #[arg(value_name = "CACHE")]
        caches: Vec<PathBuf>,
        /// Where the image of CACHE is now, if it has moved
        #[arg(long, value_name = "PATH", requires = "caches", conflicts_with = "discard")]
        image: Option<PathBuf>,
        /// Remove CACHE without writing anything to its image
        #[arg(long, requires = "caches")]
        discard: bool,
        /// Throw away dirty pages without asking; write to an image that is not shown to be CACHE's
        #[arg(long, requires = "caches")]
        force: bool,
        /// Remove the caches from which nothing would be lost
        #[arg(long, conflicts_with = "caches")]
        prune: bool,
        /// Directory to search: a memory directory, or a folder of caches in it
        #[arg(long, value_name = "DIR", default_value = "/dev/shm", conflicts_with = "caches")]
        #[arg(value_parser = directory())]
        memory_dir: PathBuf,
    },
    /// Serve one image for a daemon, which starts this
    #[command(hide = true)]
    DiskProcess {
        /// Name of the device, for tools that list processes
        name: String,
    },
    /// List the disks of a running daemon
    #[command(after_long_help = help::LIST)]
    List {
        /// A device; all without it
        device: Option<String>,
        #[command(flatten)]
        control: ControlSocket,
    },
    /// Show what the disks of a running daemon do: rates, latencies, hits
    #[command(after_long_help = help::STAT)]
    Stat(StatArguments),
    /// Serve the disks of a file, beside those that are served
    #[command(after_long_help = help::ATTACH)]
    Attach {
        /// A TOML file with a table for each device, or with the keys of one device
        file: PathBuf,
        /// The disks of the file to serve; all, unless given
        devices: Vec<String>,
        #[command(flatten)]
        control: ControlSocket,
    },
    /// Write everything and serve a disk no more
    #[command(after_long_help = help::DETACH)]
    Detach {
        #[command(flatten)]
        device: OneDevice,
        /// Also while a guest uses it; if its image fails, its cache stays for "genblk recover"
        #[arg(long)]
        force: bool,
        /// Lose what its image does not take, if its cache ends with its process (survive = "never")
        #[arg(long, requires = "force")]
        discard: bool,
    },
    /// Change keys of a disk while it is served
    #[command(after_long_help = help::SET)]
    Set {
        #[command(flatten)]
        device: OneDevice,
        /// Keys of the configuration with their values, such as cache.mode=writethrough
        #[arg(required = true, value_name = "KEY=VALUE")]
        settings: Vec<String>,
    },
    /// Read the configuration file again
    #[command(after_long_help = help::RELOAD)]
    Reload {
        /// Say only what would change
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        control: ControlSocket,
    },
    /// Show the configuration in force
    #[command(after_long_help = help::CONFIG)]
    Config {
        /// A device; all without it
        device: Option<String>,
        #[command(flatten)]
        control: ControlSocket,
    },
    /// Make everything durable that a disk has completed
    #[command(after_long_help = help::FLUSH)]
    Flush(OneDevice),
    /// Drop a disk's clean pages from its cache
    #[command(after_long_help = help::DROP)]
    Drop {
        #[command(flatten)]
        device: OneDevice,
        /// Write dirty pages first, and drop them as well
        #[arg(long)]
        flushed: bool,
    },
    /// Make a disk's image grow while a guest uses it
    #[command(after_long_help = help::RESIZE)]
    Resize {
        #[command(flatten)]
        device: OneDevice,
        /// The new size, such as 20G; without it the guest's disk becomes as large as the image is by now
        #[arg(value_parser = image_size)]
        size: Option<u64>,
    },
    /// Retry what failed: the operator says that the image works again
    #[command(after_long_help = help::RESUME)]
    Resume(OneDevice),
    /// Make a disk's image whole and leave it alone, for a copy or a snapshot made on the host
    #[command(after_long_help = help::FREEZE)]
    Freeze {
        #[command(flatten)]
        device: OneDevice,
        /// The freeze ends by itself after this time, which counts from its begin: 1ms to 60s
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = milliseconds)]
        timeout: u32,
        /// Reads wait, too; without this only what changes the image does
        #[arg(long)]
        reads: bool,
        /// Run this meanwhile, then thaw; its exit status is that of genblk
        #[arg(last = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// End a freeze
    #[command(after_long_help = help::THAW)]
    Thaw(OneDevice),
    /// Show what the disks of a running daemon do, on a terminal
    ///
    /// A line for each disk, redrawn each second, and details of the selected one: rates, latencies by how requests
    /// were served, memory, dirty data. The keys are at the foot of the screen. It needs 80 columns and 24 lines; from
    /// 104 columns on, memory and dirty data have bars.
    #[command(after_long_help = help::TOP)]
    Top {
        /// Seconds between two pictures
        #[arg(value_name = "INTERVAL", default_value = "1", value_parser = interval)]
        interval: Duration,
        /// Print one picture as text, after an interval, and exit
        #[arg(long)]
        once: bool,
        /// Use no colours (nor does it with NO_COLOR in the environment)
        #[arg(long)]
        no_color: bool,
        /// Control socket of the daemon
        #[arg(long, value_name = "PATH", env = "GENBLK_CONTROL", default_value = "/run/genblk/control.sock")]
        socket: PathBuf,
    },
    /// Export metrics of a running daemon to Prometheus
    #[command(after_long_help = help::EXPORTER)]
    Exporter {
        /// Serve GET /metrics over HTTP at this TCP address (127.0.0.1:9950), at this path of a Unix domain socket
        /// (/run/genblk-exporter.sock), or on the socket of the unit (systemd)
        #[arg(long, value_name = "ADDRESS", required_unless_present = "once")]
        listen: Option<ListenAddress>,
        /// Print the metrics to standard output and exit, such as for node_exporter's textfile directory
        #[arg(long, conflicts_with = "listen")]
        once: bool,
        /// Of histograms, show only the sum and the count
        #[arg(long)]
        no_histograms: bool,
        /// Control socket of the daemon
        #[arg(long, value_name = "PATH", env = "GENBLK_CONTROL", default_value = "/run/genblk/control.sock")]
        socket: PathBuf,
    },
    /// Give up the completed writes that a cache may hold, so that IMAGE can be served as it is
    #[command(after_long_help = help::TAKE_OVER)]
    TakeOver {
        /// The image: its caches are set aside, and another host loses its claim to it
        image: PathBuf,
        /// Directory to search for its caches
        #[arg(long, value_name = "DIR", default_value = "/dev/shm", value_parser = directory())]
        memory_dir: PathBuf,
    },
}

/// How to reach a running daemon.
#[derive(Clone, Debug, clap::Args)]
pub struct ControlSocket {
    /// Control socket of the daemon
    #[arg(long, value_name = "PATH", env = "GENBLK_CONTROL", default_value = "/run/genblk/control.sock")]
    socket: PathBuf,
    /// Print the daemon's reply as it came, as JSON in one line
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
    time.filter(|time| (1..=60_000).contains(time)).ok_or_else(|| "a time is 1ms to 60s".to_owned())
}

/// A size of an image.
fn image_size(text: &str) -> std::result::Result<u64, String> {
    parse_size(text).ok_or_else(|| "takes a size such as 20G".to_owned())
}

/// What `genblk stat` shows.
#[derive(Clone, Debug, clap::Args)]
pub struct StatArguments {
    /// A device, all without it; then the seconds between two reports, and their number (with seconds: without end)
    #[arg(value_name = "[DEVICE] [INTERVAL [COUNT]]", num_args = 0..=3)]
    arguments: Vec<String>,
    /// Latencies: a line for each kind of request
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
    /// For programs: tabs, and no header
    #[arg(short = 'H', long)]
    scripted: bool,
    /// Exact numbers: bytes and nanoseconds
    #[arg(short = 'p', long)]
    parsable: bool,
    /// The time (seconds since 1970) above each report
    #[arg(short = 'T', long)]
    time: bool,
    /// Leave out the first report, which is about all the time since the daemon's start
    #[arg(short = 'y', long)]
    omit_first: bool,
    #[command(flatten)]
    control: ControlSocket,
}

/// Seconds between two reports.
fn interval(text: &str) -> std::result::Result<Duration, String> {
    let seconds = text.parse::<f64>().ok().filter(|seconds| (0.1..=86_400.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "an interval is 0.1 to 86400 seconds".to_owned())
}

impl StatArguments {
    fn action(self) -> Result<Action> {
        let wrong = |text: &str| {
            let usage = "[DEVICE] [INTERVAL [COUNT]]: an interval of 0.1 to 86400 seconds, and a count of 1 or more";
            Error::new(ErrorKind::Config, format!("{text:?} does not fit here; genblk stat takes {usage}"))
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

/// A directory with cache files; systemd's file descriptor store is not one.
fn directory() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|path| match path == Path::new(SYSTEMD) {
        true => Err("a cache kept by systemd is reachable only from its unit; start the unit to write it back"),
        false => Ok(path),
    })
}

impl ClientCommand {
    fn action(self) -> Result<Action> {
        let (mut caches, image, discard, force, prune, memory_dir) = match self {
            Self::Recover { caches, image, discard, force, prune, memory_dir } => {
                (caches, image, discard, force, prune, memory_dir)
            }
            Self::DiskProcess { name } => return Ok(Action::DiskProcess(name)),
            Self::TakeOver { image, memory_dir } => return Ok(Action::TakeOver(image, memory_dir)),
            Self::List { device, control: ControlSocket { socket, json } } => {
                return Ok(Action::List { socket, device, json });
            }
            Self::Stat(arguments) => return arguments.action(),
            Self::Attach { file, devices, control: ControlSocket { socket, json } } => {
                return Ok(Action::Attach { socket, file, devices, json });
            }
            Self::Detach { device, force, discard } => {
                return Ok(device.change(DeviceAction::Detach { force, discard }));
            }
            Self::Set { device: OneDevice { device, control: ControlSocket { socket, json } }, settings } => {
                return Ok(Action::Set { socket, device, settings, json });
            }
            Self::Reload { dry_run, control: ControlSocket { socket, json } } => {
                return Ok(Action::Reload { socket, dry_run, json });
            }
            Self::Config { device, control: ControlSocket { socket, json } } => {
                return Ok(Action::Configuration { socket, device, json });
            }
            Self::Flush(device) => return Ok(device.change(DeviceAction::Flush)),
            Self::Drop { device, flushed } => return Ok(device.change(DeviceAction::Drop { flushed })),
            Self::Resize { device, size } => return Ok(device.change(DeviceAction::Resize { bytes: size })),
            Self::Resume(device) => return Ok(device.change(DeviceAction::Resume)),
            Self::Thaw(device) => return Ok(device.change(DeviceAction::Thaw { lease: None })),
            Self::Freeze { device: OneDevice { device, control }, timeout, reads, command } => {
                let options = FreezeOptions { device, timeout_ms: timeout, reads, command, as_json: control.json };
                return Ok(Action::Freeze(control.socket, options));
            }
            Self::Top { interval, once, no_color, socket } => {
                let is_forbidden = env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
                let with_colour = !no_color && !is_forbidden;
                return Ok(Action::Top(TopOptions { socket, interval, once, with_colour }));
            }
            Self::Exporter { listen, socket, no_histograms, once: _ } => {
                let options = ExporterOptions { socket, with_buckets: !no_histograms };
                return Ok(match listen {
                    Some(address) => Action::ServeMetrics(address, options),
                    None => Action::PrintMetrics(options),
                });
            }
        };
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

/// Serves disk images to virtual machines over vhost-user, with a page cache of its own.
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "genblk", version, after_help = help::GENBLK, max_term_width = 100)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<ClientCommand>,

    /// Serve the devices of this TOML file
    #[arg(long, value_name = "FILE", conflicts_with_all = DEVICE_OPTIONS)]
    pub config: Option<PathBuf>,

    /// Check the configuration, images, sockets and memory, report all problems, and exit
    #[arg(long)]
    pub check: bool,

    /// Serve no disk if one of them cannot be served; otherwise the others are served
    #[arg(long)]
    pub strict: bool,

    /// Print what this back-end can do, as JSON, and exit; the rest is ignored
    #[arg(long)]
    pub print_capabilities: bool,

    /// Listen on this Unix domain socket
    #[arg(long, value_name = "PATH", help_heading = ONE_DEVICE, conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,

    /// Listen on this inherited descriptor (a Unix domain socket) instead
    #[arg(
        long,
        value_name = "FDNUM",
        allow_negative_numbers = true,
        help_heading = ONE_DEVICE,
        value_parser = clap::value_parser!(RawFd).range(3..)
    )]
    pub fd: Option<RawFd>,

    /// Mode of the socket, in octal [default: 0600]
    #[arg(long, value_name = "MODE", help_heading = ONE_DEVICE, conflicts_with = "fd")]
    pub socket_mode: Option<String>,

    /// Group of the socket: a name or a number [default: the daemon's own]
    #[arg(long, value_name = "GROUP", help_heading = ONE_DEVICE, conflicts_with = "fd")]
    pub socket_group: Option<String>,

    /// Serve this raw image file or block device, or the NBD export with this URI
    #[arg(long, value_name = "PATH", help_heading = ONE_DEVICE)]
    pub blk_file: Option<PathBuf>,

    /// What the image may look like: auto (refuse qcow2, VMDK, LUKS, gzip and the like), raw [default: auto]
    #[arg(long, value_name = "FORMAT", help_heading = ONE_DEVICE)]
    pub format: Option<String>,

    /// Make the disk read-only
    #[arg(long, help_heading = ONE_DEVICE)]
    pub read_only: bool,

    /// Memory for cached pages, such as 64M or 4G [default: 256M]
    #[arg(long, value_name = "SIZE", help_heading = ONE_DEVICE)]
    pub cache_size: Option<String>,

    /// When writes complete: writeback, writethrough, none (see below) [default: writeback]
    #[arg(long, value_name = "MODE", help_heading = ONE_DEVICE)]
    pub cache_mode: Option<String>,

    /// Request queues that the guest may use, 1 to 256 [default: 256]
    #[arg(long, value_name = "N", help_heading = ONE_DEVICE, allow_negative_numbers = true)]
    pub num_queues: Option<i64>,

    /// Serial that the guest reads, at most 20 characters [default: disk0]
    #[arg(long, value_name = "TEXT", help_heading = ONE_DEVICE)]
    pub serial: Option<String>,

    /// Shared memory that keeps the cache when the daemon dies, or "systemd" [default: /dev/shm]
    #[arg(long, value_name = "DIR", help_heading = ONE_DEVICE)]
    pub memory_dir: Option<PathBuf>,

    /// Confine the threads that serve the disk: on, off (for debugging) [default: on]
    #[arg(long, value_name = "MODE", help_heading = ONE_DEVICE)]
    pub sandbox: Option<String>,
}

const ONE_DEVICE: &str = "One device without a file";
/// Every option of a single device, by the name of its field.
const DEVICE_OPTIONS: [&str; 13] = [
    "socket_path",
    "fd",
    "socket_mode",
    "socket_group",
    "blk_file",
    "format",
    "read_only",
    "cache_size",
    "cache_mode",
    "num_queues",
    "serial",
    "memory_dir",
    "sandbox",
];

impl Cli {
    /// The configuration from the file or from the options.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] with every problem, each with its key and line or with its option.
    pub fn config(&self) -> Result<Config> {
        match &self.config {
            Some(path) => Config::load(path),
            None => self.single_device(),
        }
    }

    fn single_device(&self) -> Result<Config> {
        let options = self.options();
        if options.iter().all(|(_, _, value)| value.is_none()) {
            let advice = "give --config FILE, or --socket-path (or --fd) and --blk-file; --help says more";
            return Err(Error::new(ErrorKind::Config, format!("nothing to serve: {advice}")));
        }
        let origin = |label: &str| Origin { label: label.to_string(), line: None };
        let name = ("the device", "name", Some(Value::Text(DEVICE_NAME)));
        let mut entries = Vec::new();
        for (option, name, value) in options.into_iter().chain([name]) {
            let key = key(name).expect("a test gives every option");
            entries.extend(value.map(|value| Setting { key, value, origin: origin(option) }));
        }
        let label = |name: &str| {
            options.iter().find(|(_, key, _)| *key == name).map_or(name, |(option, _, _)| *option).to_string()
        };
        let mut problems = Vec::new();
        let builder = DeviceBuilder::new(&entries, origin("the device"), |key| label(key.name), &mut problems);
        finish(vec![builder], problems)
            .map_err(|problems| Error::new(ErrorKind::Config, report("the command line", &problems)))
    }

    /// Each option with its key in the file and its value, if it was given.
    fn options(&self) -> [(&'static str, &'static str, Option<Value<'_>>); 12] {
        let socket = match self.fd {
            Some(fd) => ("--fd", "socket", Some(Value::Descriptor(fd))),
            None => ("--socket-path", "socket", self.socket_path.as_deref().map(Value::Path)),
        };
        [
            socket,
            ("--socket-mode", "socket_mode", self.socket_mode.as_deref().map(Value::Text)),
            ("--socket-group", "socket_group", self.socket_group.as_deref().map(Value::Text)),
            ("--blk-file", "image", self.blk_file.as_deref().map(Value::Path)),
            ("--format", "format", self.format.as_deref().map(Value::Text)),
            ("--read-only", "read_only", self.read_only.then_some(Value::Flag(true))),
            ("--cache-size", "cache.size", self.cache_size.as_deref().map(Value::Text)),
            ("--cache-mode", "cache.mode", self.cache_mode.as_deref().map(Value::Text)),
            ("--num-queues", "num_queues", self.num_queues.map(|n| Value::Integer(n.into()))),
            ("--serial", "serial", self.serial.as_deref().map(Value::Text)),
            ("--memory-dir", "cache.memory_dir", self.memory_dir.as_deref().map(Value::Path)),
            ("--sandbox", "sandbox", self.sandbox.as_deref().map(Value::Text)),
        ]
    }
}

/// Parses the arguments, the program's name first.
///
/// # Errors
/// [`ErrorKind::Config`] if the usage or the configuration is wrong.
pub fn action(args: impl IntoIterator<Item = OsString>) -> Result<Action> {
    let args: Vec<OsString> = args.into_iter().collect();
    // Before any parsing: the conventions say that everything else is ignored, errors included.
    if args.iter().skip(1).any(|arg| arg == OsStr::new(PRINT_CAPABILITIES)) {
        return Ok(Action::Print(CAPABILITIES.to_string()));
    }
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) if matches!(e.kind(), ClapKind::DisplayHelp | ClapKind::DisplayVersion) => {
            return Ok(Action::Print(e.render().to_string()));
        }
        Err(e) => {
            let text = e.render().to_string();
            let text = text.trim_end().trim_start_matches("error: ");
            return Err(Error::new(ErrorKind::Config, text));
        }
    };
    if let Some(command) = cli.command {
        return command.action();
    }
    let config = cli.config()?;
    if !cli.check {
        return Ok(match cli.config {
            None => Action::ServeOne(config),
            Some(_) if cli.strict => Action::ServeAll(config),
            Some(_) => Action::Serve(config),
        });
    }
    let source = cli.config.as_deref().map_or("the command line".into(), Path::to_string_lossy);
    Ok(Action::Check { source: source.into_owned(), config })
}

#[cfg(test)]
mod tests;
