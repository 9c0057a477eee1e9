//! The current configuration of a device, with the changes that the operator has made since the start, and the bound
//! that memory pressure sets to the size of its cache.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::config::DeviceConfig;
use crate::disk_protocol::DeviceSettings;

/// See the module. Copies share the configuration.
#[derive(Clone, Debug)]
pub(super) struct CurrentConfig(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    config: Arc<DeviceConfig>,
    /// Bound of the cache's size, while memory is short.
    cache_max: Option<u64>,
    /// The size to which the open cache can grow; `None` before it is opened.
    cache_room: Option<u64>,
}

impl CurrentConfig {
    /// The configuration at the start of a device.
    pub fn new(config: &DeviceConfig) -> Self {
        Self(Arc::new(Mutex::new(State { config: Arc::new(config.clone()), cache_max: None, cache_room: None })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no thread panics with the configuration locked")
    }

    /// The current configuration.
    pub fn get(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.lock().config)
    }

    /// Replaces the configuration.
    ///
    /// => It differs only in keys that may change while the device is served.
    pub fn set(&self, config: Arc<DeviceConfig>) {
        self.lock().config = config;
    }

    /// Bounds the size of the cache. Returns the bound before.
    pub fn bound_cache(&self, cache_max: Option<u64>) -> Option<u64> {
        std::mem::replace(&mut self.lock().cache_max, cache_max)
    }

    /// Records the size to which the cache, now open, can grow.
    pub fn set_cache_room(&self, room_bytes: u64) {
        self.lock().cache_room = Some(room_bytes);
    }

    /// The size to which the cache can grow; `None` before it is opened.
    pub fn cache_room(&self) -> Option<u64> {
        self.lock().cache_room
    }

    /// Whether the cache is smaller than the configured size, for lack of memory.
    pub fn is_bounded(&self) -> bool {
        self.lock().cache_max.is_some()
    }

    /// The size that a cache of this configured size is to have at present.
    pub fn bounded(&self, size_bytes: u64) -> u64 {
        self.lock().cache_max.unwrap_or(u64::MAX).min(size_bytes)
    }

    /// The size that the cache is to have at present.
    pub fn cache_bytes(&self) -> u64 {
        self.bounded(self.get().cache.size_bytes)
    }

    /// What the device's process is to be told.
    pub fn settings(&self) -> DeviceSettings {
        let mut settings = DeviceSettings::from(&*self.get());
        settings.cache.size_bytes = self.bounded(settings.cache.size_bytes);
        settings
    }
}
