//! Feeds libFuzzer's inputs to `ring_turn`: see `src/fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| genblk::fuzzing::run("ring_turn", input));
