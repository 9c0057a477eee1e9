//! The part of a device's configuration that its disk process gets: values, but no path to be opened.

use serde::{Deserialize, Serialize};

use crate::config::{Allocate, CacheMode, DeviceConfig, Discard, LimitsConfig, OnError, Policy, Sandbox};

/// A device as its disk process serves it; the supervisor has checked each value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSettings {
    /// Names the device in logs.
    pub name: String,
    /// The image's path, for messages.
    pub image: String,
    /// The socket, for messages.
    pub socket: String,
    /// Whether the disk is read-only.
    pub read_only: bool,
    /// The disk's serial number.
    pub serial: String,
    /// Largest number of request queues that a front-end may use.
    pub num_queues: u16,
    /// Threads that serve the device's rings.
    pub workers: u16,
    /// Largest ring that a front-end may set up.
    pub queue_size: u16,
    /// How long a worker polls for work before it sleeps, in microseconds.
    pub poll_us: u32,
    /// Whether the process is confined. The first device of a process decides.
    pub sandbox: Sandbox,
    /// How discards affect the image's space.
    pub discard: Discard,
    /// The device's page cache.
    pub cache: CacheSettings,
    /// The guest's rate limits, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsConfig>,
}

/// A device's page cache. The keys of the configuration have the same names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheSettings {
    /// Memory for cached pages in bytes.
    pub size_bytes: u64,
    /// When a write completes.
    pub mode: CacheMode,
    /// Replacement policy.
    pub policy: Policy,
    /// Largest readahead window in bytes.
    pub readahead_max_bytes: u64,
    /// Target duration of a FLUSH.
    pub flush_target_ms: u32,
    /// Upper bound of the dirty limit, as a share of the cache.
    pub dirty_max_percent: u8,
    /// Age at which a dirty page is written back.
    pub dirty_age_max_ms: u32,
    /// When space is allocated for a hole of the image.
    pub allocate: Allocate,
    /// What happens to requests while writes to the image fail.
    pub on_error: OnError,
    /// The same, while the image is out of space.
    pub on_full: OnError,
    /// Longest time that requests wait for the image.
    pub hold_max_ms: u32,
}

impl DeviceSettings {
    /// Whether the process that serves the device is confined.
    pub fn is_confined(&self) -> bool {
        self.sandbox == Sandbox::On
    }
}

impl From<&DeviceConfig> for DeviceSettings {
    fn from(config: &DeviceConfig) -> Self {
        let cache = &config.cache;
        Self {
            name: config.name.clone(),
            image: config.image.display().to_string(),
            socket: config.socket.to_string(),
            read_only: config.read_only,
            serial: config.serial.clone(),
            num_queues: config.num_queues,
            workers: config.workers,
            queue_size: config.queue_size,
            poll_us: config.poll_us,
            sandbox: config.sandbox,
            discard: config.discard,
            cache: CacheSettings {
                size_bytes: cache.size_bytes,
                mode: cache.mode,
                policy: cache.policy,
                readahead_max_bytes: cache.readahead_max_bytes,
                flush_target_ms: cache.flush_target_ms,
                dirty_max_percent: cache.dirty_max_percent,
                dirty_age_max_ms: cache.dirty_age_max_ms,
                allocate: cache.allocate,
                on_error: cache.on_error,
                on_full: cache.on_full,
                hold_max_ms: cache.hold_max_ms,
            },
            limits: Some(config.limits).filter(LimitsConfig::is_set),
        }
    }
}
