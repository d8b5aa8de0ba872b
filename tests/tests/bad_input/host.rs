//! Hosts that cannot run a virtual machine, and bundles that cannot be run.

use tests::leftovers::{Host, added};
use tests::{Case, Settings};

use crate::refusal::{assert_no_panic, assert_refusal, begin, begin_with_linux_guests};

/// A `/dev` with the usual nodes but no `kvm`.
const WITHOUT_KVM: &str = r#"
mkdir "$DIR/dev"
mount -t tmpfs -o mode=755 dev "$DIR/dev"
for node in null zero full random urandom tty fuse; do
    [ ! -e /dev/$node ] || cp -a /dev/$node "$DIR/dev/"
done
mkdir "$DIR/dev/pts" "$DIR/dev/shm" "$DIR/dev/net"
[ ! -e /dev/net/tun ] || cp -a /dev/net/tun "$DIR/dev/net/"
mount --bind /dev/pts "$DIR/dev/pts"
ln -s pts/ptmx "$DIR/dev/ptmx"
mount --rbind "$DIR/dev" /dev
"#;

/// A node on a file system mounted `nodev`: opening it is refused even to root.
const KVM_FORBIDDEN: &str = r#"
mkdir "$DIR/dev"
mount -t tmpfs -o nodev,mode=755 dev "$DIR/dev"
cp -a /dev/kvm "$DIR/dev/kvm"
mount --bind "$DIR/dev/kvm" /dev/kvm
"#;

/// A test on a containerd that sees a changed host; `None` under runc, which needs no KVM.
fn begin_on(name: &str, change: &str) -> Option<Case> {
    if tests::case::skipped_under_runc("it needs no KVM") {
        return None;
    }
    let settings = Settings {
        host_change: Some(change.to_owned()),
        ..Settings::from_env()
    };
    Some(Case::begin_with(name, settings))
}

#[track_caller]
fn assert_host_refused(case: &Case, codes: &[&str], words: &[&str]) {
    let before = Host::look(case.daemon());
    let done = case.container().run(&["true"]).flag("--rm").output();
    let err = done.err();
    let code = codes
        .iter()
        .find(|code| err.trim_end().ends_with(&format!(": {code}")));
    assert_refusal(
        &done,
        code.unwrap_or_else(|| panic!("none of {codes:?}: {}", done.describe())),
        words,
    );
    assert_eq!(added(case.daemon(), &before), [""; 0]);
    assert_no_panic(case);
}

#[test]
fn kvm_when_missing_is_named() {
    let Some(case) = begin_on("no-kvm", WITHOUT_KVM) else {
        return;
    };
    assert_host_refused(
        &case,
        &["not found", "failed precondition"],
        &["/dev/kvm", "no KVM"],
    );
}

#[test]
fn kvm_when_forbidden_is_named() {
    let Some(case) = begin_on("kvm-denied", KVM_FORBIDDEN) else {
        return;
    };
    // containerd 1.6 has no text for PERMISSION_DENIED.
    assert_host_refused(
        &case,
        &["failed precondition", "unknown"],
        &["/dev/kvm", "permission denied"],
    );
}

#[test]
fn kvm_when_it_cannot_run_linux_is_refused() {
    let Some(case) = begin("weak-kvm") else { return };
    if case.daemon().settings.linux_guests {
        tests::diagnosis::say("skipped: KVM runs Linux here; the host run of the suite covers this");
        return;
    }
    assert_host_refused(
        &case,
        &["failed precondition", "unavailable"],
        &["/dev/kvm", "Linux"],
    );
}

#[test]
fn rootfs_when_missing_is_named() {
    let Some(case) = begin("no-rootfs") else { return };
    let before = Host::look(case.daemon());
    let done = case
        .container()
        .run(&["/bin/true"])
        .image("/nowhere/rootfs")
        .flag("--rm")
        .flag("--rootfs")
        .output();
    assert_refusal(&done, "not found", &["rootfs", "/nowhere/rootfs"]);
    assert_eq!(added(case.daemon(), &before), [""; 0]);
    assert_no_panic(&case);
}

#[test]
fn bind_mount_when_source_is_missing_is_named() {
    let Some(case) = begin_with_linux_guests("no-source") else {
        return;
    };
    let before = Host::look(case.daemon());
    let container = case.container();
    let mount = "type=bind,src=/nowhere/source,dst=/mnt,options=rbind:ro";
    let done = container
        .run(&["true"])
        .flag("--rm")
        .option("--mount", mount)
        .output();
    drop(container);
    assert_refusal(&done, "not found", &["/nowhere/source"]);
    assert_eq!(added(case.daemon(), &before), [""; 0]);
    assert_no_panic(&case);
}
