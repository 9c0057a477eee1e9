//! Feeds libFuzzer's inputs to `inflight_recover`: see `src/fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| genblk::fuzzing::run("inflight_recover", input));
