#!/bin/sh
# Builds the Debian package. "scripts/deb.sh PROFILE" takes a binary of that cargo profile (release unless given). Prints
# the path of the package.
set -eu

cd "$(dirname "$0")/.."
PATH=$PATH:${HOME:-/root}/.cargo/bin
profile=${1:-release}

if ! cargo deb --version >/dev/null 2>&1; then
    echo "deb: there is no cargo-deb:  cargo install cargo-deb --locked" >&2
    exit 3
fi

# The units are those of configs/, for a binary that a package has installed.
units=target/package/systemd
rm -rf target/package
mkdir -p "$units"
sed 's|/usr/local/bin/|/usr/bin/|' configs/genblk.service >"$units/genblk.service"
# One disk, or a few, of a daemon of its own: its sockets are below /run/genblk-NAME, which is for its user alone.
sed -e 's|^Description=.*|Description=Disks of %i (vhost-user-blk) with a page cache|' \
    -e 's|/etc/genblk\.toml$|/etc/genblk/%i.toml|' \
    -e 's|^RuntimeDirectory=genblk$|RuntimeDirectory=genblk-%i|' \
    -e 's|^ExecReload=/usr/bin/genblk reload$|& --socket /run/genblk-%i/control.sock|' \
    "$units/genblk.service" >"$units/genblk@.service"
for unit in genblk.service genblk@.service; do
    grep -q '^ExecStart=/usr/bin/genblk --config /etc/genblk' "$units/$unit" || {
        echo "deb: $unit does not start /usr/bin/genblk" >&2
        exit 1
    }
    grep -q '^ExecReload=/usr/bin/genblk reload' "$units/$unit" || {
        echo "deb: $unit does not reload with /usr/bin/genblk" >&2
        exit 1
    }
done
cp packaging/systemd/genblk-exporter.socket packaging/systemd/genblk-exporter.service "$units/"

# The documents lie in one directory, and link to each other and to other files of the package.
doc=target/package/doc
mkdir -p "$doc"
cp src/control/io.genblk.Control.varlink "$doc/"
for page in ARCHITECTURE.md SECURITY.md docs/*.md; do
    sed -e 's#](\(\.\./\)*configs/genblk\.service#](/usr/lib/systemd/system/genblk.service#g' \
        -e 's#](\.\./packaging/systemd/#](/usr/lib/systemd/system/#g' \
        -e 's#](\(\.\./\)*configs/#](examples/#g' \
        -e 's#](\.\./packaging/\(grafana\|prometheus\)/#](\1/#g' \
        -e 's#](\.\./src/control/#](#g' \
        -e 's#](docs/#](#g' \
        -e 's#](\.\./#](#g' \
        "$page" >"$doc/${page##*/}"
done

[ "$profile" = dev ] || cargo build --quiet --locked --profile "$profile"
cargo deb --quiet --locked --no-build --profile "$profile"
