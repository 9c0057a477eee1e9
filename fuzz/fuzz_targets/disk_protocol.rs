//! Feeds libFuzzer's inputs to `disk_protocol`: see `src/fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| genblk::fuzzing::run("disk_protocol", input));
