#!/bin/bash
# Builds the guest kernel: Debian's linux-source-6.12, tinyconfig, and the fragments beside this script.
# Prints the folder with vmlinux, bzImage and config on the last line of stdout; the folder is cached by a hash of
# the recipe, so the second run costs nothing.
#
#   kernel-config/build.sh              build, or find it in the cache
#   kernel-config/build.sh --check      only make the configuration and check it (seconds)
#   kernel-config/build.sh --tree DIR   build in DIR and keep it: a changed option costs a minute or two, not a full build
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=../tests/lab/lib.sh
source "$HERE/../tests/lab/lib.sh"

SOURCE_PACKAGE=linux-source-6.12
TARBALL=/usr/src/$SOURCE_PACKAGE.tar.xz
JOBS="${JOBS:-2}"
# Neither the time nor the place of the build may show in the image.
export KBUILD_BUILD_TIMESTAMP='1970-01-01' KBUILD_BUILD_USER=dragonball KBUILD_BUILD_HOST=dragonball
export KBUILD_BUILD_VERSION=1 LC_ALL=C

tree=
check_only=no
work=
trap 'if [ -n "$work" ]; then rm -rf "$work"; fi' EXIT
trap 'exit 130' INT TERM

main() {
    case "$#:${1:-}" in
        0:) ;;
        1:--check) check_only=yes ;;
        2:--tree) tree="$(realpath -m "$2")" ;;
        *) die "usage: build.sh [--check | --tree DIR]" ;;
    esac
    need_packages "${KERNEL_PACKAGES[@]}"
    if [ "$check_only" = yes ]; then
        unpack
        configure
        say "every requested option is in the configuration"
        return
    fi
    local result
    result="$(cache_dir)/kernel/$(recipe)"
    [ -f "$result/vmlinux" ] || with_lock kernel build "$result"
    printf '%s\n' "$result"
}

# Sources, compiler, options, this script: the same recipe gives the same kernel.
recipe() {
    {
        dpkg-query -W -f '${Package} ${Version}\n' "$SOURCE_PACKAGE"
        gcc --version | head -n 1
        ld --version | head -n 1
    } | recipe_hash "$HERE"/fragments/*.config "${BASH_SOURCE[0]}"
}

build() {
    local result="$1" started=$SECONDS
    [ ! -f "$result/vmlinux" ] || return 0
    unpack
    configure
    say "compiling with $JOBS jobs (5 to 20 minutes on 2 cores, by what else they do)"
    kmake -j"$JOBS" vmlinux bzImage >"$work/log" 2>&1 ||
        { tail -n 30 "$work/log" >&2; die "the kernel build failed; its last lines are above"; }
    mkdir -p "$work/out" "$(dirname "$result")"
    cp "$tree/vmlinux" "$tree/arch/x86/boot/bzImage" "$work/out/"
    cp "$tree/.config" "$work/out/config"
    rm -rf "$result"
    mv "$work/out" "$result"
    say "built $(kmake -s kernelrelease) in $((SECONDS - started)) s: $(sizes "$result")"
}

unpack() {
    mkdir -p "$(cache_dir)/build"
    work="$(mktemp -d "$(cache_dir)/build/kernel.XXXXXX")"
    tree="${tree:-$work/tree}"
    [ ! -f "$tree/Makefile" ] || return 0
    say "unpacking $TARBALL"
    [ ! -e "$tree" ] || die "$tree exists and is not a kernel tree"
    mkdir -p "$(dirname "$tree")" "$work/unpacked"
    tar -x -f "$TARBALL" -C "$work/unpacked" --strip-components=1
    # Only a complete tree gets the name that a second run trusts.
    mv "$work/unpacked" "$tree"
}

# tinyconfig's choices first, then ours; what neither names is off. (allnoconfig, not olddefconfig over tinyconfig:
# the latter lets "default y" back in for everything that became visible, which is half of what we want to be rid of.)
configure() {
    local wanted="$work/wanted"
    cat "$tree/kernel/configs/tiny.config" "$HERE"/fragments/*.config >"$wanted"
    check_duplicates
    KCONFIG_ALLCONFIG="$wanted" kmake allnoconfig >"$work/log" 2>&1 || { cat "$work/log" >&2; die "allnoconfig failed"; }
    kmake olddefconfig >"$work/log" 2>&1 || { cat "$work/log" >&2; die "olddefconfig failed"; }
    check_options
}

check_duplicates() {
    local twice
    twice="$(cat "$HERE"/fragments/*.config | option_names | sort | uniq -d)"
    [ -z "$twice" ] || die "options named by more than one line of the fragments:" "$twice"
}

option_names() { sed -nE 's/^(# )?(CONFIG_[A-Z0-9_a-z]+)(=.*| is not set)$/\2/p'; }

# Kconfig drops in silence what its dependencies do not allow. We do not.
check_options() {
    local missing=() line name
    while IFS= read -r line; do
        name="$(option_names <<<"$line")"
        [ -n "$name" ] || continue
        case "$line" in
            '#'*) ! grep -q "^$name=" "$tree/.config" || missing+=("$line (it is $(grep "^$name=" "$tree/.config"))") ;;
            *) grep -qxF "$line" "$tree/.config" || missing+=("$line") ;;
        esac
    done < <(cat "$HERE"/fragments/*.config)
    [ ${#missing[@]} -eq 0 ] && return
    printf '  %s\n' "${missing[@]}" >&2
    die "${#missing[@]} requested options did not survive olddefconfig (listed above)"
}

kmake() { nice -n 5 make -C "$tree" ARCH=x86_64 --no-print-directory "$@"; }

sizes() { du -h --apparent-size "$1/vmlinux" "$1/bzImage" | awk '{n = split($2, p, "/"); printf "%s %s ", p[n], $1}'; }

main "$@"
