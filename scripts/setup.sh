#!/bin/sh
# Prepares a Debian or Ubuntu machine for building and testing genblk. Run it as often as you like: it does only what
# is missing, and is quick when nothing is.
#
# It leaves the host as it is. apt adds packages and removes none; the guest's kernel is unpacked under target/guest/
# and never installed, so no boot loader learns of it, and Prometheus under target/prometheus, so no service starts; the
# list of package sources does not change. The Rust toolchain is checked, not installed.
set -eu

PATH=$PATH:/usr/sbin:/sbin:${HOME:-/root}/.cargo/bin
root=$(cd "$(dirname "$0")/.." && pwd)
guest=$root/target/guest

say() {
    echo "setup: $*"
}

die() {
    echo "setup: $*" >&2
    exit 1
}

has() {
    command -v "$1" >/dev/null
}

# Temporary files, apt's lists for one installation among them.
work=
scratch() {
    [ -n "$work" ] || work=$(mktemp -d)
}
trap '[ -z "$work" ] || rm -rf "$work"' EXIT

# The toolchain.

check_rust() {
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
    if ! has cargo; then
        die "there is no Rust toolchain, and genblk needs Rust $wanted or newer.
       Debian 13, Ubuntu 24.04 or newer:  apt-get install rustup && rustup default stable
       Otherwise follow https://rustup.rs"
    fi
    # In the repository, because rust-toolchain.toml chooses the toolchain there.
    found=$(cd "$root" && rustc --version) || die "rustc does not run; see above"
    version=$(echo "$found" | sed 's/^rustc \([0-9.]*\).*/\1/')
    if [ "$(printf '%s\n' "$wanted" "$version" | sort -V | head -n 1)" != "$wanted" ]; then
        die "genblk needs Rust $wanted or newer, and this is $version.  With rustup:  rustup update stable"
    fi
}

# What is missing.

missing=
reasons=

# need PACKAGE REASON COMMAND...: the package is missing unless the command succeeds.
need() {
    package=$1
    reason=$2
    shift 2
    if ! "$@" >/dev/null 2>&1; then
        missing="$missing $package"
        reasons="$reasons$(printf '  %-20s %s' "$package" "$reason")
"
    fi
}

static_busybox() {
    has busybox && ! ldd "$(command -v busybox)" 2>/dev/null | grep '=>'
}

guest_kernel() {
    "$root/tests/guest/mkinitramfs.sh" --kernel
}

# apt.

# Root does things itself; everybody else needs sudo.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif has sudo; then
        sudo "$@"
    else
        die "this needs root, and there is no sudo: $*"
    fi
}

quiet=-q
[ ! -t 1 ] || quiet=

updated=
update_lists() {
    if [ -z "$updated" ]; then
        say "fetching the lists of packages"
        as_root apt-get -qq -o DPkg::Lock::Timeout=300 update
        updated=yes
    fi
}

# The options that every installation has, tried or real.
options="-y --no-install-recommends --no-remove"

can_install() { # [OPTION...] PACKAGE...
    # shellcheck disable=SC2086
    apt-get -s $options install "$@" >/dev/null 2>&1
}

install() { # [OPTION...] PACKAGE...
    # shellcheck disable=SC2086
    as_root env DEBIAN_FRONTEND=noninteractive \
        apt-get $quiet $options -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 install "$@"
}

# QEMU's packages fit together only within a release. If apt would take older ones than those that are installed, it
# would remove these. If they came from backports, the rest comes from there too.
install_qemu() { # PACKAGE...
    if can_install "$@"; then
        install "$@"
        return
    fi
    newest=$(dpkg-query -W -f '${db:Status-Abbrev}${Version}\n' 'qemu-*' 2>/dev/null |
        sed -n 's/^ii *//p' | sort -V | tail -n 1)
    case $newest in
        *~bpo*) ;;
        *)
            apt-get -s -y --no-install-recommends install "$@" >&2 || true
            die "apt can install$(printf ' %s' "$@") only by removing other packages (above).
       Install the virtual machine by hand, of the same version as QEMU's other packages${newest:+ ($newest)}."
            ;;
    esac
    backports=$codename-backports
    say "QEMU $newest is installed here, from backports: taking the missing packages from $backports"
    if can_install -t "$backports" "$@"; then
        install -t "$backports" "$@"
        return
    fi
    # The host does not list backports (any more). A private copy of its lists does, for this installation only.
    # shellcheck disable=SC2016
    source=$(apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(REPO_URI) $(SIGNED_BY)' 'Created-By: Packages' |
        sed -n "s/^$codename main //p" | head -n 1)
    address=${source%% *}
    key=${source#"$address"}
    key=${key# }
    [ -n "$address" ] || die "apt has no source for $codename: install$(printf ' %s' "$@") by hand"
    case $key in
        /*) key="[signed-by=$key] " ;;
        *) key= ;;
    esac
    scratch
    chmod 755 "$work"
    mkdir -p "$work/sources" "$work/lists/partial"
    for file in /etc/apt/sources.list.d/*; do
        [ ! -e "$file" ] || cp "$file" "$work/sources/"
    done
    echo "deb $key$address $backports main" >"$work/sources/genblk-backports.list"
    say "fetching the lists of packages, with those of $backports, for this installation only"
    set -- -o "Dir::Etc::SourceParts=$work/sources" -o "Dir::State::Lists=$work/lists" -t "$backports" "$@"
    as_root apt-get -qq -o "Dir::Etc::SourceParts=$work/sources" -o "Dir::State::Lists=$work/lists" update
    can_install "$@" || die "apt finds no QEMU packages that match the installed version $newest.
       Install qemu-system-x86 of the same version by hand."
    install "$@"
}

# The guest's kernel.

# The package that the metapackage stands for now, and where Ubuntu keeps its modules.
kernel_packages() {
    image=$(apt-cache depends -i "$kernel_meta" 2>/dev/null |
        sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    [ -n "$image" ] || return 1
    echo "$image"
    apt-cache pkgnames "linux-modules-${image#linux-image-}" | grep -x "linux-modules-${image#linux-image-}" || true
}

download_kernel() {
    packages=$(kernel_packages) || return 1
    # shellcheck disable=SC2086
    size=$(apt-cache show --no-all-versions $packages |
        awk '$1 == "Size:" { sum += $2 } END { print int(sum / 1000000) }')
    say "downloading $(echo "$packages" | tr "\n" " ")($size MB)"
    # Root needs no sandbox for a directory of its own.
    # shellcheck disable=SC2086
    (cd "$work" && apt-get $quiet -o APT::Sandbox::User="$(id -un)" download $packages)
}

unpack_kernel() {
    scratch
    mkdir -p "$guest"
    download_kernel || {
        # The lists may be missing, or older than the mirror.
        update_lists
        download_kernel || die "$kernel_meta cannot be downloaded"
    }
    version=$(kernel_packages | sed -n 's/^linux-image-//p')
    say "unpacking the kernel to target/guest/$version"
    fresh=$guest/new.$$
    rm -rf "$fresh"
    mkdir "$fresh"
    for archive in "$work"/linux-*.deb; do
        dpkg-deb -x "$archive" "$fresh"
    done
    # The modules' place with a merged /usr.
    [ -e "$fresh/lib" ] || ln -s usr/lib "$fresh/lib"
    rm -rf "${fresh:?}/usr/share"
    depmod -b "$fresh" "$version"
    rm -rf "${guest:?}/$version"
    mv "$fresh" "$guest/$version"
}

# Prometheus and promtool, for the tests of the exporter. They are skipped without it, so a failure is no error.

has_prometheus() {
    for folder in "$root/target/prometheus/usr/bin/" ""; do
        if "${folder}prometheus" --version >/dev/null 2>&1 && "${folder}promtool" --version >/dev/null 2>&1; then
            return
        fi
    done
    return 1
}

unpack_prometheus() {
    scratch
    say "downloading prometheus for the tests of the exporter; it is unpacked to target/prometheus, not installed"
    (cd "$work" && apt-get $quiet -o APT::Sandbox::User="$(id -un)" download prometheus) || return 1
    rm -rf "$root/target/prometheus"
    mkdir -p "$root/target/prometheus"
    dpkg-deb --fsys-tarfile "$work"/prometheus_*.deb |
        tar -x -C "$root/target/prometheus" ./usr/bin/prometheus ./usr/bin/promtool
}

check_rust

[ -r /etc/os-release ] || die "this is neither Debian nor Ubuntu; install by hand what $0 lists"
id=$(sed -n 's/^ID=//p' /etc/os-release | tr -d '"')
like=$(sed -n 's/^ID_LIKE=//p' /etc/os-release | tr -d '"')
codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release | tr -d '"')
case " $id $like " in
    *" ubuntu "*) kernel_meta=linux-image-virtual ;;
    *" debian "*) kernel_meta=linux-image-cloud-amd64 ;;
    *) die "this is neither Debian nor Ubuntu; install by hand what $0 lists" ;;
esac

need qemu-system-x86 "the virtual machine of the guest tests" has qemu-system-x86_64
# (Before QEMU 8 it is in a package that the virtual machine depends on.)
need qemu-utils "qemu-storage-daemon, which the benchmark compares with, and qemu-nbd" has qemu-storage-daemon
qemu=$missing
missing=
need build-essential "the linker that Rust uses" has cc
need make "runs this" has make
need busybox-static "the guest's user space" static_busybox
need e2fsprogs "makes and checks file systems, in the guest and on the host" has debugfs
need util-linux "fstrim in the guest" has fstrim
need cpio "packs the guest's initramfs" has cpio
need kmod "reads the dependencies of the guest's kernel modules" has modprobe
need xz-utils "unpacks kernel modules" has xz
need zstd "unpacks kernel modules on Ubuntu" has zstd
need bsdextrautils "column, for make help" has column
need tmux "a terminal for the test of genblk top" has tmux
need nbdkit "an NBD server, for the tests of remote images" has nbdkit
need apparmor "its parser, for the profile of the package" has apparmor_parser
need mount "losetup, for the benchmark's disks" has losetup
# Root needs no helper to mount.
[ "$(id -u)" -eq 0 ] || need fuse3 "mounts the tests' volatile disk" has fusermount3
kernel=yes
guest_kernel >/dev/null 2>&1 || kernel=

prometheus=
has_prometheus || prometheus=missing

if [ -z "$qemu$missing$prometheus" ] && [ -n "$kernel" ]; then
    say "nothing is missing"
    exit 0
fi
if [ -n "$qemu$missing" ]; then
    say "apt will install these packages and what they depend on, and remove none:"
    printf '%s' "$reasons"
fi
if [ -z "$kernel" ]; then
    say "the guest's kernel will be downloaded and unpacked under target/guest, not installed"
fi

# The lists are of words.
# shellcheck disable=SC2086
if [ -n "$qemu$missing" ]; then
    update_lists
    if can_install $missing $qemu; then
        say "installing" $missing $qemu
        install $missing $qemu
    else
        if [ -n "$missing" ]; then
            say "installing" $missing
            install $missing
        fi
        [ -z "$qemu" ] || install_qemu $qemu
    fi
fi
[ -n "$kernel" ] || unpack_kernel
if [ -n "$prometheus" ] && ! unpack_prometheus; then
    # The lists may be missing, or older than the mirror.
    update_lists
    unpack_prometheus || say "prometheus is not available: the tests that need it will be skipped"
fi
guest_kernel >/dev/null
say "done"
