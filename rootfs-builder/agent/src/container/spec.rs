//! What the agent changes in a container's specification before libcontainer sees it.
//!
//! The specification was written for the host. In the guest the pod *is* the machine: it owns the network, shares
//! hostname and IPC between its containers through the sandbox's namespaces, and host paths of namespaces, cgroups
//! and security profiles mean nothing.

use std::fs;
use std::path::{Component, Path, PathBuf};

use nix::sys::stat::{SFlag, major, minor, stat};
use oci_spec::runtime::{
    Capabilities, Capability, LinuxDeviceType, LinuxNamespace, LinuxNamespaceType, Process, Spec,
};

/// Parent of all containers' cgroups.
pub const CGROUP_PARENT: &str = "/kata";
const DEFAULT_VERSION: &str = "1.1.0";
/// `pod_sandbox` or `pod_container`, set by the runtime.
const CONTAINER_TYPE: &str = "io.katacontainers.pkg.oci.container_type";

/// A specification that cannot be run in the guest.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// A part every container needs is missing.
    #[error("container specification without {0}")]
    Missing(&'static str),
    /// A sysctl name that leads out of /proc/sys.
    #[error("sysctl {0:?}: not a valid name")]
    SysctlName(String),
    /// The kernel refused a sysctl of the pod's network.
    #[error("sysctl {name}: {source}")]
    Sysctl {
        /// Which.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// A hook's program is not in the guest.
    #[error("createContainer hook {path}: {source}; its program must be in the guest's image")]
    Hook {
        /// The program.
        path: PathBuf,
        /// Why.
        source: nix::Error,
    },
    /// A device of the container has no node in the guest.
    #[error("device {path}: {source}")]
    Device {
        /// Its path in the guest.
        path: String,
        /// Why.
        source: nix::Error,
    },
}

/// Paths of the namespaces that the container shares with others of its pod.
pub struct Shared {
    /// IPC namespace.
    pub ipc: PathBuf,
    /// UTS namespace.
    pub uts: PathBuf,
    /// PID namespace, if it is not the container's own.
    pub pid: Option<PathBuf>,
}

/// Adapts `spec` for container `id` with its bundle in `bundle`.
///
/// # Errors
/// The specification lacks a part.
pub fn adapt(spec: &mut Spec, id: &str, bundle: &Path, shared: &Shared) -> Result<(), SpecError> {
    if spec.version().is_empty() {
        spec.set_version(DEFAULT_VERSION.to_owned());
    }
    adapt_root(spec, bundle)?;
    let privileged = super::device_rules(spec).allows_everything();
    adapt_process(spec, privileged)?;
    super::hooks::keep_guests(spec)?;
    // The sandbox's UTS namespace has its hostname already.
    spec.set_hostname(None);

    let linux = spec.linux_mut().as_mut().ok_or(SpecError::Missing("linux"))?;
    if linux.seccomp().is_some() {
        tracing::warn!(
            container = id,
            "seccomp profile not applied: the guest kernel is the boundary"
        );
    }
    linux
        .set_seccomp(None)
        .set_intel_rdt(None)
        .set_mount_label(None)
        .set_cgroups_path(Some(Path::new(CGROUP_PARENT).join(id)));
    let namespaces = linux.namespaces().clone().unwrap_or_default();
    linux.set_namespaces(Some(adapt_namespaces(namespaces, shared)));
    apply_network_sysctls(linux)
}

/// Whether the container (adapted) has a PID namespace to itself, which ends with its init and everything in it.
pub fn owns_pid_namespace(spec: &Spec) -> bool {
    namespace(spec, LinuxNamespaceType::Pid).is_some_and(|namespace| namespace.path().is_none())
}

/// The container's namespace of a kind, its own or one that it joins.
pub fn namespace(spec: &Spec, kind: LinuxNamespaceType) -> Option<&LinuxNamespace> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    namespaces.iter().find(|namespace| namespace.typ() == kind)
}

/// The container whose PID namespace the container (not adapted yet) asks for.
pub fn pid_namespace_of(spec: &Spec) -> Option<&str> {
    let of_pids = namespace(spec, LinuxNamespaceType::Pid)?;
    protocols::pid_namespace::container_of(of_pids.path().as_deref()?)
}

/// Whether the container stands for its pod, whose other containers may join its PID namespace.
pub fn is_sandbox(spec: &Spec) -> bool {
    let annotations = spec.annotations().as_ref();
    annotations
        .and_then(|annotations| annotations.get(CONTAINER_TYPE))
        .is_some_and(|kind| kind == "pod_sandbox")
}

/// Without device control a node made by hand would lead to the guest's own devices.
pub fn drop_mknod(process: &mut Process) {
    let Some(mut capabilities) = process.capabilities().clone() else {
        return;
    };
    let without = |set: &Option<Capabilities>| {
        set.as_ref().map(|set| {
            let rest = set.iter().filter(|capability| **capability != Capability::Mknod);
            rest.copied().collect::<Capabilities>()
        })
    };
    let sets = [
        without(capabilities.bounding()),
        without(capabilities.effective()),
        without(capabilities.inheritable()),
        without(capabilities.permitted()),
        without(capabilities.ambient()),
    ];
    let [bounding, effective, inheritable, permitted, ambient] = sets;
    capabilities
        .set_bounding(bounding)
        .set_effective(effective)
        .set_inheritable(inheritable)
        .set_permitted(permitted)
        .set_ambient(ambient);
    process.set_capabilities(Some(capabilities));
}

/// Gives the nodes of `devices` (path in the container, path in the guest) their numbers in this guest.
///
/// # Errors
/// A device is missing.
pub fn set_device_numbers(spec: &mut Spec, devices: &[(String, String)]) -> Result<(), SpecError> {
    let Some(nodes) = spec
        .linux_mut()
        .as_mut()
        .and_then(|linux| linux.devices_mut().as_mut())
    else {
        return Ok(());
    };
    for (container_path, vm_path) in devices {
        let status = stat(vm_path.as_str()).map_err(|source| SpecError::Device {
            path: vm_path.clone(),
            source,
        })?;
        let kind = if SFlag::from_bits_truncate(status.st_mode).contains(SFlag::S_IFBLK) {
            LinuxDeviceType::B
        } else {
            LinuxDeviceType::C
        };
        for node in nodes
            .iter_mut()
            .filter(|node| node.path() == Path::new(container_path))
        {
            node.set_typ(kind)
                .set_major(i64::try_from(major(status.st_rdev)).unwrap_or(i64::MAX))
                .set_minor(i64::try_from(minor(status.st_rdev)).unwrap_or(i64::MAX));
        }
    }
    Ok(())
}

fn adapt_root(spec: &mut Spec, bundle: &Path) -> Result<(), SpecError> {
    let root = spec.root_mut().as_mut().ok_or(SpecError::Missing("root"))?;
    // An absolute path replaces the bundle's. It is the helper that looks at it: it may be on a share that hangs.
    root.set_path(bundle.join(root.path()));
    Ok(())
}

fn adapt_process(spec: &mut Spec, privileged: bool) -> Result<(), SpecError> {
    let process = spec.process_mut().as_mut().ok_or(SpecError::Missing("process"))?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(SpecError::Missing("process.args"));
    }
    // Profiles of the host's security modules; the guest has none loaded.
    process.set_apparmor_profile(None).set_selinux_label(None);
    if process.cwd().as_os_str().is_empty() {
        process.set_cwd(PathBuf::from("/"));
    }
    if !privileged && !super::devices::supported() {
        drop_mknod(process);
    }
    // Absent means "as the runtime": containers must not inherit what protects PID 1.
    let adjustment = process.oom_score_adj().unwrap_or(0);
    process.set_oom_score_adj(Some(adjustment));
    Ok(())
}

fn adapt_namespaces(namespaces: Vec<LinuxNamespace>, shared: &Shared) -> Vec<LinuxNamespace> {
    namespaces
        .into_iter()
        .filter_map(|mut namespace| {
            let path = match namespace.typ() {
                LinuxNamespaceType::Network => return None,
                LinuxNamespaceType::Ipc => Some(shared.ipc.clone()),
                LinuxNamespaceType::Uts => Some(shared.uts.clone()),
                LinuxNamespaceType::Pid => shared.pid.clone(),
                _ => None,
            };
            namespace.set_path(path);
            Some(namespace)
        })
        .collect()
}

/// The pod's network is the guest's own, so its sysctls are set here; libcontainer would refuse them.
fn apply_network_sysctls(linux: &mut oci_spec::runtime::Linux) -> Result<(), SpecError> {
    let Some(sysctls) = linux.sysctl().clone() else {
        return Ok(());
    };
    let (network, rest): (Vec<_>, Vec<_>) = sysctls
        .into_iter()
        .partition(|(name, _)| name.starts_with("net.") || name.starts_with("net/"));
    for (name, value) in network {
        let path = sysctl_path(&name)?;
        fs::write(path, value).map_err(|source| SpecError::Sysctl { name, source })?;
    }
    linux.set_sysctl(
        Some(rest.into_iter().collect()).filter(|map: &std::collections::HashMap<_, _>| !map.is_empty()),
    );
    Ok(())
}

/// The file of a sysctl. As sysctl(8) reads names: separated by dots, or by slashes if there is one (interface names contain
/// dots).
///
/// # Errors
/// The name leads out of /proc/sys.
pub fn sysctl_path(name: &str) -> Result<PathBuf, SpecError> {
    let relative = if name.contains('/') {
        PathBuf::from(name)
    } else {
        PathBuf::from(name.replace('.', "/"))
    };
    if relative
        .components()
        .all(|part| matches!(part, Component::Normal(_)))
    {
        Ok(Path::new("/proc/sys").join(relative))
    } else {
        Err(SpecError::SysctlName(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxSeccomp;

    use super::*;

    fn shared() -> Shared {
        Shared {
            ipc: "/proc/1/fd/8".into(),
            uts: "/proc/1/fd/9".into(),
            pid: None,
        }
    }

    fn spec() -> Spec {
        let mut spec = Spec::default();
        spec.root_mut().as_mut().unwrap().set_path("/tmp".into());
        spec.linux_mut()
            .as_mut()
            .unwrap()
            .set_seccomp(Some(LinuxSeccomp::default()));
        spec
    }

    #[test]
    fn namespaces_when_adapted_are_the_pods() {
        let mut spec = spec();
        let namespaces = spec
            .linux_mut()
            .as_mut()
            .unwrap()
            .namespaces_mut()
            .as_mut()
            .unwrap();
        for namespace in namespaces.iter_mut() {
            namespace.set_path(Some("/proc/4711/ns/x".into()));
        }

        adapt(&mut spec, "one", Path::new("/run/bundle"), &shared()).unwrap();

        let linux = spec.linux().as_ref().unwrap();
        let path_of = |kind| {
            let namespaces = linux.namespaces().as_ref().unwrap();
            namespaces
                .iter()
                .find(|namespace| namespace.typ() == kind)
                .map(|namespace| namespace.path().clone())
        };
        assert_eq!(path_of(LinuxNamespaceType::Network), None);
        assert_eq!(
            path_of(LinuxNamespaceType::Uts),
            Some(Some("/proc/1/fd/9".into()))
        );
        assert_eq!(
            path_of(LinuxNamespaceType::Ipc),
            Some(Some("/proc/1/fd/8".into()))
        );
        assert_eq!(path_of(LinuxNamespaceType::Pid), Some(None));
        assert_eq!(path_of(LinuxNamespaceType::Cgroup), Some(None));
        assert!(linux.seccomp().is_none());
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/kata/one")));
    }

    #[test]
    fn pid_namespace_when_shared_or_left_out_is_not_the_containers_own() {
        let mut spec = spec();
        adapt(&mut spec, "one", Path::new("/run/bundle"), &shared()).unwrap();
        assert!(owns_pid_namespace(&spec));

        let mut in_pod = Shared {
            pid: Some("/proc/1/fd/10".into()),
            ..shared()
        };
        adapt(&mut spec, "one", Path::new("/run/bundle"), &in_pod).unwrap();
        assert!(!owns_pid_namespace(&spec));

        in_pod.pid = None;
        let linux = spec.linux_mut().as_mut().unwrap();
        linux
            .namespaces_mut()
            .as_mut()
            .unwrap()
            .retain(|namespace| namespace.typ() != LinuxNamespaceType::Pid);
        adapt(&mut spec, "one", Path::new("/run/bundle"), &in_pod).unwrap();
        assert!(!owns_pid_namespace(&spec));
    }

    #[test]
    fn sysctl_name_when_it_leads_out_is_refused() {
        assert_eq!(
            sysctl_path("net.ipv4.ip_forward").unwrap(),
            Path::new("/proc/sys/net/ipv4/ip_forward")
        );
        assert_eq!(
            sysctl_path("net/ipv4/conf/e.1/x").unwrap(),
            Path::new("/proc/sys/net/ipv4/conf/e.1/x")
        );
        assert!(sysctl_path("net/../../self/oom_score_adj").is_err());
        assert!(sysctl_path("/net").is_err());
    }
}
