#!/bin/sh
# "make demo": a virtual machine with a disk served by genblk, from an empty image to a checked file system.
#
# Builds the release binary, boots a small Linux that formats the disk and writes to it, restarts genblk so that its
# cache is empty, boots again and reads the same data cold and warm. Shows what the cache did, checks the image with
# e2fsck, and says how to attach a machine of your own. Under two minutes once built, without KVM too.
#
# GENBLK_BIN names another daemon with the same options (tests/guest/control.sh, to compare).
set -eu

PATH=$PATH:/usr/sbin:/sbin:${HOME:-/root}/.cargo/bin
root=$(cd "$(dirname "$0")/.." && pwd)
daemon=
machine=

# Two places: the image where O_DIRECT works, the sockets where paths are short.
mkdir -p "$root/target"
files=$(mktemp -d "$root/target/demo.XXXXXX")
work=$(mktemp -d)

cleanup() {
    status=$?
    trap - EXIT
    for process in $machine $daemon; do
        kill -KILL "$process" 2>/dev/null || true
    done
    if [ $status -ne 0 ]; then
        echo "The demo failed. What the daemon and the guest said last:" >&2
        tail -n 15 "$work/daemon.log" "$work/console.log" 2>/dev/null >&2 || true
    fi
    rm -rf "$work" "$files"
    exit $status
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

step() {
    printf '\n\033[1m%s\033[0m\n' "$*"
}
[ -t 1 ] || step() {
    printf '\n%s\n' "$*"
}

# Runs a process to its end, for a number of seconds at most.
await() { # PID SECONDS WHAT
    left=$(($2 * 10))
    while kill -0 "$1" 2>/dev/null; do
        [ $left -gt 0 ] || { echo "demo: $3 takes longer than $2 s" >&2 && return 1; }
        left=$((left - 1))
        sleep 0.1
    done
    { wait "$1"; } 2>/dev/null
}

start_daemon() {
    # Without a configuration file for a program that is not genblk itself.
    if [ -n "${GENBLK_BIN:-}" ]; then
        set -- "$GENBLK_BIN" --socket-path "$work/demo.sock" --blk-file "$files/demo.img" --num-queues 2
    else
        set -- "$root/target/release/genblk" --config "$work/demo.toml"
    fi
    "$@" >>"$work/daemon.log" 2>&1 </dev/null &
    daemon=$!
    left=100
    # A listening socket has these flags.
    until grep -q " 00010000 .* $work/demo.sock\$" /proc/net/unix; do
        if [ $left -eq 0 ] || ! kill -0 $daemon 2>/dev/null; then
            echo "demo: genblk does not start" >&2
            return 1
        fi
        left=$((left - 1))
        sleep 0.1
    done
}

stop_daemon() {
    kill -TERM $daemon
    await $daemon 30 "writing everything back"
    daemon=
}

# Boots a guest for one job; prints what it shows.
boot() { # ACCELERATOR SECONDS JOB [QEMU OPTION...]
    accelerator=$1
    seconds=$2
    job=$3
    shift 3
    : >"$work/console.log"
    qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none -serial stdio \
        -accel "$accelerator" -smp 2 -m 256M -machine q35,memory-backend=ram \
        -object memory-backend-memfd,id=ram,size=256M,share=on \
        -kernel "$kernel" -initrd "$work/guest.cpio" \
        -append "console=ttyS0 quiet panic=-1 cryptomgr.notests genblk.job=$job genblk.seed=demo" \
        "$@" >"$work/console.log" 2>&1 </dev/null &
    machine=$!
    await $machine "$seconds" "the guest" || return 1
    machine=
    sed -n 's/.*GENBLK-GUEST: show: /    /p; s/.*GENBLK-GUEST: checked .*/    its checksum is right/p' "$work/console.log"
    grep -q "GENBLK-GUEST: ok $job" "$work/console.log"
}

boot_with_disk() { # JOB
    boot "$accel" 60 "$1" -chardev "socket,id=blk,path=$work/demo.sock" \
        -device vhost-user-blk-pci,chardev=blk,num-queues=2
}

if [ -z "${GENBLK_BIN:-}" ]; then
    step "Building genblk"
    (cd "$root" && cargo build --release --locked --quiet)
else
    GENBLK_BIN=$(realpath "$GENBLK_BIN")
fi

kernel=$("$root/tests/guest/mkinitramfs.sh" "$work/guest.cpio")
truncate -s 1G "$files/demo.img"
sed -e "s|demo\.sock|$work/&|" -e "s|demo\.img|$files/&|" "$root/configs/demo.toml" >"$work/demo.toml"

# A /dev/kvm that can be opened may still not work, so try it.
accel=tcg,thread=multi
if [ -w /dev/kvm ] && boot kvm 8 probe >/dev/null 2>&1; then
    accel=kvm
fi
if [ -n "$machine" ]; then
    kill -KILL "$machine" 2>/dev/null || true
    machine=
fi

step "A guest formats an empty disk and writes to it (1 GiB, ${accel%%,*}; a sparse image)"
start_daemon
boot_with_disk show-write

step "genblk is stopped, which writes back and syncs everything, and started again with an empty cache"
stop_daemon
echo "    the image now takes $(du -m "$files/demo.img" | cut -f 1) MiB on the host"
start_daemon

step "A new guest reads the same file twice past its own page cache (O_DIRECT)"
boot_with_disk show-read
stop_daemon

step "What the cache did, in the daemon's words"
grep -iE 'hit|read-?ahead|cluster|write-?back' "$work/daemon.log" >"$work/statistics" ||
    echo "(this daemon keeps no statistics)" >"$work/statistics"
sed 's/^/    /' "$work/statistics"

step "The host checks the file system in the image"
e2fsck -fn "$files/demo.img" >"$work/fsck.log" 2>&1 || { cat "$work/fsck.log" && exit 1; }
sed -n '$s/^.*demo.img: /    clean: /p' "$work/fsck.log"

step "Attach a machine of your own"
cat <<'END'
  Start the daemon on a raw image or a block device:

    genblk --socket-path /run/blk.sock --blk-file disk.img --cache-size 256M

  QEMU (the guest's memory must be shared):

    qemu-system-x86_64 -accel kvm -m 2G \
        -object memory-backend-memfd,id=ram,size=2G,share=on -machine q35,memory-backend=ram \
        -chardev socket,id=blk,path=/run/blk.sock \
        -device vhost-user-blk-pci,chardev=blk,num-queues=2 ...

  cloud-hypervisor:

    cloud-hypervisor --memory size=2G,shared=on \
        --disk vhost_user=on,socket=/run/blk.sock,num_queues=2,queue_size=256 ...

  Firecracker, before the machine is started (the daemon decides whether the disk is read-only):

    curl --unix-socket firecracker.sock -X PUT http://localhost/drives/data \
        -H 'Content-Type: application/json' \
        -d '{"drive_id": "data", "is_root_device": false, "socket": "/run/blk.sock"}'
END
