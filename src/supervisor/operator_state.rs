//! The operator's changes of a device that are in progress.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use serde_json::json;

use super::handle::DeviceLink;
use crate::control::change::Refusal;
use crate::store::file::IoLock;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct OperatorState(Mutex<ChangeState>);

#[derive(Debug, Default)]
pub(super) struct ChangeState {
    /// The change in progress.
    change: Option<&'static str>,
    pub freeze: Option<FreezeLease>,
    /// Keys that the last reload found changed and that take effect only after detach and attach.
    pub pending: Vec<&'static str>,
}

/// A freeze that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FreezeLease {
    /// The process that has frozen the device. If another process replaces it, that one writes to the image.
    pub process: IoLock,
    /// Identifies this freeze: the host's clock at its start, in microseconds.
    pub number: u64,
    pub since: Instant,
    pub until: Instant,
}

impl OperatorState {
    pub fn lock(&self) -> MutexGuard<'_, ChangeState> {
        self.0.lock().expect("no thread panics with the state locked")
    }

    /// The freeze in progress, unless it was lost with its process.
    pub fn freeze(&self, link: Option<&DeviceLink>) -> Option<FreezeLease> {
        let lasts = |freeze: &FreezeLease| {
            freeze.until > Instant::now() && link.is_some_and(|link| link.process.io_lock() == freeze.process)
        };
        self.lock().freeze.filter(lasts)
    }
}

/// A change in progress. Dropping it ends it.
pub(super) struct UnderWay(Arc<OperatorState>);

impl UnderWay {
    /// Begins a change, unless another one is in progress.
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
