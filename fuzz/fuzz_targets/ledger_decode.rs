//! Feeds libFuzzer's inputs to `ledger_decode`: see `src/fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| genblk::fuzzing::run("ledger_decode", input));
