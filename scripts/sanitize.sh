#!/bin/sh
# Runs tests under Miri and the sanitizers: sanitize.sh [miri|address|thread]... (all of them). Names what cannot run.
set -eu
cd "$(dirname "$0")/.."
host=x86_64-unknown-linux-gnu
[ $# -gt 0 ] || set -- miri address thread

if ! cargo +nightly --version >/dev/null 2>&1; then
    echo "sanitize: skipped: no nightly toolchain (rustup toolchain install nightly -c miri -c rust-src)"
    exit 0
fi
for kind in "$@"; do
    case $kind in
    miri)
        if ! cargo +nightly miri --version >/dev/null 2>&1; then
            echo "sanitize: Miri skipped: no such component (rustup component add miri rust-src --toolchain nightly)"
            continue
        fi
        # Only what makes no system call that Miri lacks. Its guest memory is anonymous, which Miri knows.
        # Guest memory is shared with the guest: addresses come from integers there.
        MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-permissive-provenance" CARGO_TARGET_DIR=target/miri \
            cargo +nightly miri test --locked --lib -- virtio::chain virtio::guest_copy virtio::request:: virtio::split \
            virtio::ram device::inflight arena::ledger cache::runs cache::pages units::
        ;;
    address)
        # Overflow checks and debug assertions are on in the test profile.
        RUSTFLAGS="-Zsanitizer=address" CARGO_TARGET_DIR=target/address ASAN_OPTIONS=detect_leaks=0 \
            cargo +nightly test --locked --target $host --test conformance
        ;;
    thread)
        if [ ! -d "$(rustc +nightly --print sysroot)/lib/rustlib/src" ]; then
            echo "sanitize: ThreadSanitizer skipped: it needs a std of its own (rustup component add rust-src --toolchain nightly)"
            continue
        fi
        # Copies between guest memory and frames race by design: see src/virtio/guest_copy.rs.
        printf 'race:genblk::virtio::guest_copy\nrace:genblk::device::copy\n' >target/tsan.suppressions
        RUSTFLAGS="-Zsanitizer=thread" CARGO_TARGET_DIR=target/thread GENBLK_TEST_WORKERS=4 \
            TSAN_OPTIONS="suppressions=$PWD/target/tsan.suppressions" \
            cargo +nightly test -Zbuild-std --locked --target $host --test end_to_end
        ;;
    *)
        echo "sanitize: unknown: $kind" >&2
        exit 2
        ;;
    esac
done
