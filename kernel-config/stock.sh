#!/bin/bash
# Fetches one of Debian's own cloud kernels, the stock guest kernels we support, without installing it.
# Prints the folder on the last line of stdout; it holds vmlinuz, config and modules/lib/modules/<release>/.
#
#   kernel-config/stock.sh 6.12|6.1
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=../tests/lab/lib.sh
source "$HERE/../tests/lab/lib.sh"

work=
trap 'if [ -n "$work" ]; then rm -rf "$work" "$work".*; fi' EXIT
trap 'exit 130' INT TERM

main() {
    local meta package version result
    case "${1:-}" in
        6.12) meta=linux-image-6.12-cloud-amd64 ;;
        6.1) meta=linux-image-cloud-amd64 ;;
        *) die "usage: stock.sh 6.12|6.1" ;;
    esac
    need_packages kmod
    resolve "$meta"
    if [ ! -f "$result/vmlinuz" ]; then
        # The lists at hand may name a version that the mirror has replaced.
        apt-get -qq -o DPkg::Lock::Timeout=600 update >&2
        resolve "$meta"
        [ -n "$package" ] || die "Debian package $meta is not known to apt (is bookworm in its sources?)"
        with_lock stock fetch "$package" "$version" "$result"
    fi
    printf '%s\n' "$result"
}

# Sets package, version and result. The metapackage depends on one package, which is named after the kernel release.
resolve() {
    package="$(dependency "$1")"
    version=none
    [ -z "$package" ] || version="$(apt-cache show --no-all-versions "$package" | sed -n 's/^Version: //p')"
    result="$(cache_dir)/stock/$version"
}

dependency() {
    apt-cache depends "$1" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1
}

fetch() {
    local package="$1" version="$2" result="$3" release
    [ ! -f "$result/vmlinuz" ] || return 0
    say "fetching $package $version"
    mkdir -p "$(dirname "$result")"
    work="$(mktemp -d "$result.new.XXXXXX")"
    fetch_deb "$package=$version" "$work/deb"
    release="$(ls "$work/deb/lib/modules")"
    mkdir -p "$work/out/modules/lib"
    mv "$work/deb/boot/vmlinuz-$release" "$work/out/vmlinuz"
    mv "$work/deb/boot/config-$release" "$work/out/config"
    mv "$work/deb/lib/modules" "$work/out/modules/lib/modules"
    # The package leaves modules.dep to its postinst.
    depmod -b "$work/out/modules" "$release"
    rm -rf "$result"
    mv "$work/out" "$result"
}

main "$@"
