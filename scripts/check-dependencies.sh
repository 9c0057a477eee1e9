#!/bin/sh
# Checks the dependencies by deny.toml, without the network: licences, sources, duplicates, and known vulnerabilities if
# their database is on this machine. Says aloud what it does not check.
set -eu

cd "$(dirname "$0")/.."
PATH=$PATH:${HOME:-/root}/.cargo/bin
databases=${CARGO_HOME:-${HOME:-/root}/.cargo}/advisory-dbs

skipped() {
    echo "SKIPPED: $1 of the dependencies: $2"
}

if ! cargo deny --version >/dev/null 2>&1; then
    skipped "licences, sources, duplicates and advisories" "there is no cargo-deny (cargo install cargo-deny --locked)"
    exit 0
fi
# cargo-deny also looks at the crates of other systems, which a build does not download.
if ! cargo metadata --locked --offline --format-version 1 >/dev/null 2>&1; then
    skipped "licences, sources, duplicates and advisories" "not all are downloaded (cargo fetch --locked)"
    exit 0
fi
cargo deny --offline check licenses bans sources
if ls "$databases"/advisory-db-* >/dev/null 2>&1; then
    cargo deny --offline check advisories
else
    skipped "advisories" "there is no database in $databases (cargo deny fetch)"
fi
