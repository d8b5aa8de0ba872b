# shellcheck shell=bash
# What the scripts of tests/lab/ and kernel-config/ share: messages, the cache, Debian packages.
# Sourced, never run. The sourcing script sets `set -euo pipefail`.

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }
die() { say "$*"; exit 1; }

# The one folder outside the checkout; see CONTRIBUTING.
cache_dir() { printf '%s\n' "${XDG_CACHE_HOME:-$HOME/.cache}/dragonball"; }

# recipe_hash FILE... — 16 hex digits over names and contents, plus whatever comes on stdin.
recipe_hash() {
    { for file in "$@"; do basename "$file"; cat "$file"; done; cat; } | sha256sum | cut -c1-16
}

# Packages the host needs, by purpose.
# shellcheck disable=SC2034
{
    # Build the guest kernel and try it.
    KERNEL_PACKAGES=(linux-source-6.12 gcc make flex bison bc libelf-dev libssl-dev lz4 xz-utils cpio kmod)
    # Build the lab's machine and run it.
    LAB_PACKAGES=(qemu-system-data seabios libglib2.0-0 debootstrap busybox-static cpio e2fsprogs kmod xz-utils)
    # Run containers on the host itself.
    CONTAINERS_PACKAGES=(containerd runc busybox-static iproute2 iptables containernetworking-plugins)
}

# need_packages NAME... — installs the Debian packages that are missing.
need_packages() {
    local missing=() name
    for name in "$@"; do
        dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null | grep -qx installed || missing+=("$name")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" = 0 ] || die "these Debian packages are missing and only root can install them: ${missing[*]}"
    say "installing ${missing[*]}"
    install_packages "${missing[@]}"
}

# Asks for fresh package lists only when the ones at hand do not do (they are absent, or name a version that is gone).
install_packages() {
    local apt=(apt-get -qq -o DPkg::Lock::Timeout=600)
    export DEBIAN_FRONTEND=noninteractive
    "${apt[@]}" install -y --no-install-recommends "$@" >/dev/null 2>&1 && return
    "${apt[@]}" update >&2
    "${apt[@]}" install -y --no-install-recommends "$@" >&2
}

# with_lock NAME COMMAND... — one builder at a time; the others wait and then find the result in the cache.
# (Not a subshell: COMMAND's variables must reach the caller's EXIT trap.)
with_lock() {
    local lock_file lock_fd
    lock_file="$(cache_dir)/$1.lock"
    shift
    mkdir -p "$(dirname "$lock_file")"
    exec {lock_fd}>"$lock_file"
    flock --nonblock "$lock_fd" || { say "waiting for another build (lock $lock_file)"; flock "$lock_fd"; }
    "$@"
    exec {lock_fd}>&-
}

# suite_apt SUITE DIR [deb|deb-src] — sets the array `apt` to options that make apt see SUITE's packages (or sources) and
# nothing else, with its state in DIR; the host's own sources stay as they are.
suite_apt() {
    local suite="$1" state="$2"
    mkdir -p "$state"/{lists/partial,cache/archives/partial}
    apt=(-o "Dir::Etc::sourcelist=$state/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::lists=$state/lists" -o "Dir::Cache=$state/cache" -o APT::Sandbox::User=root)
    echo "${3:-deb} [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $suite main" \
        >"$state/sources.list"
    say "reading Debian $suite"
    apt-get -qq "${apt[@]}" update >&2
}

# suite_version PACKAGE — the version in the suite that `apt` was set to by suite_apt.
suite_version() { apt-cache "${apt[@]}" show --no-all-versions "$1" | sed -n 's/^Version: //p'; }

# fetch_deb PACKAGE DIR [APT OPTION...] — downloads PACKAGE (as PACKAGE, PACKAGE=VERSION or PACKAGE/SUITE) and unpacks
# it into DIR without installing it.
fetch_deb() {
    local package="$1" into="$2" download
    shift 2
    download="$(mktemp -d "$into.deb.XXXXXX")"
    # Not apt's sandbox user: it may not write into our folder.
    (cd "$download" && apt-get -qq -o APT::Sandbox::User=root "$@" download "$package" >/dev/null) ||
        { rm -rf "$download"; die "cannot download the Debian package $package"; }
    mkdir -p "$into"
    dpkg-deb -x "$download"/*.deb "$into"
    rm -rf "$download"
}
