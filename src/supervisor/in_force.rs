//! The current configuration of a device, with the changes that the operator has made since the start.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::config::DeviceConfig;

/// See the module. Copies share the configuration.
#[derive(Clone, Debug)]
pub(super) struct InForce(Arc<Mutex<Arc<DeviceConfig>>>);

impl InForce {
    /// The configuration at the start of a device.
    pub fn new(config: &DeviceConfig) -> Self {
        Self(Arc::new(Mutex::new(Arc::new(config.clone()))))
    }

    fn lock(&self) -> MutexGuard<'_, Arc<DeviceConfig>> {
        self.0.lock().expect("no thread panics with the configuration locked")
    }

    /// The current configuration.
    pub fn get(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.lock())
    }

    /// Replaces the configuration.
    ///
    /// => It differs only in keys that may change while the device is served.
    pub fn set(&self, config: Arc<DeviceConfig>) {
        *self.lock() = config;
    }
}
