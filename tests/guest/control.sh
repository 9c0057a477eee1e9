#!/bin/sh
# A control for the guest tests: QEMU's vhost-user-blk server with genblk's options. When a test fails, the control tells
# a bug of genblk from one of the guest, of QEMU, or of the test:
#
#   GENBLK_BIN=tests/guest/control.sh cargo test --test guest
#
# It writes through the host's page cache, so it ignores --cache-size and --cache-mode. It has its own serial, so the test
# of the serial fails.
set -eu

writable=on
queues=1
while [ $# -gt 0 ]; do
    case $1 in
        --socket-path) socket=$2 && shift 2 ;;
        --blk-file) file=$2 && shift 2 ;;
        --num-queues) queues=$2 && shift 2 ;;
        --read-only) writable=off && shift ;;
        --cache-size | --cache-mode | --serial | --memory-dir) shift 2 ;;
        *) echo "control.sh: unknown option $1" >&2 && exit 2 ;;
    esac
done
read_only=off
[ $writable = on ] || read_only=on
rm -f "$socket"
exec qemu-storage-daemon \
    --blockdev "driver=file,node-name=disk,filename=$file,discard=unmap,read-only=$read_only" \
    --export "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path=$socket,writable=$writable,num-queues=$queues"
