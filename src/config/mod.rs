//! What the operator asks for: devices, their images, their caches.
//!
//! A TOML file (`Config::load`) and the command line (`cli.rs`) both end here and obey one table of keys (`keys.rs`),
//! which holds each key's default, its range and where its value goes. A wrong configuration is reported whole: every
//! problem with its key and line, so that one attempt shows all there is to mend, and nothing has been started by then.

mod device_builder;
mod document;
mod keys;
mod problem;
mod size;

use std::fmt;
use std::fs;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

pub(crate) use device_builder::{DeviceBuilder, Origin, Setting, finish};
pub(crate) use keys::{SYSTEMD, Value, key};
pub use problem::Problem;
pub(crate) use problem::report;

/// Everything that the daemon serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The devices in the order of the file; at least one.
    pub devices: Vec<DeviceConfig>,
}

impl Config {
    /// Reads and checks the TOML file at `path`.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when the file can't be read, and when anything in it is wrong; the text then has one line
    /// for every problem, in the form `FILE:LINE: KEY: MESSAGE`.
    pub fn load(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(|e| {
            Error::io(ErrorKind::Config, format!("cannot read the configuration {}", path.display()), e)
        })?;
        Self::from_toml(&text)
            .map_err(|problems| Error::new(ErrorKind::Config, report(&path.display().to_string(), &problems)))
    }

    /// Checks a TOML document.
    ///
    /// # Errors
    /// Every problem in the document, in the order of its lines. Where the text isn't TOML at all, only its syntax
    /// errors: what a half-understood document seems to say further on would mislead.
    pub fn from_toml(text: &str) -> std::result::Result<Self, Vec<Problem>> {
        let mut problems = Vec::new();
        let builders = document::parse(text, &mut problems);
        finish(builders, problems)
    }
}

/// One virtio-blk device: a socket on one side, an image on the other, a cache in between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Names the device in logs and statistics; unique.
    pub name: String,
    /// Where front-ends connect.
    pub socket: Socket,
    /// The raw file or block device behind the disk.
    pub image: PathBuf,
    /// Whether the guest may only read.
    pub read_only: bool,
    /// What the guest reads as the disk's serial (GET_ID): at most 20 bytes of ASCII.
    pub serial: String,
    /// Largest number of request queues that a front-end may use.
    pub num_queues: u16,
    /// Threads that serve the device's rings; never more than `num_queues`.
    pub workers: u16,
    /// Largest ring, in descriptors, that a front-end may set up; a power of two.
    pub queue_size: u16,
    /// How long a worker looks for more work before it sleeps, in microseconds; 0 = it never polls.
    pub poll_us: u32,
    /// How the image is read and written.
    pub engine: Engine,
    /// Whether the image is opened with O_DIRECT where its file system allows it.
    pub direct: bool,
    /// The device's page cache.
    pub cache: CacheConfig,
}

impl DeviceConfig {
    /// A device with every default of the table of keys, for callers that have checked the three values themselves.
    pub fn new(name: impl Into<String>, socket: Socket, image: impl Into<PathBuf>) -> Self {
        let mut device = Self { name: name.into(), socket, image: image.into(), ..Self::unset() };
        keys::set_defaults(&mut device);
        device
    }

    /// A device of empty and zero values, to be filled from the table of keys.
    fn unset() -> Self {
        Self {
            name: String::new(),
            socket: Socket::Path(PathBuf::new()),
            image: PathBuf::new(),
            read_only: false,
            serial: String::new(),
            num_queues: 0,
            workers: 0,
            queue_size: 0,
            poll_us: 0,
            engine: Engine::Auto,
            direct: false,
            cache: CacheConfig {
                size_bytes: 0,
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
                memory_dir: MemoryDir::Systemd,
            },
        }
    }
}

/// Where front-ends connect.
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
    /// When a write counts as done.
    pub mode: CacheMode,
    /// Which page makes room for another.
    pub policy: Policy,
    /// Largest readahead window; 0 = no readahead.
    pub readahead_max_bytes: u64,
    /// How long a FLUSH may take: the dirty limit is what the image can write in that time.
    pub flush_target_ms: u32,
    /// Upper bound of the dirty limit, as a share of the cache.
    pub dirty_max_percent: u8,
    /// Age at which a dirty page is written back even if nothing else asks for it.
    pub dirty_age_max_ms: u32,
    /// When a hole of the image gets its space.
    pub allocate: Allocate,
    /// What becomes of requests while the image fails to take writes.
    pub on_error: OnError,
    /// The same, where the image has no space.
    pub on_full: OnError,
    /// Longest time that requests wait for an image, where they do.
    pub hold_max_ms: u32,
    /// Whether the cache outlives the daemon.
    pub survive: Survive,
    /// Shared memory in which it does.
    pub memory_dir: MemoryDir,
}

/// Shared memory in which a cache outlives the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryDir {
    /// A file below this directory.
    Path(PathBuf),
    /// Memory without a name, kept by the service manager.
    Systemd,
}

/// An enum whose values are words of the configuration.
macro_rules! words {
    ($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $value:ident = $word:literal),+ $(,)? }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// How the image is read and written.
    Engine {
        /// io_uring, or threads where the host forbids it.
        Auto = "auto",
        /// io_uring or nothing.
        IoUring = "io_uring",
        /// pread and pwrite on helper threads.
        Threads = "threads",
    }
}

words! {
    /// When a write counts as done.
    CacheMode {
        /// When its bytes are in the cache; a FLUSH makes them durable.
        Writeback = "writeback",
        /// When its bytes are durable on the image.
        Writethrough = "writethrough",
        /// Nothing is cached: every request goes to the image.
        None = "none",
    }
}

words! {
    /// When a hole of the image gets its space.
    Allocate {
        /// Before the write that fills it completes.
        OnWrite = "on-write",
        /// When it is written back.
        OnWriteback = "on-writeback",
    }
}

words! {
    /// What becomes of requests that need the image while it fails to take writes.
    OnError {
        /// They fail.
        Report = "report",
        /// They wait for it.
        Hold = "hold",
        /// They fail, and the image is left alone until the operator resumes.
        Stop = "stop",
    }
}

words! {
    /// Whether the cache outlives the daemon.
    Survive {
        /// Where the memory for that can be had; the log says where it can't.
        Auto = "auto",
        /// Or the device is not served.
        Always = "always",
        /// It goes with the daemon, and a guest whose completed writes went with it gets I/O errors.
        Never = "never",
    }
}

words! {
    /// Which page makes room for another.
    Policy {
        /// S3-FIFO: a page must be used twice to stay, so a scan passes through without pushing the rest out.
        S3Fifo = "s3fifo",
        /// Least recently used: for comparison.
        Lru = "lru",
    }
}

#[cfg(test)]
mod tests;
