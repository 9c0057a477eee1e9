//! The command line: a configuration file, or one device given by options.
//!
//! The options of a single device go through the table of keys of the configuration file, so they have the same
//! defaults and checks; only the names in the messages differ. The names `--socket-path`, `--fd`,
//! `--print-capabilities`, `--blk-file` and `--read-only` are those of QEMU's "Backend program conventions"
//! (docs/interop/vhost-user.rst), by which management programs find and start a back-end.

mod actions;
mod command;
mod help;
#[cfg(test)]
mod manual;

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use clap::Parser;
use clap::error::ErrorKind as ClapKind;

use crate::config::{Config, DeviceBuilder, Origin, Setting, Value, finish, key, report};
use crate::error::{Error, ErrorKind, Result};

pub use actions::Action;
use command::ClientCommand;

/// Capabilities for management programs (docs/interop/vhost-user.json, VHostUserBackendCapabilitiesBlock).
pub const CAPABILITIES: &str =
    "{\n  \"type\": \"block\",\n  \"features\": [\n    \"read-only\",\n    \"blk-file\"\n  ]\n}\n";

/// Name of a device given by options.
const DEVICE_NAME: &str = "disk0";

const PRINT_CAPABILITIES: &str = "--print-capabilities";

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

    /// Serve no disk unless all can be served; without this, the others are served
    #[arg(long)]
    pub strict: bool,

    /// Print the capabilities of this back-end as JSON and exit; all other options are ignored
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

    /// Image format: auto (refuses qcow2, VMDK, LUKS, gzip and the like), raw [default: auto]
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

    /// Directory in shared memory for the cache, which survives the daemon there, or "systemd" [default: /dev/shm]
    #[arg(long, value_name = "DIR", help_heading = ONE_DEVICE)]
    pub memory_dir: Option<PathBuf>,

    /// Confine the threads that serve the disk: on, off (for debugging) [default: on]
    #[arg(long, value_name = "MODE", help_heading = ONE_DEVICE)]
    pub sandbox: Option<String>,
}

const ONE_DEVICE: &str = "A single device without a configuration file";
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
            let advice = "give --config FILE, or --socket-path (or --fd) and --blk-file; see --help";
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
    // Before any parsing: by the conventions everything else is ignored, including errors.
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
