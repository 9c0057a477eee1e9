#!/bin/sh
# Runs fuzz targets one after the other: fuzz.sh SECONDS TARGET...
#
# With a nightly compiler and a C++ compiler by libFuzzer, which sees what code an input reaches; new inputs stay in
# target/fuzz. Without them by the unit tests' own loop, which mutates the inputs in fuzz/corpus from a seed.
set -eu

# libFuzzer ends a target without running its destructors, so what it had in shared memory stays.
clean_up() {
    for directory in /dev/shm/genblk-fuzz-*; do
        [ -e "/proc/${directory##*-}" ] || rm -rf "$directory"
    done
}
trap clean_up EXIT

seconds=$1
shift
cd "$(dirname "$0")/.."
host=x86_64-unknown-linux-gnu

# What cargo-fuzz does, which this needs no copy of: code that counts its edges, and checks for memory errors.
coverage="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
-Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
if command -v c++ >/dev/null && cargo +nightly --version >/dev/null 2>&1; then
    echo "fuzz: libFuzzer, $seconds s for each target"
    export CARGO_TARGET_DIR="$PWD/target/fuzz"
    RUSTFLAGS="--cfg fuzzing -Zsanitizer=address $coverage" \
        cargo +nightly build --manifest-path fuzz/Cargo.toml --locked --release --target $host
    for target in "$@"; do
        mkdir -p "target/fuzz/corpus/$target"
        echo "fuzz: $target"
        # Leaks: the device of two targets lives as long as the process.
        ASAN_OPTIONS=detect_leaks=0 "target/fuzz/$host/release/$target" -max_total_time="$seconds" -max_len=2048 \
            -timeout=30 -print_final_stats=1 -verbosity=0 -artifact_prefix="target/fuzz/$target-" \
            "target/fuzz/corpus/$target" "fuzz/corpus/$target"
    done
else
    echo "fuzz: no libFuzzer here (it needs a nightly toolchain and a C++ compiler): mutations of the corpus from a seed"
    GENBLK_FUZZ_SECONDS=$seconds GENBLK_FUZZ_SEED=$(date +%s) \
        cargo test --release --locked --lib fuzzing:: -- --nocapture --test-threads=1
fi
