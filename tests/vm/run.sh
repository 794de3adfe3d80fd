#!/usr/bin/env bash
# Runs stillbox on a second kernel: Debian's stock 6.1 in an emulated machine with cgroup v2 only, as users have it.
#
#   tests/vm/run.sh BINARY TEMPLATE_ARCHIVE
#
# Boot 1 (`plain`) has guest/plain.sh as its only service; boot 2 (`systemd`) starts config/stillbox.service.
# What is checked stands in guest/*.sh, one line per check on the second serial port: `ok NAME` or `FAIL NAME: why`.
# The last line here is `N passed, N failed`; the exit code is 0 only when every boot reached its end and nothing failed.
#
# Nothing is installed: the kernel's package is unpacked, the guest's rootfs comes from mmdebstrap. Both are kept in
# ${XDG_CACHE_HOME:-~/.cache}/stillbox/vm (keyed by this folder's content, checked on each use, never required).
set -euo pipefail

readonly KERNEL_SUITE=bookworm KERNEL_PACKAGE=linux-image-cloud-amd64
readonly GUEST_SUITE=trixie
readonly GUEST_PACKAGES=systemd-sysv,dbus,udev,kmod,nftables,conntrack,iproute2,e2fsprogs,procps,curl,ca-certificates,jq,libnss-myhostname
readonly KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg
readonly BOOT_SECONDS_MAX=${STILLBOX_VM_BOOT_SECONDS:-150}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
cache=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/stillbox/vm

say() { printf 'vm: %s\n' "$*" >&2; }
die() {
    printf 'vm: error: %s\n' "$1" >&2
    [ $# = 1 ] || printf 'vm:   %s\n' "${@:2}" >&2
    echo "0 passed, 1 failed"
    exit 1
}

# Everything below lives in a mount namespace of its own with a tmpfs for its work: nothing to clean up, however it ends.
if [ "${STILLBOX_VM_INNER:-}" != 1 ]; then
    [ "$(id -u)" = 0 ] || die "mmdebstrap and mkfs need root" "run it as root"
    STILLBOX_VM_INNER=1 exec unshare --mount --propagation private "$0" "$@"
fi
[ $# = 2 ] || die "usage: tests/vm/run.sh BINARY TEMPLATE_ARCHIVE"
binary=$(realpath "$1") archive=$(realpath "$2")
work=$(mktemp -d "${TMPDIR:-/tmp}/stillbox-vm.XXXXXX")
mount -t tmpfs -o size=80%,mode=0700 stillbox-vm "$work"
clean_up() {
    cd /
    umount -l "$work" 2>/dev/null || true
    rmdir "$work" 2>/dev/null || true
}
trap clean_up EXIT

need() {
    command -v "$1" >/dev/null || die "$1 is not installed" "apt-get install -y --no-install-recommends $2  (or: make setup)"
}

# ---------------------------------------------------------------- what the guest is made of

# The archives of Debian proper that apt is configured with, or the one named in STILLBOX_TEMPLATE_DEBIAN_MIRROR.
mirror() {
    if [ -n "${STILLBOX_TEMPLATE_DEBIAN_MIRROR:-}" ]; then
        printf '%s\n' "$STILLBOX_TEMPLATE_DEBIAN_MIRROR"
        return
    fi
    apt-get indextargets --format '$(REPO_URI)' 'Label: Debian' 2>/dev/null | head -n1 | grep . ||
        apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | head -n1 | grep . ||
        die "this machine's apt has no Debian mirror" "name one: STILLBOX_TEMPLATE_DEBIAN_MIRROR=http://…/debian"
}

# A finished part is used again while the hash beside it is right.
cached() { [ -s "$cache/$1.sha256" ] && (cd "$cache" && sha256sum --quiet --strict --check "$1.sha256") >/dev/null 2>&1; }

# Never fatal: the cache saves half a minute, nothing needs it.
keep() {
    mkdir -p "$cache" && cp "$1" "$cache/$2.tmp.$$" && mv -f "$cache/$2.tmp.$$" "$cache/$2" &&
        (cd "$cache" && sha256sum "$2" >"$2.sha256") || say "could not write the cache $cache; going on without"
}

# apt with lists of its own: the machine's set-up is neither used nor changed, its keys verify the archive.
fetch_kernel() {
    local state=$work/apt package
    mkdir -p "$state"/{lists,cache}/partial
    printf 'deb [signed-by=%s] %s %s main\n' "$KEYRING" "$(mirror)" "$KERNEL_SUITE" >"$state/sources.list"
    local apt=(-qq -o Dir::Etc::SourceList="$state/sources.list" -o Dir::Etc::SourceParts=/dev/null -o Dir::State="$state"
        -o Dir::State::Lists="$state/lists" -o Dir::State::status=/dev/null -o Dir::Cache="$state/cache"
        -o APT::Sandbox::User= -o Acquire::Languages=none -o Acquire::Retries=2)
    apt-get "${apt[@]}" update || die "apt cannot read $KERNEL_SUITE's lists" "check the network and $KEYRING (package debian-archive-keyring)"
    package=$(apt-cache "${apt[@]}" depends "$KERNEL_PACKAGE" | awk '/Depends: linux-image-/ {print $2; exit}')
    [ -n "$package" ] || die "$KERNEL_SUITE has no $KERNEL_PACKAGE"
    say "fetching $package"
    (cd "$work" && apt-get "${apt[@]}" download "$package") || die "apt could not download $package"
    mv "$work/$package"_*.deb "$work/kernel.deb"
}

make_guest_rootfs() {
    say "making the guest's rootfs ($GUEST_SUITE with systemd)"
    TMPDIR=$work mmdebstrap --quiet --variant=minbase --mode=root --format=tar --include="$GUEST_PACKAGES" \
        --aptopt='APT::Install-Recommends "false"' --dpkgopt=force-unsafe-io --dpkgopt='path-exclude=/usr/share/doc/*' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' --keyring="$KEYRING" \
        "$GUEST_SUITE" "$work/guest.tar" "deb $(mirror) $GUEST_SUITE main" >"$work/mmdebstrap.log" 2>&1 ||
        { tail -n 15 "$work/mmdebstrap.log" >&2; die "mmdebstrap could not make the guest's rootfs"; }
    zstd -q -T0 -3 "$work/guest.tar" -o "$work/guest.tar.zst"
}

prepare_rootfs() {
    local key
    key=$(printf '%s %s %s' "$GUEST_SUITE" "$GUEST_PACKAGES" "$KERNEL_PACKAGE.$KERNEL_SUITE" | sha256sum | cut -c1-16)
    cached "kernel-$key.deb" || { fetch_kernel; keep "$work/kernel.deb" "kernel-$key.deb"; }
    cached "guest-$key.tar.zst" || { make_guest_rootfs; keep "$work/guest.tar.zst" "guest-$key.tar.zst"; }
    [ -s "$work/kernel.deb" ] || cp "$cache/kernel-$key.deb" "$work/kernel.deb"
    [ -s "$work/guest.tar.zst" ] || cp "$cache/guest-$key.tar.zst" "$work/guest.tar.zst"
    mkdir -p "$work/kernel" "$work/root"
    dpkg -x "$work/kernel.deb" "$work/kernel"
    kernel_version=$(basename "$work"/kernel/lib/modules/*)
    tar --use-compress-program=zstd -xpf "$work/guest.tar.zst" --numeric-owner --exclude='./dev/*' -C "$work/root"
    cp -a "$work/kernel/lib/modules" "$work/root/lib/"
    chroot "$work/root" depmod "$kernel_version"
    rm -f "$work/guest.tar" "$work/guest.tar.zst" "$work/kernel.deb"
}

# The binary, the checks, the unit, and the template as a finished layer (unpacking it under emulation takes a minute).
furnish() {
    install -D -m 0755 "$binary" "$work/root/usr/local/bin/stillbox"
    install -D -m 0644 "$repo/config/stillbox.service" "$work/root/etc/systemd/system/stillbox.service"
    mkdir -p "$work/root/vm"
    cp "$here"/guest/* "$work/root/vm/"
    chmod 0755 "$work"/root/vm/*.sh
    mv "$work/root/vm/vm-checks.service" "$work/root/etc/systemd/system/"
    ln -sf ../vm-checks.service "$work/root/etc/systemd/system/multi-user.target.wants/vm-checks.service"
    : >"$work/root/etc/fstab"
    echo stillbox-vm >"$work/root/etc/hostname"
    "$binary" template import "$archive" --data-dir "$work/root/var/lib/stillbox" >&2 ||
        die "the template archive $archive cannot be imported"
}

make_disk() {
    truncate -s 8G "$work/root.img"
    mkfs.ext4 -q -F -O ^has_journal -E lazy_itable_init=1 -d "$work/root" "$work/root.img"
    rm -rf "$work/root"
}

# busybox, the modules that find the disk, and a script that hands over to it.
make_initramfs() {
    local tree=$work/initramfs module
    mkdir -p "$tree"/{bin,modules,dev,proc,newroot}
    cp "$(command -v busybox)" "$tree/bin/busybox"
    for module in virtio virtio_ring virtio_pci_legacy_dev virtio_pci_modern_dev virtio_pci virtio_blk; do
        find "$work/kernel/lib/modules" -name "$module.ko" -exec cp {} "$tree/modules/" \;
        [ ! -e "$tree/modules/$module.ko" ] || echo "$module" >>"$tree/modules/order"
    done
    cat >"$tree/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
while read -r module; do /bin/busybox insmod "/modules/$module.ko"; done </modules/order
tries=0
until /bin/busybox mount -t ext4 /dev/vda /newroot 2>/dev/null; do
    tries=$((tries + 1)); [ $tries -lt 100 ] || { echo "no root disk"; /bin/busybox poweroff -f; }
    /bin/busybox sleep 0.1
done
next=$(/bin/busybox sed -n 's/.*stillbox\.init=\([^ ]*\).*/\1/p' /proc/cmdline)
/bin/busybox umount /proc
/bin/busybox mount --move /dev /newroot/dev
exec /bin/busybox switch_root /newroot "$next"
INIT
    sed -i '1s|.*|#!/bin/busybox sh|' "$tree/init"
    chmod 0755 "$tree/init"
    (cd "$tree" && find . | busybox cpio -o -H newc 2>/dev/null) >"$work/initrd"
    cp "$work/kernel/boot/vmlinuz-$kernel_version" "$work/vmlinuz"
    rm -rf "$work/kernel"
}

# ---------------------------------------------------------------- booting and reading the checks

passed=0 failed=0

# boot NAME INIT: one run of the machine from the disk as the boot before left it.
boot() {
    local name=$1 init=$2 checks=$work/$1.checks console=$work/$1.console accel=tcg,thread=multi started=$SECONDS
    say "boot $name: kernel $kernel_version, $(printf '%s' "$accel" | cut -d, -f1), cgroup v2"
    timeout --kill-after=5 "$BOOT_SECONDS_MAX" qemu-system-x86_64 -accel "$accel" -cpu max -smp 2 -m 2560 -display none \
        -no-reboot -nodefaults -nic none -serial "file:$console" -serial "file:$checks" \
        -kernel "$work/vmlinuz" -initrd "$work/initrd" \
        -append "console=ttyS0 quiet panic=-1 stillbox.init=$init systemd.show_status=false" \
        -drive "file=$work/root.img,if=virtio,format=raw,cache=unsafe" </dev/null >"$work/$name.qemu" 2>&1 || true
    report "$name" "$checks" "$console" $((SECONDS - started))
}

# A boot that does not say `end` has failed, whatever it said before.
report() {
    local name=$1 checks=$2 console=$3 seconds=$4 line ended=no
    while IFS= read -r line; do
        line=${line%$'\r'}
        case $line in
        'ok '*) passed=$((passed + 1)) && echo "vm $name: $line" ;;
        'FAIL '*) failed=$((failed + 1)) && echo "vm $name: $line" ;;
        end) ended=yes ;;
        *) echo "vm $name:   $line" ;;
        esac
    done <"$checks"
    if [ $ended = no ]; then
        failed=$((failed + 1))
        echo "vm $name: FAIL the machine did not reach the end of its checks within ${BOOT_SECONDS_MAX} s; its console ends:"
        tail -n 40 "$console" "$work/$name.qemu" 2>/dev/null | cut -c1-300
    fi
    say "boot $name took $seconds s"
}

need qemu-system-x86_64 qemu-system-x86
need mmdebstrap mmdebstrap
need mkfs.ext4 e2fsprogs
need busybox busybox-static
need zstd zstd
[ -r "$KEYRING" ] || die "$KEYRING is missing" "apt-get install -y debian-archive-keyring  (or: make setup)"
[ "$(uname -m)" = x86_64 ] || die "the emulated machine is x86_64; this one is $(uname -m)"

started=$SECONDS
prepare_rootfs
furnish
make_disk
make_initramfs
say "guest prepared in $((SECONDS - started)) s"
boot plain /vm/plain.sh
boot systemd /lib/systemd/systemd
say "all took $((SECONDS - started)) s"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]
