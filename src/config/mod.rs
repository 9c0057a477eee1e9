//! The configuration: devices, their images, their caches.
//!
//! A TOML file (`Config::load`) and the command line (`cli.rs`) share one table of keys (`keys.rs`), which holds each
//! key's default, its range and the field it sets. All problems of a configuration are reported together, each with its
//! key and line, before anything starts.

mod device_builder;
mod document;
mod keys;
mod problem;
mod runtime;
mod shown;
mod size;
mod values;

use std::fmt;
use std::fs;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

pub(crate) use device_builder::{DeviceBuilder, Origin, Setting, finish};
#[cfg(test)]
pub(crate) use keys::documented_keys;
pub(crate) use keys::key;
pub use problem::Problem;
pub(crate) use problem::report;
pub use runtime::{LIVE_KEYS, RuntimeConfig, changed, check_conflicts, device_of, with_keys_of};
pub use shown::{device_table, differing_keys};
pub(crate) use size::parse_size;
pub(crate) use values::{SYSTEMD, Value};

/// The configuration of a daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The devices in the order of the file; at least one, unless there is a control socket.
    pub devices: Vec<DeviceConfig>,
    /// The control socket, if one is configured.
    pub control: Option<ControlConfig>,
    /// The file from which it was read.
    pub source: Option<PathBuf>,
}

/// The socket through which other programs observe and change the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlConfig {
    /// Path of the socket.
    pub socket: PathBuf,
    /// Name or number of the group that may connect; empty: only the daemon's own user.
    pub group: String,
}

impl Config {
    /// Reads and checks the TOML file at `path`.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if the file cannot be read or is invalid. The text has one line per problem, in the form
    /// `FILE:LINE: KEY: MESSAGE`.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|e| {
            Error::io(ErrorKind::Config, format!("cannot read the configuration {}", path.display()), e)
        })?;
        let config = Self::from_toml(&text)
            .map_err(|problems| Error::new(ErrorKind::Config, report(&path.display().to_string(), &problems)))?;
        Ok(Self { source: Some(path.into()), ..config })
    }

    /// Checks a TOML document.
    ///
    /// # Errors
    /// Every problem in the document, in the order of its lines. If the text is not TOML, only the syntax errors:
    /// further problems of a half-parsed document would be misleading.
    pub fn from_toml(text: &str) -> std::result::Result<Self, Vec<Problem>> {
        let mut problems = Vec::new();
        let (builders, control) = document::parse(text, &mut problems);
        finish(builders, problems).map(|config| Self { control, ..config })
    }
}

/// One virtio-blk device: a socket on one side, an image on the other, a cache in between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Names the device in logs and statistics; unique.
    pub name: String,
    /// The socket to which front-ends connect.
    pub socket: Socket,
    /// Mode of the socket's file, if the daemon binds it.
    pub socket_mode: u32,
    /// Name or number of the file's group; empty: the daemon's own.
    pub socket_group: String,
    /// The raw file or block device behind the disk, or the canonical URI of an NBD export.
    pub image: PathBuf,
    /// The format of the image.
    pub format: ImageFormat,
    /// Whether the disk is read-only.
    pub read_only: bool,
    /// Whether a read-only device has its own cache. Otherwise all read-only devices on one image share one.
    pub isolate: bool,
    /// The disk's serial number (GET_ID): at most 20 bytes of ASCII.
    pub serial: String,
    /// Largest number of request queues that a front-end may use.
    pub num_queues: u16,
    /// Threads that serve the device's rings; never more than `num_queues`.
    pub workers: u16,
    /// Largest ring, in descriptors, that a front-end may set up; a power of two.
    pub queue_size: u16,
    /// How long a worker polls for work before it sleeps, in microseconds; 0 = no polling.
    pub poll_us: u32,
    /// Most restarts of its disk process in a minute.
    pub restart_burst: u32,
    /// How the image is read and written.
    pub engine: Engine,
    /// Whether the image is opened with O_DIRECT if its file system supports that.
    pub direct: bool,
    /// The effect of DISCARD, and of WRITE ZEROES that may unmap, on the image's space.
    pub discard: Discard,
    /// Whether the threads that serve the device are confined.
    pub sandbox: Sandbox,
    /// The user that the disk's process runs as; empty: the daemon's own.
    pub user: String,
    /// The devices of a group share one disk process; empty: the device's image has its own.
    pub group: String,
    /// How the server of a remote image is treated.
    pub nbd: NbdConfig,
    /// The guest's rate limits.
    pub limits: LimitsConfig,
    /// The device's page cache.
    pub cache: CacheConfig,
}

impl DeviceConfig {
    /// A device with every default of the table of keys; the caller has checked the three values.
    pub fn new(name: impl Into<String>, socket: Socket, image: impl Into<PathBuf>) -> Self {
        let mut device = Self { name: name.into(), socket, image: image.into(), ..Self::unset() };
        keys::set_defaults(&mut device);
        device
    }

    /// A device of empty and zero values, which the table of keys fills.
    fn unset() -> Self {
        Self {
            name: String::new(),
            socket: Socket::Path(PathBuf::new()),
            socket_mode: 0,
            socket_group: String::new(),
            image: PathBuf::new(),
            format: ImageFormat::Auto,
            read_only: false,
            isolate: false,
            serial: String::new(),
            num_queues: 0,
            workers: 0,
            queue_size: 0,
            poll_us: 0,
            restart_burst: 0,
            engine: Engine::Auto,
            direct: false,
            discard: Discard::Unmap,
            sandbox: Sandbox::On,
            user: String::new(),
            group: String::new(),
            nbd: NbdConfig { flush: NbdFlush::Required, give_up_ms: 0, quarantine_ms: 0 },
            limits: LimitsConfig::default(),
            cache: CacheConfig {
                size_bytes: 0,
                size_max_bytes: 0,
                size_min_bytes: 0,
                mode: CacheMode::None,
                policy: Policy::S3Fifo,
                readahead_max_bytes: 0,
                flush_target_ms: 0,
                dirty_max_percent: 0,
                dirty_age_max_ms: 0,
                allocate: Allocate::OnWrite,
                on_error: OnError::Report,
                on_full: OnError::Report,
                hold_max_ms: 0,
                survive: Survive::Auto,
                warm_dir: String::new(),
                memory_dir: MemoryDir::Systemd,
            },
        }
    }
}

/// How an NBD server is treated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdConfig {
    /// How a server without FLUSH is treated.
    pub flush: NbdFlush,
    /// How long to try to reconnect; 0 = forever.
    pub give_up_ms: u32,
    /// How long a server may still execute requests of a broken connection.
    pub quarantine_ms: u32,
}

/// Limits of the rates at which a guest's requests start; 0 = no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LimitsConfig {
    /// Reads per second.
    pub read_iops: u32,
    /// Writes, discards and write-zeroes per second.
    pub write_iops: u32,
    /// All of these per second.
    pub total_iops: u32,
    /// Bytes read per second.
    pub read_bytes_per_second: u64,
    /// Bytes written per second.
    pub write_bytes_per_second: u64,
    /// Bytes read and written per second.
    pub total_bytes_per_second: u64,
    /// For how long a guest saves the unused part of its limits.
    pub burst_ms: u32,
}

impl LimitsConfig {
    /// Whether there is a limit.
    pub fn is_set(&self) -> bool {
        Self { burst_ms: 0, ..*self } != Self::default()
    }
}

/// The socket to which front-ends connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Socket {
    /// A Unix domain socket that the daemon binds.
    Path(PathBuf),
    /// A listening socket that the daemon inherited.
    Fd(RawFd),
}

impl fmt::Display for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Fd(fd) => write!(f, "descriptor {fd}"),
        }
    }
}

/// The page cache of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheConfig {
    /// Memory for cached pages; a multiple of the page size.
    pub size_bytes: u64,
    /// The size to which it can grow while it is used; 0: see [`CacheConfig::room_bytes`].
    pub size_max_bytes: u64,
    /// To which size memory pressure may shrink it; 0: it keeps its size.
    pub size_min_bytes: u64,
    /// When a write completes.
    pub mode: CacheMode,
    /// Replacement policy.
    pub policy: Policy,
    /// Largest readahead window; 0 = no readahead.
    pub readahead_max_bytes: u64,
    /// Target duration of a FLUSH: the dirty limit is what the image can write in that time.
    pub flush_target_ms: u32,
    /// Upper bound of the dirty limit, as a share of the cache.
    pub dirty_max_percent: u8,
    /// Age at which a dirty page is written back even if nothing else requires it.
    pub dirty_age_max_ms: u32,
    /// When space is allocated for a hole of the image.
    pub allocate: Allocate,
    /// What happens to requests while writes to the image fail.
    pub on_error: OnError,
    /// The same, while the image is out of space.
    pub on_full: OnError,
    /// Longest time that requests wait for the image (`hold`).
    pub hold_max_ms: u32,
    /// Whether the cache survives the daemon.
    pub survive: Survive,
    /// Directory in which a clean stop lists the pages in memory; empty: none.
    pub warm_dir: String,
    /// Shared memory that holds a surviving cache.
    pub memory_dir: MemoryDir,
}

/// The smallest size of a cache.
const SIZE_BYTES_MIN: u64 = 4 << 20;
/// The default of `size_max` is the size times this.
const ROOM_FACTOR: u64 = 4;
/// The largest size of a cache: a frame number has 31 bits.
const SIZE_BYTES_MAX: u64 = 8 << 40;

impl CacheConfig {
    /// The size to which a cache that is opened with this configuration can grow.
    pub fn room_bytes(&self) -> u64 {
        match self.size_max_bytes {
            0 => self.size_bytes.saturating_mul(ROOM_FACTOR).min(SIZE_BYTES_MAX).max(self.size_bytes),
            room => room.max(self.size_bytes),
        }
    }
}

/// Shared memory that holds a surviving cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryDir {
    /// A file below this directory.
    Path(PathBuf),
    /// A memfd in systemd's file descriptor store.
    Systemd,
}

/// An enum whose values are words of the configuration.
macro_rules! words {
    ($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $value:ident = $word:literal),+ $(,)? }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $name { $($(#[$inner])* $value),+ }

        impl $name {
            /// Every value, in the order of `WORDS`.
            pub const ALL: &'static [Self] = &[$(Self::$value),+];
            /// The words of the configuration, in the order of `ALL`.
            pub const WORDS: &'static [&'static str] = &[$($word),+];
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Self::$value => $word),+ })
            }
        }
    };
}

words! {
    /// The format of an image.
    ImageFormat {
        /// Raw: an image that looks like another format is refused.
        Auto = "auto",
        /// Raw, whatever it looks like.
        Raw = "raw",
    }
}

words! {
    /// How the image is read and written.
    Engine {
        /// io_uring, or threads if io_uring is not available.
        Auto = "auto",
        /// io_uring; the device does not start without it.
        IoUring = "io_uring",
        /// pread and pwrite on helper threads.
        Threads = "threads",
    }
}

words! {
    /// When a write completes.
    CacheMode {
        /// Once its data is in the cache; a FLUSH makes it durable.
        Writeback = "writeback",
        /// Once its data is durable on the image.
        Writethrough = "writethrough",
        /// Nothing is cached: every request goes to the image.
        None = "none",
    }
}

words! {
    /// How an NBD server without FLUSH is treated.
    NbdFlush {
        /// Refused for writing.
        Required = "required",
        /// It has no volatile cache: completed writes are durable.
        None = "none",
    }
}

words! {
    /// The effect of a guest's discards on the image's space.
    Discard {
        /// The space is freed.
        Unmap = "unmap",
        /// The space stays allocated.
        Ignore = "ignore",
    }
}

words! {
    /// Whether the threads that serve a device are confined.
    Sandbox {
        /// Confined.
        On = "on",
        /// Not confined, for debugging.
        Off = "off",
    }
}

words! {
    /// When space is allocated for a hole of the image.
    Allocate {
        /// Before the write that fills it completes.
        OnWrite = "on-write",
        /// When it is written back.
        OnWriteback = "on-writeback",
    }
}

words! {
    /// What happens to requests that need the image while writes to it fail.
    OnError {
        /// They fail.
        Report = "report",
        /// They wait for the image.
        Hold = "hold",
        /// They fail, and genblk does no I/O on the image until the operator resumes it.
        Stop = "stop",
    }
}

words! {
    /// Whether the cache survives the daemon.
    Survive {
        /// If suitable memory is available; otherwise a warning is logged.
        Auto = "auto",
        /// Yes, or the device does not start.
        Always = "always",
        /// No. A guest whose completed writes were lost gets I/O errors.
        Never = "never",
    }
}

words! {
    /// Replacement policy.
    Policy {
        /// S3-FIFO: only a page that is used twice stays, so a scan does not evict the working set.
        S3Fifo = "s3fifo",
        /// Least recently used: for comparison.
        Lru = "lru",
    }
}

#[cfg(test)]
mod tests;
