//! Feeds libFuzzer's inputs to `request_parse`: see `src/fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| genblk::fuzzing::run("request_parse", input));
