//! What the fuzzers feed: one function for each part of genblk that takes bytes from a source that it does not trust.
//!
//! Each function takes any bytes and panics if the part breaks a promise. `fuzz/` has a libFuzzer target for each. The
//! unit tests run every function over the inputs in `fuzz/corpus`, and over mutations of them for as long as
//! `GENBLK_FUZZ_SECONDS` says.
//!
//! Compiled for tests and for fuzzers (`--cfg fuzzing`) only.

#![allow(clippy::cast_possible_truncation, reason = "what the targets count is small")]

mod cache_ops;
mod files;
mod guest;
mod input;
mod processes;
mod sessions;
#[cfg(test)]
mod tests;

/// A part under test: a name, and what to do with an input.
pub type Target = (&'static str, fn(&[u8]));

/// Every target. `fuzz/fuzz_targets` has one file for each.
pub const TARGETS: [Target; 10] = [
    ("request_parse", guest::request_parse),
    ("ring_turn", guest::ring_turn),
    ("inflight_recover", guest::inflight_recover),
    ("wire_relay", sessions::wire_relay),
    ("control_plane", sessions::control_plane),
    ("cache_ops", cache_ops::cache_ops),
    ("ledger_decode", files::ledger_decode),
    ("config", files::config),
    ("store_limits", files::store_limits),
    ("disk_protocol", processes::disk_protocol),
];

/// Runs a target.
///
/// # Panics
/// If there is no target of this name, or it finds a bug.
pub fn run(name: &str, input: &[u8]) {
    let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).expect("a target of this name");
    target(input);
}
