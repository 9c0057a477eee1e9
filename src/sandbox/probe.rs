//! Violations on demand, for `tests/sandbox.rs`: a confined thread tries actions of an attacker.
//!
//! Only a binary with debug assertions, as built by `cargo test`, contains this; a release build ignores the variables.
//! (`cfg(test)` does not apply to the binary that integration tests run, and a feature would need a second build, which
//! a plain `cargo test` would not make.)
//!
//! - `GENBLK_SANDBOX_TRY="KIND ACTION"`: the first thread of that kind performs the action once it is confined.
//! - `GENBLK_SANDBOX_WITHOUT="FENCE ..."`: these fences are not applied.

use std::env;
use std::sync::Once;

use log::info;

use super::{Confinement, ThreadKind};
use crate::sys::trespass;

/// Whether a test removes a fence.
pub(super) fn is_disabled_by_test(fence: Confinement) -> bool {
    let fences = env::var("GENBLK_SANDBOX_WITHOUT").unwrap_or_default();
    fences.split(' ').any(|name| name == fence.to_string())
}

/// Performs the action that a test requests from threads of this kind, and logs its result.
pub(super) fn run(kind: ThreadKind) {
    static ONE: Once = Once::new();
    let wish = env::var("GENBLK_SANDBOX_TRY").unwrap_or_default();
    let Some((of_kind, action)) = wish.split_once(' ') else { return };
    if of_kind == format!("{kind:?}").to_lowercase() {
        ONE.call_once(|| match trespass::attempt(action) {
            Ok(()) => info!("trespass: {action} succeeded"),
            Err(e) => info!("trespass: {action} failed: {e}"),
        });
    }
}
