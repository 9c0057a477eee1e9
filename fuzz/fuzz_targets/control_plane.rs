//! Feeds libFuzzer's inputs to `control_plane`: see `src/fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| genblk::fuzzing::run("control_plane", input));
