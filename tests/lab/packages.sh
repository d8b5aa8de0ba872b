#!/bin/bash
# Installs the Debian packages the project needs on the host, where they are missing. The lists are in lib.sh.
#
#   tests/lab/packages.sh GROUP...      groups: kernel lab containers
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[ $# -gt 0 ] || die "usage: packages.sh GROUP... (kernel lab containers)"
for group in "$@"; do
    case "$group" in
        kernel) need_packages "${KERNEL_PACKAGES[@]}" ;;
        lab) need_packages "${LAB_PACKAGES[@]}" ;;
        containers) need_packages "${CONTAINERS_PACKAGES[@]}" ;;
        *) die "unknown group '$group' (kernel lab containers)" ;;
    esac
done
