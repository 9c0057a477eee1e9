//! Feeds libFuzzer's inputs to `config`: see `src/fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| genblk::fuzzing::run("config", input));
