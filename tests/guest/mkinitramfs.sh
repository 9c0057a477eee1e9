#!/bin/sh
# Makes the initramfs of the guest tests and of the demo: busybox and e2fsprogs of the host, the modules of a cloud (or
# virtual) kernel, and tests/guest/init. The kernel is the newest of those that setup.sh has unpacked under
# target/guest/ and those that the host has installed.
#
#   mkinitramfs.sh OUT          writes the archive to OUT, and prints the path of its kernel
#   mkinitramfs.sh --kernel     prints the path of the kernel only
#
# GENBLK_KERNEL names another kernel image, DIR/boot/vmlinuz-VERSION with its modules in DIR/lib/modules/VERSION; if it
# lies elsewhere, its modules are those in /lib/modules. Nothing here needs root. "make setup" gets what is missing.
set -eu

PATH=$PATH:/usr/sbin:/sbin
here=$(cd "$(dirname "$0")" && pwd)
top=$(cd "$here/../.." && pwd)

die() {
    echo "mkinitramfs: $*; \"make setup\" gets what the guest tests need" >&2
    exit 1
}

[ $# -eq 1 ] || die "usage: mkinitramfs.sh OUT, or --kernel"
out=$1

# The directory that holds a kernel's boot/ and lib/modules/; empty for the host's root.
base_of() {
    case $1 in
        */boot/vmlinuz-*) echo "${1%/boot/vmlinuz-*}" ;;
        *) echo "" ;;
    esac
}

# The newest kernel that we may read, with its modules. Ubuntu keeps those in /boot for root.
find_kernel() {
    for flavour in cloud-amd64 kvm virtual generic; do
        for image in /boot/vmlinuz-*-"$flavour" "$top"/target/guest/*/boot/vmlinuz-*-"$flavour"; do
            version=${image##*/vmlinuz-}
            if [ -r "$image" ] && [ -d "$(base_of "$image")/lib/modules/$version" ]; then
                echo "$version $image"
            fi
        done | sort -V | tail -n 1 | cut -d ' ' -f 2- | grep . && return
    done
    return 1
}

kernel=${GENBLK_KERNEL:-$(find_kernel)} || die "there is no kernel for the guest, in target/guest or /boot"
if [ "$out" = --kernel ]; then
    echo "$kernel"
    exit
fi
version=${kernel##*/vmlinuz-}
base=$(base_of "$kernel")

for tool in busybox cpio depmod modprobe ldd mke2fs e2fsck; do
    command -v $tool >/dev/null || die "$tool is missing"
done

# Not in a directory that others may write to: a library of the host could have any name.
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
for directory in bin dev etc host mnt modules proc sys tmp; do
    mkdir "$root/$directory"
done

busybox=$(command -v busybox)
if ldd "$busybox" 2>/dev/null | grep -q '=>'; then
    die "busybox is not static (busybox-static is)"
fi
cp "$busybox" "$root/bin/busybox"
"$busybox" --list | while read -r applet; do
    [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
done

# A program with its shared libraries and its loader, each at the path where the loader looks for it. It goes to /host
# and is called by that path, because busybox's shell prefers the applet of the same name wherever PATH points.
add_program() {
    cp -L "$1" "$root/host/"
    ldd "$1" | grep -o '/[^ ]*' | while read -r library; do
        mkdir -p "$root/${library%/*}"
        cp -L "$library" "$root/$library"
    done
}
for program in mke2fs e2fsck; do
    add_program "$(command -v $program)"
done
[ -L "$root/bin/fstrim" ] || add_program "$(command -v fstrim || die "fstrim is missing")"
[ ! -e /etc/mke2fs.conf ] || cp /etc/mke2fs.conf "$root/etc/"

# The modules in the order in which they want to be loaded, which differs between kernels (virtio_ring comes before
# virtio in 6.1): modprobe knows it. What is built into the kernel needs nothing.
for module in virtio_pci virtio_blk ext4; do
    modprobe --dirname "${base:-/}" --set-version "$version" --show-depends "$module" ||
        die "no module $module for $version"
done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r path; do
    name=${path##*/}
    name=${name%%.ko*}.ko
    case $path in
        *.xz) xz -dc "$path" ;;
        *.zst) zstd -dcq "$path" ;;
        *.gz) gzip -dc "$path" ;;
        *) cat "$path" ;;
    esac >"$root/modules/$name"
    echo "$name" >>"$root/modules/order"
done
touch "$root/modules/order"

cp "$here/init" "$root/init"
chmod 755 "$root/init"

# Not compressed: unpacking costs an emulated processor more than reading the archive.
(cd "$root" && find . | cpio --quiet -o -H newc -R 0:0) >"$out.$$"
mv "$out.$$" "$out"
echo "$kernel"
