#!/bin/sh
# Installs what building and testing need on Debian or Ubuntu, and only what is missing; says what and why. It may be
# run as often as you like, and is quick when there is nothing to do. The Rust toolchain is left to you.
set -eu

PATH=$PATH:/usr/sbin:/sbin
root=$(cd "$(dirname "$0")/.." && pwd)
missing=

# need PACKAGE REASON COMMAND...: the package is wanted unless the command succeeds.
need() {
    package=$1
    reason=$2
    shift 2
    if ! "$@" >/dev/null 2>&1; then
        printf '  %-26s %s\n' "$package" "$reason"
        missing="$missing $package"
    fi
}

has() {
    command -v "$1"
}

# Root does things itself; everybody else needs sudo.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif has sudo >/dev/null; then
        sudo "$@"
    else
        echo "setup: this needs root, and there is no sudo: $*" >&2
        exit 1
    fi
}

static_busybox() {
    has busybox && ! ldd "$(command -v busybox)" 2>/dev/null | grep '=>'
}

# A kernel for the guest whose modules are there too.
guest_kernel() {
    for image in /boot/vmlinuz-*-cloud-amd64 /boot/vmlinuz-*-kvm /boot/vmlinuz-*-virtual /boot/vmlinuz-*-generic; do
        [ -e "$image" ] && [ -d "/lib/modules/${image##*/vmlinuz-}" ] && echo "$image"
    done | sort -V | tail -n 1 | grep .
}

id=unknown
like=
if [ -r /etc/os-release ]; then
    id=$(sed -n 's/^ID=//p' /etc/os-release | tr -d '"')
    like=$(sed -n 's/^ID_LIKE=//p' /etc/os-release | tr -d '"')
fi
case " $id $like " in
    *" ubuntu "*) kernel=linux-image-virtual ;;
    *" debian "*) kernel=linux-image-cloud-amd64 ;;
    *)
        echo "setup: this is neither Debian nor Ubuntu; see the list in $0 for what to install" >&2
        exit 1
        ;;
esac

need build-essential "the linker that Rust uses" has cc
need make "runs this" has make
need qemu-system-x86 "the virtual machine of the guest tests" has qemu-system-x86_64
need "$kernel" "the guest's kernel" guest_kernel
need busybox-static "the guest's user space" static_busybox
need e2fsprogs "makes and checks file systems, in the guest and on the host" has debugfs
need util-linux "fstrim in the guest" has fstrim
need cpio "packs the guest's initramfs" has cpio
need kmod "knows the modules of the guest's kernel" has modprobe
need xz-utils "unpacks them" has xz
need zstd "unpacks them on Ubuntu" has zstd
need bsdextrautils "column, for make help" has column
need qemu-system-common "qemu-storage-daemon, which the benchmark compares with" has qemu-storage-daemon
need mount "losetup, for the benchmark's disks" has losetup

if [ -n "$missing" ]; then
    echo "setup: installing the above with apt"
    as_root apt-get -q update
    # The list is one of words.
    # shellcheck disable=SC2086
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install $missing
fi

# Ubuntu keeps kernels from everybody but root; the guest tests need a copy that they may read.
image=$(guest_kernel) || {
    echo "setup: still no kernel for the guest in /boot" >&2
    exit 1
}
copy=$root/target/guest/${image##*/}
if [ ! -r "$image" ] && [ ! -r "$copy" ]; then
    echo "setup: copying $image, which only root may read, to $copy"
    mkdir -p "${copy%/*}"
    as_root install -m 0644 "$image" "$copy"
fi

# The Makefile looks in this place too, which a fresh shell does not.
if ! has cargo >/dev/null && [ ! -x "${HOME:-/root}/.cargo/bin/cargo" ]; then
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$root/Cargo.toml")
    cat >&2 <<EOF
setup: there is no Rust toolchain. genblk needs Rust $wanted or newer, which most distributions do not have yet.
       With your distribution's rustup:  apt-get install rustup && rustup default stable
       Otherwise follow https://rustup.rs
EOF
    exit 1
fi
