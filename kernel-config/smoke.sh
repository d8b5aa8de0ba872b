#!/bin/bash
# Boots a kernel to a busybox init under plain QEMU emulation (no KVM, no lab) on a hardware-reduced ACPI machine whose
# virtio-mmio devices appear in the DSDT only, and checks what the guest finds. A minute at most; 1 on any difference.
#
#   kernel-config/smoke.sh              our kernel, ELF through its PVH entry
#   kernel-config/smoke.sh FILE         another kernel image; only checks that it boots (for comparisons)
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=../tests/lab/lib.sh
source "$HERE/../tests/lab/lib.sh"

LIMIT="${LIMIT:-180}" # seconds; ten times what an idle machine needs
work=
trap 'if [ -n "$work" ]; then rm -rf "$work"; fi' EXIT
trap 'exit 130' INT TERM

main() {
    local kernel="${1:-}" ours=no
    if [ -z "$kernel" ]; then
        ours=yes
        kernel="$("$HERE/build.sh" | tail -n 1)/vmlinux"
    fi
    [ -f "$kernel" ] || die "no kernel at '$kernel'"
    need_packages qemu-system-x86 busybox-static cpio
    work="$(mktemp -d "${TMPDIR:-/tmp}/smoke.XXXXXX")"
    make_initrd
    boot "$kernel"
    cat "$work/console"
    grep -q '^smoke: init at' "$work/console" || die "$kernel did not reach its init"
    report_time
    [ "$ours" = no ] || check_findings
}

make_initrd() {
    mkdir -p "$work/root/bin"
    cp /bin/busybox "$work/root/bin/"
    cat >"$work/root/init" <<'INIT'
#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /proc /sys
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
say() { echo "smoke: $*"; }
say "release $($b uname -r)"
say "cpus $($b grep -c ^processor /proc/cpuinfo)"
say "controllers $($b mount -t cgroup2 cgroup2 /sys/fs/cgroup && $b cat /sys/fs/cgroup/cgroup.controllers)"
say "filesystems $($b awk '{print $NF}' /proc/filesystems | $b sort | $b tr '\n' ' ')"
say "namespaces $($b ls /proc/self/ns | $b tr '\n' ' ')"
for d in /sys/bus/virtio/devices/*; do
    say "virtio $($b basename "$($b readlink "$d/driver")") at $($b basename "$($b readlink -f "$d/..")")"
done
say "memory block $($b cat /sys/devices/system/memory/block_size_bytes) $($b cat /sys/devices/system/memory/auto_online_blocks)"
say "init at $($b dmesg | $b sed -n 's/^\[ *\([0-9.]*\)\] Run .*init as init process.*/\1/p')"
$b poweroff -f
INIT
    chmod 755 "$work/root/init"
    (cd "$work/root" && find . | sort | cpio --quiet -o -H newc) >"$work/initrd"
    truncate -s 1M "$work/disk"
}

# icount: one guest nanosecond per instruction, so the times in the log are instruction counts. PIT and RTC are
# there because plain emulation has no kvmclock to learn the TSC's frequency and the date from; nothing else of a PC is.
boot() {
    local status=0
    timeout --kill-after=10 "$LIMIT" qemu-system-x86_64 \
        -M microvm,acpi=on,pit=on,pic=off,rtc=on,isa-serial=on -accel tcg,thread=single -icount shift=0,sleep=off \
        -cpu max,-la57 -smp 2 -m 512 -nodefaults -no-user-config -display none -no-reboot \
        -kernel "$1" -initrd "$work/initrd" \
        -append 'console=ttyS0 quiet loglevel=4 pci=off panic=-1 reboot=t' \
        -drive "file=$work/disk,if=none,id=disk,format=raw" -device virtio-blk-device,drive=disk \
        -device virtio-rng-device \
        -netdev user,id=net,restrict=on -device virtio-net-device,netdev=net \
        -device virtio-serial-device -device virtio-balloon-device \
        -serial "file:$work/console" </dev/null >"$work/qemu" 2>&1 || status=$?
    tr -d '\r' <"$work/console" >"$work/console.unix" && mv "$work/console.unix" "$work/console"
    [ "$status" = 0 ] || { cat "$work/qemu" "$work/console" >&2; die "no power-off within $LIMIT s (QEMU exit $status)"; }
}

report_time() {
    local seconds
    seconds="$(sed -n 's/^smoke: init at //p' "$work/console")"
    awk -v s="$seconds" 'BEGIN { printf "kernel start to init: %.0f million instructions (2 CPUs, serial console)\n", s * 1000 }'
}

check_findings() {
    local failed=no
    expect 'cpus 2$'
    for name in cpuset cpu io memory hugetlb pids rdma misc; do expect "controllers .*\b$name\b"; done
    for name in ext4 erofs overlay fuse virtiofs tmpfs mqueue cgroup2 bpf; do expect "filesystems .*\b$name\b"; done
    for name in cgroup ipc mnt net pid time user uts; do expect "namespaces .*\b$name\b"; done
    for name in virtio_blk virtio_rng virtio_net virtio_console virtio_balloon; do
        expect "virtio $name at LNRO0005:"
    done
    [ "$failed" = no ] || die "the guest lacks the above"
    say "the guest has everything it should"
}

expect() {
    grep -q "^smoke: $1" "$work/console" || { say "not found in the guest: $1"; failed=yes; }
}

main "$@"
