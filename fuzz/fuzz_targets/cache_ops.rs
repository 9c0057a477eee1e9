//! Feeds libFuzzer's inputs to `cache_ops`: see `src/fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| genblk::fuzzing::run("cache_ops", input));
