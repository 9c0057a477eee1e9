//! The operator's changes of a device that are in progress.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;

use super::handle::DeviceLink;
use crate::control::change::Refusal;
use crate::store::file::IoLock;

/// The change that memory pressure makes. It is short, and the operator's changes wait for it.
const STEP: &str = "a change of its cache size";
/// How long they wait at most: the device's process may be stopped.
const STEP_TIMEOUT: Duration = Duration::from_secs(5);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct OperatorState {
    state: Mutex<ChangeState>,
    /// Notified when a change ends.
    ended: Condvar,
}

#[derive(Debug, Default)]
pub(super) struct ChangeState {
    /// The change in progress.
    change: Option<&'static str>,
    pub freeze: Option<FreezeLease>,
    /// Number of detaches that did not wait for other changes (`--force`). They end the wait of the others.
    pub forced: u64,
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
        self.state.lock().expect("no thread panics with the state locked")
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
#[derive(Debug)]
pub(super) struct ChangeGuard(Arc<OperatorState>);

impl ChangeGuard {
    /// Begins a change, unless another one is in progress.
    pub fn begin(state: &Arc<OperatorState>, device: &str, what: &'static str) -> Result<Self, Refusal> {
        let is_step = |changes: &mut ChangeState| changes.change == Some(STEP);
        let waited = state.ended.wait_timeout_while(state.lock(), STEP_TIMEOUT, is_step);
        let (mut changes, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if let Some(other) = changes.change {
            let busy = format!("{device}: {other}");
            return Err(Refusal::new("Busy", json!({ "what": busy })));
        }
        changes.change = Some(what);
        drop(changes);
        Ok(Self(Arc::clone(state)))
    }

    /// Begins a change that memory pressure makes, unless another one is in progress.
    pub fn begin_step(state: &Arc<OperatorState>) -> Option<Self> {
        let mut changes = state.lock();
        if changes.change.is_some() {
            return None;
        }
        changes.change = Some(STEP);
        drop(changes);
        Some(Self(Arc::clone(state)))
    }
}

impl Drop for ChangeGuard {
    fn drop(&mut self) {
        self.0.lock().change = None;
        self.0.ended.notify_all();
    }
}
