//! What the runtime can do, in the words of the runtime specification (`features.md`), and of containerd.

use oci_spec::runtime::{
    Apparmor, Cgroup, Features, IDMap, IntelRdt, LinuxFeature, LinuxNamespaceType, MountExtensions, Seccomp,
    Selinux,
};

/// Types of mounts that containerd ≥ 2.2 leaves to the shim instead of making them itself, as a list with commas: see
/// [`host::mkdir`](crate::host::mkdir).
pub const MOUNT_TYPES: &str = "mkdir/*";

/// The oldest and the newest version of the specification that a `config.json` may have.
const VERSIONS: [&str; 2] = ["1.0.0", "1.2.0"];

/// All hooks of the specification.
const HOOKS: [&str; 6] = [
    "prestart",
    "createRuntime",
    "createContainer",
    "startContainer",
    "poststart",
    "poststop",
];

/// Options of mounts that are not the filesystem's own. `shared` and `rshared` are missing: what is mounted in a VM cannot
/// appear on the host.
const MOUNT_OPTIONS: [&str; 47] = [
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "iversion",
    "lazytime",
    "loud",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "remount",
    "rexec",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnosuid",
    "ro",
    "rprivate",
    "rro",
    "rrw",
    "rslave",
    "rstrictatime",
    "rsuid",
    "runbindable",
    "rw",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "sync",
    "unbindable",
];

/// Every capability of Linux 6.12, which the guest has.
const CAPABILITIES: [&str; 41] = [
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_PERFMON",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
];

/// What a container may ask for. What is disabled here is refused, or left out with a warning: a profile of the host's
/// security modules has nothing to act on in a guest, and ids of users are not translated.
pub fn features() -> Features {
    let [oldest, newest] = VERSIONS.map(str::to_owned);
    let owned = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
    let mut features = Features::default();
    features
        .set_oci_version_min(oldest)
        .set_oci_version_max(newest)
        .set_hooks(owned(&HOOKS))
        .set_mount_options(owned(&MOUNT_OPTIONS))
        .set_linux(Some(linux()))
        .set_potentially_unsafe_config_annotations(owned(&["io.katacontainers."]));
    features
}

fn linux() -> LinuxFeature {
    let mut cgroup = Cgroup::default();
    // The guest's; the host's is for the whole VM.
    cgroup
        .set_v1(Some(false))
        .set_v2(Some(true))
        .set_systemd(Some(false))
        .set_systemd_user(Some(false))
        .set_rdma(Some(false));
    let (mut seccomp, mut apparmor, mut selinux) =
        (Seccomp::default(), Apparmor::default(), Selinux::default());
    seccomp.set_enabled(Some(false));
    apparmor.set_enabled(Some(false));
    selinux.set_enabled(Some(false));
    let (mut intel_rdt, mut idmap) = (IntelRdt::default(), IDMap::default());
    intel_rdt.set_enabled(Some(false));
    idmap.set_enabled(Some(false));
    let mut mounts = MountExtensions::default();
    mounts.set_idmap(Some(idmap));
    let namespaces = [
        LinuxNamespaceType::Cgroup,
        LinuxNamespaceType::Ipc,
        LinuxNamespaceType::Mount,
        LinuxNamespaceType::Network,
        LinuxNamespaceType::Pid,
        LinuxNamespaceType::Uts,
    ];
    let mut linux = LinuxFeature::default();
    linux
        .set_namespaces(Some(namespaces.to_vec()))
        .set_capabilities(Some(CAPABILITIES.map(str::to_owned).to_vec()))
        .set_cgroup(Some(cgroup))
        .set_seccomp(Some(seccomp))
        .set_apparmor(Some(apparmor))
        .set_selinux(Some(selinux))
        .set_intel_rdt(Some(intel_rdt))
        .set_mount_extensions(Some(mounts));
    linux
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_when_written_are_the_specifications() {
        let json = serde_json::to_value(features()).unwrap();

        assert_eq!(json["ociVersionMin"], "1.0.0");
        assert_eq!(json["linux"]["cgroup"]["v2"], true);
        assert_eq!(json["linux"]["mountExtensions"]["idmap"]["enabled"], false);
        assert_eq!(json["linux"]["namespaces"][1], "ipc");
        let has =
            |list: &serde_json::Value, word: &str| list.as_array().unwrap().iter().any(|one| one == word);
        assert!(has(&json["mountOptions"], "rro") && !has(&json["mountOptions"], "rshared"));
        assert!(has(&json["hooks"], "createRuntime") && has(&json["linux"]["capabilities"], "CAP_BPF"));
    }

    #[test]
    fn lists_when_read_by_people_are_sorted_and_without_doubles() {
        for list in [&MOUNT_OPTIONS[..], &CAPABILITIES[..]] {
            assert!(list.is_sorted_by(|one, next| one < next), "{list:?}");
        }
    }
}
