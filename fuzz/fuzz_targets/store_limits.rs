//! Feeds libFuzzer's inputs to `store_limits`: see `src/fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| genblk::fuzzing::run("store_limits", input));
