# Cleans up one private containerd once the test process is gone: the test holds the other end of our
# standard input, so this runs after a normal exit, a panic and SIGKILL alike.
# Arguments: DIR CTR NAMESPACE
dir=$1 ctr=$2 ns=$3
cat >/dev/null

ctr() { timeout -k 5 30 "$ctr" -a "$dir/c.sock" -n "$ns" "$@"; }

if [ -S "$dir/c.sock" ] && kill -0 "$(cat "$dir/pid")" 2>/dev/null; then
    for id in $(ctr containers ls -q); do
        ctr tasks kill -s KILL "$id"
        ctr tasks rm -f "$id"
        ctr containers rm "$id"
    done
fi

# containerd, the shims it left and ctr clients: each has our folder on its command line, as no other process.
ours() {
    for proc in /proc/[0-9]*; do
        pid=${proc#/proc/}
        [ "$pid" = $$ ] && continue
        if tr '\0' '\n' 2>/dev/null <"$proc/cmdline" | grep -qF "$dir/"; then echo "$pid"; fi
    done
}
for signal in TERM KILL; do
    pids=$(ours)
    # shellcheck disable=SC2086 # one word per process id
    [ -z "$pids" ] || kill -s "$signal" $pids 2>/dev/null
    for _ in $(seq 50); do
        [ -z "$(ours)" ] && break
        sleep 0.1
    done
done

# Deepest first; mountinfo's fifth field is the mount point.
awk -v dir="$dir/" 'index($5, dir) == 1 { print $5 }' /proc/self/mountinfo | sort -r | while read -r point; do
    umount -l "$point"
done
for group in /sys/fs/cgroup/"$ns" /sys/fs/cgroup/*/"$ns"; do
    [ -d "$group" ] && find "$group" -depth -type d -exec rmdir {} +
done
rm -rf --one-file-system "$dir"
