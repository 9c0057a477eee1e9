//! The configuration of a device as it is in force: what the operator has changed since the start is in it.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::config::DeviceConfig;

/// See the module. Copies share the configuration.
#[derive(Clone, Debug)]
pub(super) struct InForce(Arc<Mutex<Arc<DeviceConfig>>>);

impl InForce {
    /// The configuration of a device that starts.
    pub fn new(config: &DeviceConfig) -> Self {
        Self(Arc::new(Mutex::new(Arc::new(config.clone()))))
    }

    fn lock(&self) -> MutexGuard<'_, Arc<DeviceConfig>> {
        self.0.lock().expect("no thread panics with the configuration locked")
    }

    /// The configuration at present.
    pub fn get(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.lock())
    }

    /// Puts another one in force. It differs in keys that may change while the device is served.
    pub fn set(&self, config: Arc<DeviceConfig>) {
        *self.lock() = config;
    }
}
