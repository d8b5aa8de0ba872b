#!/bin/bash
# Makes the images that the suites pull, from Debian packages, as the storage of Debian's docker-registry.
#
#   images.sh STORAGE
#
# The originals (ghcr.io/containerd/…, registry.k8s.io/…) are small: what the suites look for in them is in ours. The layout of a
# registry's storage is that of distribution's registry/storage/paths.go, version 2.
set -euo pipefail

HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=../lab/lib.sh
source "$HERE/../lab/lib.sh"

work=
trap 'if [ -n "$work" ]; then rm -rf "$work"; fi' EXIT
trap 'exit 130' INT TERM

main() {
    [ $# = 1 ] || die "usage: images.sh STORAGE"
    storage="$1/docker/registry/v2"
    need_packages busybox-static gcc libc6-dev
    work="$(mktemp -d)"
    busybox_root "$work/busybox"
    image busybox 1.36 "$work/busybox" '"Cmd":["sh"]'
    # The suites use alpine for nothing that busybox does not have.
    image alpine 3.14.0 "$work/busybox" '"Cmd":["sh"]'
    pause
    resource_consumer
    volumes
}

# The users and groups are those of the original, which the suites know by number.
busybox_root() {
    local root="$1" applet
    mkdir -p "$root"/{bin,dev,etc,home,proc,root,sys,tmp,usr/bin,usr/sbin,var}
    chmod 1777 "$root/tmp"
    cp /bin/busybox "$root/bin/busybox"
    for applet in $(/bin/busybox --list); do
        [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
    done
    cat >"$root/etc/passwd" <<-'END'
		root:x:0:0:root:/root:/bin/sh
		daemon:x:1:1:daemon:/usr/sbin:/bin/false
		bin:x:2:2:bin:/bin:/bin/false
		sys:x:3:3:sys:/dev:/bin/false
		sync:x:4:100:sync:/bin:/bin/sync
		mail:x:8:8:mail:/var/spool/mail:/bin/false
		www-data:x:33:33:www-data:/var/www:/bin/false
		operator:x:37:37:Operator:/var:/bin/false
		nobody:x:65534:65534:nobody:/home:/bin/false
	END
    cat >"$root/etc/group" <<-'END'
		root:x:0:
		daemon:x:1:
		bin:x:2:
		sys:x:3:
		adm:x:4:
		tty:x:5:
		disk:x:6:
		mail:x:8:
		wheel:x:10:root
		www-data:x:33:
		operator:x:37:
		users:x:100:
		nogroup:x:65534:
	END
    # The original's busybox has the nc of 1.10, which takes SIGTERM as process 1 too and leaves with 128 and the signal; Debian's
    # busybox has the small one.
    rm "$root/bin/nc"
    cat >"$root/bin/nc" <<-'END'
		#!/bin/sh
		trap 'kill $!; exit 143' TERM
		busybox nc "$@" &
		wait $!
	END
    chmod 755 "$root/bin/nc"
}

pause() {
    mkdir "$work/pause"
    gcc -Os -static -s -o "$work/pause/pause" -x c - <<-'END'
		#include <signal.h>
		#include <stdlib.h>
		#include <sys/wait.h>
		#include <unistd.h>

		static void leave(int signal) { (void)signal; _exit(0); }
		static void reap(int signal) { (void)signal; while (waitpid(-1, NULL, WNOHANG) > 0) { } }

		int main(void) {
		    signal(SIGINT, leave);
		    signal(SIGTERM, leave);
		    signal(SIGCHLD, reap);
		    for (;;)
		        pause();
		}
	END
    image pause 3.10 "$work/pause" '"User":"65535:65535","Entrypoint":["/pause"]'
}

# busybox and `stress`, with the libraries it wants.
resource_consumer() {
    local root="$work/resource-consumer" library
    fetch_deb stress "$work/stress"
    cp -a "$work/busybox" "$root"
    cp "$work/stress/usr/bin/stress" "$root/usr/bin/stress"
    for library in $(ldd "$root/usr/bin/stress" | grep -o '/[^ ]*'); do
        mkdir -p "$root$(dirname "$library")"
        cp -L "$library" "$root$library"
    done
    image resource-consumer 1.10 "$root" '"Cmd":["sleep","3600"]'
}

volumes() {
    local root="$work/volume-copy-up"
    cp -a "$work/busybox" "$root"
    mkdir -p "$root/test_dir" "$root/:colon_prefixed" "$root/C:/weird_test_dir"
    echo test_content | tee "$root/test_dir/test_file" "$root/:colon_prefixed/colon_prefixed_file" \
        "$root/C:/weird_test_dir/weird_test_file" >/dev/null
    image volume-copy-up 2.2 "$root" \
        '"Cmd":["sh"],"Volumes":{"/test_dir":{},"/:colon_prefixed":{},"/C:/weird_test_dir":{}}'

    root="$work/volume-ownership"
    cp -a "$work/busybox" "$root"
    mkdir "$root/test_dir"
    NOBODYS=./test_dir image volume-ownership 2.1 "$root" '"Cmd":["sh"],"Volumes":{"/test_dir":{}}'
}

# image NAME TAG ROOT CONFIG — one layer with ROOT's files, all root's but $NOBODYS, and the members of `config` CONFIG.
image() {
    local name="$1" tag="$2" root="$3" config="$4" layer manifest repository
    layer="$work/$name.tar"
    local tar=(tar --sort=name --mtime=@0 --numeric-owner -C "$root" -f "$layer")
    "${tar[@]}" --owner=0 --group=0 --exclude="${NOBODYS:-./no such file}" -c .
    [ -z "${NOBODYS:-}" ] || "${tar[@]}" --owner=65534 --group=65534 -r "$NOBODYS"
    local diff
    diff="sha256:$(digest "$layer")"
    gzip -n -9 "$layer"
    printf '{"architecture":"amd64","os":"linux","config":{"Env":["PATH=%s"],%s},"rootfs":{"type":"layers","diff_ids":["%s"]}}' \
        /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$config" "$diff" >"$work/config"
    manifest="$work/manifest"
    printf '{"schemaVersion":2,"mediaType":"%s","config":%s,"layers":[%s]}' application/vnd.oci.image.manifest.v1+json \
        "$(descriptor application/vnd.oci.image.config.v1+json "$work/config")" \
        "$(descriptor application/vnd.oci.image.layer.v1.tar+gzip "$layer.gz")" >"$manifest"

    repository="$storage/repositories/$name"
    link "$repository/_layers/sha256/$(blob "$work/config")"
    link "$repository/_layers/sha256/$(blob "$layer.gz")"
    link "$repository/_manifests/revisions/sha256/$(blob "$manifest")"
    link "$repository/_manifests/tags/$tag/index/sha256/$(digest "$manifest")"
    mkdir -p "$repository/_manifests/tags/$tag/current"
    printf 'sha256:%s' "$(digest "$manifest")" >"$repository/_manifests/tags/$tag/current/link"
}

digest() { sha256sum "$1" | cut -d' ' -f1; }

# descriptor MEDIA-TYPE FILE
descriptor() { printf '{"mediaType":"%s","digest":"sha256:%s","size":%s}' "$1" "$(digest "$2")" "$(stat -c %s "$2")"; }

# blob FILE — stores it; prints its digest's hex digits.
blob() {
    local hex
    hex="$(digest "$1")"
    mkdir -p "$storage/blobs/sha256/${hex:0:2}/$hex"
    cp "$1" "$storage/blobs/sha256/${hex:0:2}/$hex/data"
    printf '%s\n' "$hex"
}

# link FOLDER/HEX — a registry's link to the blob HEX.
link() {
    mkdir -p "$1"
    printf 'sha256:%s' "$(basename "$1")" >"$1/link"
}

main "$@"
