//! From the host's OCI spec to the guest's: what only makes sense on the host is taken out, loudly where a user could
//! miss it.

pub(crate) mod bundle;

use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Linux, LinuxBlockIo, LinuxDeviceCgroup, LinuxNamespaceType, LinuxResources, Process, Spec,
};
use protocols::oci_convert::uncarried;

use super::hooks;
use crate::cri::ContainerKind;
use crate::error::{Error, ErrorKind, Result};

/// What the guest's spec gets in place of the host's.
#[derive(Debug, Clone, Default)]
pub struct GuestSpec {
    /// Container id.
    pub container: String,
    /// Rootfs in the guest.
    pub rootfs: String,
    /// Mounts in the guest.
    pub mounts: Vec<oci_spec::runtime::Mount>,
    /// Bundle on the host, for an annotation.
    pub bundle: PathBuf,
    /// One pty.
    pub terminal: bool,
    /// Take the seccomp profile out.
    pub disable_seccomp: bool,
}

/// Refuses what the guest cannot have and a container cannot do without: devices and limits. To be asked before a VM is
/// booted for it.
///
/// # Errors
/// `Unimplemented` naming all of them, in config.json notation; `InvalidArgument` for a hook that cannot be run.
pub fn check(spec: &Spec) -> Result<()> {
    hooks::check(spec)?;
    let mut lost = Vec::new();
    if let Some(linux) = spec.linux() {
        lost.extend(host_namespaces(linux));
        // A privileged container gets a list of whatever the host has; it asked for none of them.
        if !is_privileged(linux) {
            lost.extend(foreign_devices(linux).map(|path| {
                let path = path.display();
                format!("linux.devices {path}: devices of the host are not passed to the guest")
            }));
        }
        lost.extend(linux.resources().iter().flat_map(lost_limits));
    }
    refuse(lost)
}

/// Devices that the guest does not have by itself.
fn foreign_devices(linux: &Linux) -> impl Iterator<Item = &Path> {
    let devices = linux.devices().iter().flatten();
    devices
        .map(|device| device.path().as_path())
        .filter(|path| !is_standard(path))
}

/// Whether every device may be used: the mark of `ctr run --privileged` and of a privileged container of a CRI.
fn is_privileged(linux: &Linux) -> bool {
    let resources = linux.resources().as_ref();
    let rules = resources.and_then(|resources| resources.devices().as_ref());
    rules
        .into_iter()
        .flatten()
        .any(|rule| rule.allow() && names_no_device(rule))
}

/// Whether a rule is about all devices, or all of a kind, and so means the same in the guest.
fn names_no_device(rule: &LinuxDeviceCgroup) -> bool {
    // Some write -1 for any number.
    let any = |number: Option<i64>| number.is_none_or(|number| number < 0);
    any(rule.major()) && any(rule.minor())
}

fn refuse(lost: Vec<String>) -> Result<()> {
    if lost.is_empty() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Unimplemented, lost.join("; ")))
}

/// The limits of `resources` that the guest cannot keep.
fn lost_limits(resources: &LinuxResources) -> Vec<String> {
    let mut lost = Vec::new();
    let pages = resources.hugepage_limits().iter().flatten();
    // Kubernetes sets every size to 0.
    if pages.clone().any(|limit| limit.limit() > 0) {
        lost.push("linux.resources.hugepageLimits: the guest has no huge pages".to_owned());
    }
    if resources.block_io().as_ref().is_some_and(limits_block_io) {
        lost.push("linux.resources.blockIO: the guest's files are not on a block device".to_owned());
    }
    if resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()) {
        lost.push("linux.resources.rdma: the guest has no RDMA devices".to_owned());
    }
    if let Some(unified) = resources.unified().as_ref().filter(|unified| !unified.is_empty()) {
        let mut files: Vec<_> = unified.keys().map(String::as_str).collect();
        files.sort_unstable();
        lost.push(format!(
            "linux.resources.unified: {} cannot be passed to the guest",
            files.join(", ")
        ));
    }
    lost
}

fn limits_block_io(block_io: &LinuxBlockIo) -> bool {
    let throttles = [
        block_io.throttle_read_bps_device(),
        block_io.throttle_write_bps_device(),
        block_io.throttle_read_iops_device(),
        block_io.throttle_write_iops_device(),
    ];
    let weights = block_io.weight_device().iter().flatten().count();
    // Docker writes a weight of 0 for none.
    block_io.weight().is_some_and(|weight| weight > 0)
        || weights + throttles.into_iter().flatten().flatten().count() > 0
}

/// Devices that every container gets from the guest.
fn is_standard(path: &Path) -> bool {
    [
        "null", "zero", "full", "random", "urandom", "tty", "ptmx", "console",
    ]
    .iter()
    .any(|name| path == Path::new("/dev").join(name))
}

/// Takes out of `resources` what only means something on the host: for a new container and for an update alike.
///
/// # Errors
/// `Unimplemented` naming the limits that the guest cannot keep.
pub fn amend_resources(resources: &mut LinuxResources) -> Result<()> {
    refuse(lost_limits(resources))?;
    // Numbers of devices, processors and nodes of the host. The host's cgroup holds the pod to its processors.
    keep_rules_without_numbers(resources);
    resources.set_block_io(None);
    resources.set_network(None);
    resources.set_hugepage_limits(None);
    resources.set_rdma(None);
    resources.set_unified(None);
    if let Some(cpu) = resources.cpu_mut() {
        cpu.set_cpus(None);
        cpu.set_mems(None);
    }
    Ok(())
}

/// Changes `spec` for the guest; returns the warnings.
///
/// # Errors
/// As [`check`].
pub fn amend(spec: &mut Spec, guest: GuestSpec, kind: &ContainerKind) -> Result<Vec<String>> {
    check(spec)?;
    let mut warnings: Vec<String> = uncarried(spec)
        .into_iter()
        .map(|field| format!("{field} is set and cannot be passed to the guest"))
        .collect();
    let foreign = spec.linux().iter().flat_map(foreign_devices).count();
    if foreign > 0 {
        warnings.push(format!(
            "privileged: {foreign} devices of the host are left out, the container has those of its guest"
        ));
    }
    hooks::leave_to_guest(spec);
    if let Some(root) = spec.root_mut() {
        root.set_path(guest.rootfs.into());
    }
    spec.set_mounts(Some(guest.mounts));
    if let Some(process) = spec.process_mut() {
        process.set_terminal(Some(guest.terminal));
        amend_process(process);
    }
    let annotations = spec.annotations_mut().get_or_insert_default();
    annotations.insert(
        "io.katacontainers.pkg.oci.bundle_path".into(),
        guest.bundle.display().to_string(),
    );
    let kind = match kind {
        ContainerKind::Member { .. } => "pod_container",
        ContainerKind::Single | ContainerKind::Sandbox => "pod_sandbox",
    };
    annotations.insert("io.katacontainers.pkg.oci.container_type".into(), kind.into());
    amend_linux(spec, &guest.container, guest.disable_seccomp)?;
    Ok(warnings)
}

/// Changes a process for the guest: host security labels mean nothing there. Capabilities stay.
pub fn amend_process(process: &mut Process) {
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
}

fn amend_linux(spec: &mut Spec, container: &str, disable_seccomp: bool) -> Result<()> {
    let Some(linux) = spec.linux_mut() else {
        return Ok(());
    };
    if let Some(namespaces) = linux.namespaces_mut() {
        // The VM is the network namespace; time and cgroup namespaces of the host have no counterpart to join.
        namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
        for namespace in namespaces {
            // Paths lead to the host's /proc. The agent shares IPC and UTS within the pod by itself.
            namespace.set_path(None);
        }
    }
    linux.set_cgroups_path(Some(format!("/kata/{container}").into()));
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    // The guest makes the standard ones.
    linux.set_devices(None);
    if disable_seccomp {
        linux.set_seccomp(None);
    }
    linux.resources_mut().as_mut().map_or(Ok(()), amend_resources)
}

/// Of the rules for devices, those that name none: the numbers are the host's, but a privileged container is one in the
/// guest, too.
fn keep_rules_without_numbers(resources: &mut LinuxResources) {
    let rules = resources.devices_mut().take().map(|mut rules| {
        rules.retain(names_no_device);
        rules
    });
    resources.set_devices(rules.filter(|rules| !rules.is_empty()));
}

/// Puts a PID namespace of the guest, at `path`, into an amended spec.
pub fn join_pid_namespace(spec: &mut Spec, path: PathBuf) {
    let linux = spec.linux_mut().as_mut();
    let namespaces = linux.and_then(|linux| linux.namespaces_mut().as_mut());
    let mut namespaces = namespaces.into_iter().flatten();
    if let Some(of_pids) = namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::Pid) {
        of_pids.set_path(Some(path));
    }
}

/// The namespaces that a container shares with the host by leaving them out: what it would see there is not in its VM.
fn host_namespaces(linux: &Linux) -> impl Iterator<Item = String> {
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let kinds = [
        (LinuxNamespaceType::Pid, "pid", "hostPID", "processes"),
        (LinuxNamespaceType::Ipc, "ipc", "hostIPC", "shared memory"),
    ];
    let left_out = kinds
        .into_iter()
        .filter(|(kind, ..)| !namespaces.iter().any(|namespace| namespace.typ() == *kind));
    left_out.map(|(_, kind, asked, what)| {
        format!("linux.namespaces: no {kind} namespace ({asked}): the host's {what} cannot be had in a virtual machine")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: &str = r#"{
        "ociVersion": "1.0.2",
        "process": {"cwd": "/", "args": ["sh"], "user": {"uid": 0, "gid": 0}, "apparmorProfile": "p", "selinuxLabel": "l",
            "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "inheritable": [], "permitted": [],
                "ambient": []}},
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [{"destination": "/x", "type": "bind", "source": "/host", "options": ["rbind"]}],
        "hooks": {"prestart": [{"path": "/usr/bin/hook-a"}], "poststop": [{"path": "/usr/bin/hook-b"}],
            "startContainer": [{"path": "/bin/hook-c"}]},
        "linux": {
            "cgroupsPath": "system.slice:cri:c1", "mountLabel": "m", "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
            "namespaces": [{"type": "network", "path": "/run/netns/x"}, {"type": "pid"},
                {"type": "ipc", "path": "/proc/1/ns/ipc"}],
            "devices": [{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}],
            "maskedPaths": ["/proc/kcore"],
            "resources": {"devices": [{"allow": false, "access": "rwm"},
                    {"allow": true, "type": "b", "major": 8, "minor": 0, "access": "rw"}], "memory": {"limit": 1048576},
                "cpu": {"shares": 512, "cpus": "0-1", "mems": "0"}, "pids": {"limit": 10}, "blockIO": {"weight": 0},
                "hugepageLimits": [{"pageSize": "2MB", "limit": 0}]}
        }
    }"#;

    fn amended(disable_seccomp: bool) -> (Spec, Vec<String>) {
        let mut spec: Spec = serde_json::from_str(SPEC).unwrap();
        let guest = GuestSpec {
            container: "c1".into(),
            rootfs: "/guest/rootfs".into(),
            mounts: Vec::new(),
            bundle: "/bundle".into(),
            terminal: true,
            disable_seccomp,
        };
        let warnings = amend(&mut spec, guest, &ContainerKind::Single).unwrap();
        (spec, warnings)
    }

    #[test]
    fn spec_when_amended_loses_what_is_of_the_host() {
        let (spec, _) = amended(true);

        let linux = spec.linux().as_ref().unwrap();
        let namespaces: Vec<_> = linux
            .namespaces()
            .iter()
            .flatten()
            .map(|n| (n.typ(), n.path().clone()))
            .collect();
        assert_eq!(
            namespaces,
            [(LinuxNamespaceType::Pid, None), (LinuxNamespaceType::Ipc, None)]
        );
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/kata/c1")));
        assert!(linux.seccomp().is_none() && linux.devices().is_none() && linux.mount_label().is_none());
        let resources = linux.resources().as_ref().unwrap();
        let rules = resources.devices().as_ref().unwrap();
        assert!(rules.len() == 1 && !rules[0].allow(), "{rules:?}");
        assert!(resources.hugepage_limits().is_none());
        let cpu = resources.cpu().as_ref().unwrap();
        assert!(cpu.cpus().is_none() && cpu.mems().is_none());
        let process = spec.process().as_ref().unwrap();
        assert!(process.apparmor_profile().is_none() && process.selinux_label().is_none());
    }

    #[test]
    fn spec_when_amended_keeps_what_the_guest_needs() {
        let (spec, _) = amended(false);

        let root = spec.root().as_ref().unwrap();
        assert_eq!(
            (root.path().to_str(), root.readonly()),
            (Some("/guest/rootfs"), Some(true))
        );
        let process = spec.process().as_ref().unwrap();
        assert!(process.capabilities().as_ref().unwrap().bounding().is_some());
        assert_eq!(process.terminal(), Some(true));
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.seccomp().is_some() && linux.masked_paths().is_some());
        let resources = linux.resources().as_ref().unwrap();
        assert_eq!(resources.memory().unwrap().limit(), Some(1_048_576));
        assert_eq!(resources.cpu().as_ref().unwrap().shares(), Some(512));
        assert!(resources.pids().is_some());
    }

    #[test]
    fn pid_namespace_when_it_is_another_containers_is_in_the_spec() {
        let (mut spec, _) = amended(true);

        join_pid_namespace(&mut spec, "/guest/c2".into());

        let namespaces = spec.linux().as_ref().unwrap().namespaces().as_ref().unwrap();
        let paths: Vec<_> = namespaces
            .iter()
            .map(|namespace| namespace.path().as_deref())
            .collect();
        assert_eq!(paths, [Some(Path::new("/guest/c2")), None]);
    }

    #[test]
    fn namespaces_of_the_host_when_asked_for_are_refused_by_name() {
        for (namespaces, expected) in [
            (r#"[{"type":"ipc"}]"#, "hostPID"),
            (r#"[{"type":"pid"}]"#, "hostIPC"),
        ] {
            let json = format!(r#"{{"ociVersion":"1","linux":{{"namespaces":{namespaces}}}}}"#);
            let error = check(&serde_json::from_str(&json).unwrap()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Unimplemented);
            assert!(
                error.message.contains(expected) && !error.message.contains(';'),
                "{error}"
            );
        }
    }

    #[test]
    fn hooks_when_amended_are_those_of_the_guest() {
        let (spec, warnings) = amended(true);

        let hooks = serde_json::to_value(spec.hooks()).unwrap();
        assert_eq!(
            hooks,
            serde_json::json!({"startContainer": [{"path": "/bin/hook-c"}]})
        );
        assert!(!warnings.join("\n").contains("hook"), "{warnings:?}");
    }

    #[test]
    fn devices_when_they_cannot_be_had_are_refused_by_name() {
        let device = r#""devices": [{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]"#;
        for (linux, expected) in [
            (device, "/dev/kvm"),
            (
                r#""resources": {"hugepageLimits": [{"pageSize": "2MB", "limit": 4}]}"#,
                "hugepageLimits",
            ),
            (r#""resources": {"blockIO": {"weight": 500}}"#, "blockIO"),
            (
                r#""resources": {"blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]}}"#,
                "blockIO",
            ),
            (r#""resources": {"rdma": {"mlx5": {"hcaHandles": 3}}}"#, "rdma"),
            (r#""resources": {"unified": {"memory.high": "1"}}"#, "memory.high"),
        ] {
            let spec: Spec =
                serde_json::from_str(&format!(r#"{{"ociVersion": "1.0.2", "linux": {{{linux}}}}}"#)).unwrap();
            let error = check(&spec).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Unimplemented);
            assert!(error.message.contains(expected), "{error}");
        }
    }

    #[test]
    fn privileged_container_when_created_has_the_devices_of_its_guest() {
        let json = r#"{"ociVersion": "1.0.2", "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}],
            "devices": [{"path": "/dev/null", "type": "c", "major": 1, "minor": 3},
                {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
                {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}],
            "resources": {"devices": [{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]}}}"#;
        let mut spec: Spec = serde_json::from_str(json).unwrap();

        let warnings = amend(&mut spec, GuestSpec::default(), &ContainerKind::Single).unwrap();

        assert!(
            warnings[0].contains("2 devices of the host are left out"),
            "{warnings:?}"
        );
        let linux = spec.linux().as_ref().unwrap();
        assert!(linux.devices().is_none() && is_privileged(linux));
    }

    #[test]
    fn update_when_amended_is_as_a_new_container() {
        let spec: Spec = serde_json::from_str(SPEC).unwrap();
        let mut update = spec.linux().as_ref().unwrap().resources().clone().unwrap();
        let (created, _) = amended(true);

        amend_resources(&mut update).unwrap();

        assert_eq!(created.linux().as_ref().unwrap().resources(), &Some(update));
    }
}
