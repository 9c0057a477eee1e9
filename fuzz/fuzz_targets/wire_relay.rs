//! Feeds libFuzzer's inputs to `wire_relay`: see `src/fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| genblk::fuzzing::run("wire_relay", input));
