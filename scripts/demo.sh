#!/bin/sh
# "make demo": a virtual machine with a disk served by genblk, from an empty image to a checked file system.
#
# Builds the release binary and boots a small Linux three times. It formats the disk and writes to it; it reads the same
# data from a cold and from a warm cache, after a restart of genblk; and it writes while genblk is killed and started
# again. Then the script shows what the cache did, checks the file system with e2fsck, and says how to attach a machine
# of your own. Takes less than two minutes once built, without KVM too.
set -eu

PATH=$PATH:/usr/sbin:/sbin:${HOME:-/root}/.cargo/bin
root=$(cd "$(dirname "$0")/.." && pwd)
daemon=
machine=

# Three places: the image where O_DIRECT works, the sockets where paths are short, the cache in shared memory.
mkdir -p "$root/target"
files=$(mktemp -d "$root/target/demo.XXXXXX")
work=$(mktemp -d)
memory=$(mktemp -d /dev/shm/genblk-demo.XXXXXX)

cleanup() {
    status=$?
    trap - EXIT
    for process in $machine $daemon; do
        kill -KILL "$process" 2>/dev/null || true
    done
    if [ $status -ne 0 ]; then
        echo "The demo failed. The last lines of the daemon and of the guest:" >&2
        tail -n 15 "$work"/daemon.*.log "$work/console.log" >&2 2>/dev/null || true
    fi
    rm -rf "$work" "$files" "$memory"
    exit $status
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

bold=
green=
plain=
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ] && [ "${TERM:-dumb}" != dumb ]; then
    escape=$(printf '\033')
    bold="${escape}[1m"
    green="${escape}[32m"
    plain="${escape}[0m"
fi

step() {
    printf '\n%s%s%s\n' "$bold" "$*" "$plain"
}

show() {
    printf '    %s\n' "$*"
}

die() {
    echo "demo: $*" >&2
    exit 1
}

# Waits until a process has ended, for a number of seconds at most.
await() { # PID SECONDS WHAT
    left=$(($2 * 10))
    while kill -0 "$1" 2>/dev/null; do
        [ $left -gt 0 ] || die "$3 takes longer than $2 s"
        left=$((left - 1))
        sleep 0.1
    done
    { wait "$1"; } 2>/dev/null
}

# The daemon. Each run has a log of its own.

run=0

start_daemon() {
    run=$((run + 1))
    "$root/target/release/genblk" --config "$work/demo.toml" >"$work/daemon.$run.log" 2>&1 </dev/null &
    daemon=$!
    left=100
    # A listening socket has these flags. (A killed daemon leaves its socket's name, but no process listens there.)
    until grep -q " 00010000 .* $work/demo.sock\$" /proc/net/unix; do
        if [ $left -eq 0 ] || ! kill -0 $daemon 2>/dev/null; then
            die "genblk does not start"
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

kill_daemon() {
    kill -KILL $daemon
    { wait $daemon; } 2>/dev/null || true
    daemon=
}

# The two places that know how the daemon's log words things: numbers beside a keyword.

# MiB that a daemon has restored from its predecessor's cache, and how many of them were dirty.
restored() { # LOG
    awk 'tolower($0) ~ /page/ && tolower($0) ~ /restored/ {
        sub(/^.*restored/, "")
        count = split($0, words, /[^0-9]+/)
        for (i = 1; i <= count; i++) if (words[i] != "") print int(words[i] / 256 + 0.5)
    }' "$1" | head -n 2
}

# What the cache did in each run whose log is named: an aligned table with a column for each.
statistics() { # LOG...
    awk '
        # The number before a keyword or, failing that, the one after it, with nothing but words between.
        function number(keyword) {
            if (match(line, "[0-9]+%?[^0-9,;:]*" keyword)) return substr(line, RSTART) + 0
            if (match(line, keyword "[^0-9,;]*[0-9]+")) {
                found = substr(line, RSTART, RLENGTH)
                sub(/.*[^0-9]/, "", found)
                return found + 0
            }
            return "-"
        }
        function row(label, unit, values,    i) {
            printf "    %-28s", label
            for (i = 1; i <= runs; i++) printf "%18s", (i in values && values[i] != "-") ? values[i] unit : "-"
            print ""
        }
        FNR == 1 { runs++ }
        { line = tolower($0); sub(/^[^]]*\] */, "", line) }
        line ~ /hit/ { hits[runs] = number("hit") }
        line ~ /read-?ahead/ && line ~ /mib/ {
            ahead[runs] = number("mib") " MiB"
            if (ahead[runs] + 0 > 0) ahead[runs] = number("used") " % of " ahead[runs]
        }
        line ~ /cluster/ {
            pages = number("page")
            if (pages != "-") guest[runs] = int(pages / 256 + 0.5)
            image[runs] = number("mib")
            cluster[runs] = number("kib")
            flushes[runs] = number("flush")
            syncs[runs] = number("sync")
            # Nothing was written, so there is no size.
            if (image[runs] == 0) cluster[runs] = "-"
        }
        END {
            printf "    %-28s%18s%18s%18s\n", "", "format, write", "read twice", "after the kill"
            row("reads that hit the cache", " %", hits)
            row("read ahead, and used", "", ahead)
            row("written by the guest", " MiB", guest)
            row("written to the image", " MiB", image)
            row("  average cluster", " KiB", cluster)
            row("FLUSH requests", "", flushes)
            row("syncs of the image", "", syncs)
        }' "$@"
}

# The guest.

# Boots a guest for one job, in the background.
start_guest() { # ACCELERATOR JOB [QEMU OPTION...]
    accelerator=$1
    job=$2
    shift 2
    # With RDRAND the guest has random numbers at once: without, mkfs waits for them for seconds.
    processor=qemu64,+rdrand
    [ "$accelerator" != kvm ] || processor=host
    said=0
    : >"$work/console.log"
    qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none -serial stdio \
        -accel "$accelerator" -cpu "$processor" -smp 2 -m 256M -machine q35,memory-backend=ram \
        -object memory-backend-memfd,id=ram,size=256M,share=on \
        -kernel "$kernel" -initrd "$work/guest.cpio" \
        -append "console=ttyS0 quiet panic=-1 cryptomgr.notests random.trust_cpu=on genblk.job=$job genblk.seed=demo" \
        "$@" >"$work/console.log" 2>&1 </dev/null &
    machine=$!
}

start_guest_with_disk() { # JOB
    start_guest "$accel" "$1" -chardev "socket,id=blk,path=$work/demo.sock,reconnect=1" \
        -device vhost-user-blk-pci,chardev=blk,num-queues=2
}

# Shows what the guest has reported since the last time, of its complete lines.
report() {
    head -n "$(wc -l <"$work/console.log")" "$work/console.log" | tr -d '\r' | sed -n "
        s/.*GENBLK-GUEST: show: /    /p
        s/.*GENBLK-GUEST: checked [^:]*: \([0-9]*\) files are intact/    \1 of \1 checksums are ${green}right${plain}/p
    " >"$work/report"
    tail -n +$((said + 1)) "$work/report"
    said=$(wc -l <"$work/report")
}

# Waits until the guest says something, and shows what it reports meanwhile.
until_said() { # WHAT SECONDS
    deadline=$(($(date +%s) + $2))
    until grep -q "GENBLK-GUEST: $1" "$work/console.log"; do
        if ! kill -0 $machine 2>/dev/null && ! grep -q "GENBLK-GUEST: $1" "$work/console.log"; then
            die "the guest ended early"
        fi
        [ "$(date +%s)" -lt $deadline ] || die "the guest takes longer than $2 s"
        report
        sleep 0.1
    done
    report
}

finish_guest() {
    until_said "ok $job" 120
    await $machine 20 "the guest's power-off"
    machine=
}

# A /dev/kvm that can be opened may still not work, so boot something on it.
kvm_works() {
    [ -w /dev/kvm ] || return 1
    start_guest kvm probe
    left=80
    until grep -q "GENBLK-GUEST: ok probe" "$work/console.log"; do
        if [ $left -eq 0 ] || ! kill -0 $machine 2>/dev/null; then
            break
        fi
        left=$((left - 1))
        sleep 0.1
    done
    kill -KILL $machine 2>/dev/null || true
    { wait $machine; } 2>/dev/null || true
    machine=
    grep -q "GENBLK-GUEST: ok probe" "$work/console.log"
}

echo "Building genblk (a first build takes some minutes)"
(cd "$root" && cargo build --release --locked --quiet)

kernel=$("$root/tests/guest/mkinitramfs.sh" "$work/guest.cpio")
truncate -s 1G "$files/demo.img"
sed -e "s|demo\.sock|$work/&|" -e "s|demo\.img|$files/&|" -e "s|^memory_dir = .*|memory_dir = \"$memory\"|" \
    "$root/configs/demo.toml" >"$work/demo.toml"
printf '\n[control]\nsocket = "%s"\n' "$work/control.sock" >>"$work/demo.toml"

accel=tcg,thread=multi
if kvm_works; then
    accel=kvm
fi

step "A guest formats an empty disk and writes to it (1 GiB, ${accel%%,*})"
start_daemon
start_guest_with_disk show-write
finish_guest

step "genblk stops, which writes everything back, and starts with an empty cache"
stop_daemon
show "the sparse image takes $(du -m "$files/demo.img" | cut -f 1) MiB of the host's disk"
start_daemon
start_guest_with_disk show-read
finish_guest

step "What an operator sees of it: genblk stat, and a picture of genblk top"
"$root/target/release/genblk" stat --socket "$work/control.sock" | sed 's/^/    /'
echo
"$root/target/release/genblk" top --once --socket "$work/control.sock" | sed '/^$/d; s/^/    /'
stop_daemon

runs="$work/daemon.1.log $work/daemon.2.log"
if [ "$(df -k /dev/shm | awk 'END { print $4 }')" -gt 163840 ]; then
    step "genblk is killed (SIGKILL) while the guest writes, and starts again"
    start_daemon
    start_guest_with_disk show-kill
    until_said "writing" 120
    kill_daemon
    start_daemon
    # The log is written by a thread of its own.
    left=50
    until grep -qi restored "$work/daemon.$run.log" || [ $left -eq 0 ]; do
        left=$((left - 1))
        sleep 0.1
    done
    # shellcheck disable=SC2046
    set -- $(restored "$work/daemon.$run.log")
    show "the new daemon restores ${1:-0} MiB of cache, ${2:-0} MiB of it dirty"
    finish_guest
    stop_daemon
    runs="$runs $work/daemon.$run.log"
else
    step "No kill: the cache of 128 MiB finds no room in /dev/shm, and would not outlive its daemon"
fi

step "What the cache did"
# shellcheck disable=SC2086
statistics $runs

e2fsck -fn "$files/demo.img" >"$work/fsck.log" 2>&1 || { cat "$work/fsck.log" && exit 1; }
step "e2fsck on the host finds the file system ${green}clean"

step "Attach a machine of your own"
cat <<'END'
    genblk --socket-path /run/blk.sock --blk-file disk.img --cache-size 256M
    qemu-system-x86_64 -accel kvm -m 2G \
        -object memory-backend-memfd,id=ram,size=2G,share=on -machine q35,memory-backend=ram \
        -chardev socket,id=blk,path=/run/blk.sock,reconnect=1 \
        -device vhost-user-blk-pci,chardev=blk,num-queues=2 ...
    docs/operating.md has the same for cloud-hypervisor and Firecracker.
END
