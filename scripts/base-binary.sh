#!/bin/sh
# Builds the release binary of another commit, for `make bench BASE=commit`. Prints its path; all else goes to stderr.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
commit=$(git -C "$root" rev-parse --verify --short=12 "$1^{commit}")
binary=$root/target/base/genblk-$commit
if [ ! -x "$binary" ]; then
    sources=$root/target/base/sources
    rm -rf "$sources"
    mkdir -p "$sources"
    git -C "$root" archive "$commit" | tar -x -C "$sources"
    (cd "$sources" && CARGO_TARGET_DIR="$root/target/base/build" cargo build --release --locked --bin genblk) >&2
    cp "$root/target/base/build/release/genblk" "$binary"
    rm -rf "$sources"
fi
echo "$binary"
