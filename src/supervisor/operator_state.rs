//! What the operator does with a device at the moment.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use serde_json::json;

use super::handle::DeviceLink;
use crate::control::change::Refusal;
use crate::store::file::IoLock;

/// What the operator does with a device.
#[derive(Debug, Default)]
pub(super) struct OperatorState(Mutex<ChangeState>);

#[derive(Debug, Default)]
pub(super) struct ChangeState {
    /// The change that is under way.
    change: Option<&'static str>,
    pub freeze: Option<FreezeLease>,
    /// Keys that the last reload found changed, and that take effect only after detach and attach.
    pub pending: Vec<&'static str>,
}

/// A freeze that was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FreezeLease {
    /// Of the process that has frozen the device. Another one writes what its cache holds.
    pub process: IoLock,
    /// Of this freeze alone: the host's clock at its begin, in microseconds.
    pub number: u64,
    pub since: Instant,
    pub until: Instant,
}

impl OperatorState {
    pub fn lock(&self) -> MutexGuard<'_, ChangeState> {
        self.0.lock().expect("no thread panics with the state locked")
    }

    /// The freeze that lasts, unless the process has lost it.
    pub fn freeze(&self, link: Option<&DeviceLink>) -> Option<FreezeLease> {
        let lasts = |freeze: &FreezeLease| {
            freeze.until > Instant::now() && link.is_some_and(|link| link.process.io_lock() == freeze.process)
        };
        self.lock().freeze.filter(lasts)
    }
}

/// A change that is under way. Dropping it ends it.
pub(super) struct UnderWay(Arc<OperatorState>);

impl UnderWay {
    /// Begins a change, unless there is another one.
    pub fn begin(state: &Arc<OperatorState>, device: &str, what: &'static str) -> Result<Self, Refusal> {
        let mut changes = state.lock();
        if let Some(other) = changes.change {
            let busy = format!("{device}: {other}");
            return Err(Refusal::new("Busy", json!({ "what": busy })));
        }
        changes.change = Some(what);
        drop(changes);
        Ok(Self(Arc::clone(state)))
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.lock().change = None;
    }
}
