#!/bin/bash
# Boots the same guest under this VMM and under QEMU's microvm and prints what each needed; run by tests/lab/bench in L1, as root.
#
#   linux.sh FOLDER LOAD...      FOLDER: vmlinux, boot (release build of the example), guest-init
#   loads: boot memory block net vsock fs
#
# QEMU's set-up: microvm with ACPI (the kernel knows virtio-mmio devices from nowhere else) and virtio 1 (its virtio-mmio is legacy
# unless told otherwise: vhost-user refuses that, and the guest hangs under fio's random writes), PVH entry, no PIT, PIC, RTC and no
# serial port; console on virtio like ours; disks on an I/O thread; TAP without vhost; vhost-vsock; virtiofsd.
set -euo pipefail

FOLDER="$1"
shift
WORK="$(mktemp -d)"
LIMIT=240 # seconds a guest may take
QUIET=60  # seconds it may print nothing
ATTEMPTS=3 # QEMU's guests hang now and then under a disk's load, with an idle processor (cause unknown)
COUNTERS=(exits io_exits mmio_exits halt_exits irq_injections nmi_injections pf_fixed host_state_reload)
MICROVM=(-M "microvm,accel=kvm,pit=off,pic=off,rtc=off,isa-serial=off,acpi=on,memory-backend=ram" -cpu host -smp 1 -m 512
    -global virtio-mmio.force-legacy=false
    -nodefaults -no-user-config -display none -no-reboot
    -chardev stdio,id=console -device virtio-serial-device -device virtconsole,chardev=console)
vmm=0 daemon=0

main() {
    make_initramfs
    for load in "$@"; do "$load"; done
}

make_initramfs() {
    local root="$WORK/root"
    mkdir -p "$root"/{bin,dev,proc,sys,mnt}
    cp /bin/busybox "$root/bin/"
    install -m 755 "$FOLDER/guest-init" "$root/init"
    mknod "$root/dev/console" c 5 1
    (cd "$root" && find . | busybox cpio -o -H newc 2>/dev/null) >"$WORK/initrd"
}

# A disk with the loads' programs, taken from this machine.
make_tools() {
    [ ! -f "$WORK/tools" ] || return 0
    local root="$WORK/tools.d" file
    mkdir -p "$root"/{dev,proc,tmp}
    for file in /usr/bin/fio /usr/bin/iperf3 /usr/bin/socat; do
        { echo "$file"; ldd "$file" | grep -o '/[^ ]*'; } | while read -r file; do
            mkdir -p "$root$(dirname "$file")"
            cp -L "$file" "$root$file"
        done
    done
    mkfs.ext4 -q -F -d "$root" "$WORK/tools" 128M >/dev/null
    # Written, not sparse, and in the page cache: the device is measured, not L1's disk.
    dd if=/dev/urandom of="$WORK/data" bs=1M count=256 status=none
}

# start LOAD VMM OPTION... — runs the guest in the background, its console on descriptor 3.
start() {
    local load="$1" command=() cmdline="console=hvc0 quiet loglevel=1 panic=-1 bench=$1"
    case "$2" in
        ours) command=("$FOLDER/boot" --kernel "$FOLDER/vmlinux" --initramfs "$WORK/initrd" --cmdline "$cmdline pci=off"
            --memory 512 --timeout "$LIMIT") ;;
        qemu) command=(qemu-system-x86_64 "${MICROVM[@]}" -kernel "$FOLDER/vmlinux" -initrd "$WORK/initrd"
            -append "$cmdline pci=off") ;;
    esac
    shift 2
    # vhost-user needs shared memory; private memory is what QEMU is fastest with.
    [ "${command[0]}" != qemu-system-x86_64 ] || case "$load" in
        fs) command+=(-object memory-backend-memfd,id=ram,size=512M,share=on) ;;
        *) command+=(-object memory-backend-ram,id=ram,size=512M) ;;
    esac
    rm -f "$WORK/console"
    mkfifo "$WORK/console"
    began="${EPOCHREALTIME/./}"
    "${command[@]}" "$@" </dev/null >"$WORK/console" 2>"$WORK/errors" &
    vmm=$!
    exec 3<"$WORK/console"
}

stop() {
    kill "$vmm" 2>/dev/null || true
    wait "$vmm" 2>/dev/null || true
    exec 3<&-
}

# until_line TEXT LABEL — reads the console to a line with TEXT; prints results on the way.
until_line() {
    local line
    while read -r -t "$QUIET" line <&3; do
        line="${line%$'\r'}"
        case "$line" in *BENCH-RESULT*) echo "$2 ${line#*BENCH-RESULT }" ;; esac
        case "$line" in *"$1"*) return 0 ;; esac
    done
    echo "$2 failed: the guest's console ended before $1"
    tail -n 5 "$WORK/errors"
    return 1
}

# until_results COUNT LABEL — waits for COUNT results in the shared directory and prints them: the console of QEMU's microvm is
# silent from the moment its vhost-user-fs device starts (cause unknown), while the guest works.
until_results() {
    local file="$WORK/share/results" left="$LIMIT"
    while [ "$left" -gt 0 ] && [ "$(grep -c . "$file" 2>/dev/null)" != "$1" ]; do
        left=$((left - 1))
        sleep 1
    done
    [ "$left" -gt 0 ] || echo "$2 failed: less than $1 results in $LIMIT s"
    [ ! -e "$file" ] || sed "s/^/$2 /" "$file"
}

# run LABEL LOAD VMM OPTION... — a guest from its start to the end of the load.
run() {
    local label="$1" attempt
    shift
    for attempt in $(seq "$ATTEMPTS"); do
        start "$@"
        if until_line BENCH-DONE "$label"; then stop; return 0; fi
        stop
    done
    echo "$label given up after $ATTEMPTS attempts"
}

counters() {
    local name
    for name in "${COUNTERS[@]}"; do
        [ ! -r "/sys/kernel/debug/kvm/$name" ] || printf '%s %s ' "$name" "$(cat "/sys/kernel/debug/kvm/$name")"
    done
}

# Three each, turn by turn; the first warms the page cache. QEMU with its default firmware for ACPI (SeaBIOS) and with the smaller
# qboot.
boot() {
    local round name
    for round in 1 2 3; do
        for name in ours qemu qemu-qboot; do
            case "$name" in
                qemu-qboot) start idle qemu -bios qboot.rom ;;
                *) start idle "$name" ;;
            esac
            until_line BENCH-INIT "$name"
            echo "$name boot-$round $(((${EPOCHREALTIME/./} - began))) us $(counters)"
            stop
        done
    done
}

# PSS of everything but guest memory (the mappings of 512 MiB together: the largest).
memory() {
    local name tap=bench0
    make_tools
    make_tap
    for name in ours qemu; do
        case "$name" in
            ours) start idle ours --disk "$WORK/data" --net "$tap" --vsock "$WORK/vsock" ;;
            qemu) start idle qemu "${qemu_disk[@]}" "${qemu_net[@]}" "${qemu_vsock[@]}" ;;
        esac
        until_line BENCH-DONE "$name"
        awk -v name="$name" '
            /^[0-9a-f]+-[0-9a-f]+ / { mapping = $0 }
            /^Size:/ { guest = $2 >= 262144 }
            /^Pss:/ { if (guest) ram += $2; else { own += $2; if (mapping ~ /\//) file += $2 } }
            END { printf "%s memory own %d KiB (of it files %d KiB) guest %d KiB\n", name, own, file, ram }' "/proc/$vmm/smaps"
        stop
    done
}

make_tap() {
    [ ! -e /sys/class/net/bench0 ] || return 0
    ip tuntap add bench0 mode tap vnet_hdr
    ip address add 10.9.0.1/24 dev bench0
    ip link set bench0 up
}

set_qemu_devices() {
    qemu_disk=(-object iothread,id=io -drive "id=data,file=$WORK/data,format=raw,if=none"
        -device virtio-blk-device,drive=data,iothread=io)
    qemu_tools=(-drive "id=tools,file=$WORK/tools,format=raw,if=none,read-only=on" -device virtio-blk-device,drive=tools)
    qemu_net=(-netdev tap,id=net,ifname=bench0,script=no,downscript=no,vhost=off -device virtio-net-device,netdev=net)
    qemu_vsock=()
    ! modprobe vhost_vsock 2>/dev/null || qemu_vsock=(-device vhost-vsock-device,guest-cid=3)
}
set_qemu_devices

block() {
    make_tools
    run ours block ours --disk "$WORK/tools" --disk "$WORK/data"
    run qemu block qemu "${qemu_tools[@]}" "${qemu_disk[@]}"
    run ours-io_uring block ours --disk "$WORK/tools" --uring-disk "$WORK/data"
}

net() {
    make_tools
    make_tap
    iperf3 -s -D
    run ours net ours --disk "$WORK/tools" --net bench0
    run qemu net qemu "${qemu_net[@]}" "${qemu_tools[@]}"
}

vsock() {
    make_tools
    socat -u -b 65536 "UNIX-LISTEN:$WORK/vsock_5000" OPEN:/dev/null &
    run ours vsock ours --disk "$WORK/tools" --vsock "$WORK/vsock"
    if [ ${#qemu_vsock[@]} -gt 0 ]; then
        socat -u -b 65536 VSOCK-LISTEN:5000 OPEN:/dev/null &
        run qemu vsock qemu "${qemu_vsock[@]}" "${qemu_tools[@]}"
    else
        echo "qemu vsock: no vhost_vsock module here"
    fi
}

fs() {
    mkdir -p "$WORK/share"
    dd if=/dev/urandom of="$WORK/share/big" bs=1M count=128 status=none
    tar -C /usr/lib -cf - python3 x86_64-linux-gnu/perl-base 2>/dev/null | head -c 16M >"$WORK/share/files.tar" || true
    run ours fs ours --share "$WORK/share"
    rm -rf "$WORK/share/out" "$WORK/share/results"
    if [ -x /usr/lib/qemu/virtiofsd ]; then
        /usr/lib/qemu/virtiofsd --socket-path="$WORK/fs" -o "source=$WORK/share,cache=auto" >/dev/null 2>&1 &
        daemon=$!
        while [ ! -S "$WORK/fs" ] && kill -0 "$daemon"; do sleep 0.1; done
        start fs qemu -chardev "socket,id=fs,path=$WORK/fs" -device vhost-user-fs-device,chardev=fs,tag=share0
        until_results 2 qemu
        stop
    else
        echo "qemu fs: no virtiofsd here"
    fi
}

main "$@"
