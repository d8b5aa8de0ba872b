//! What a pod is to be, whoever asks for it: a container's OCI spec, or containerd's Sandbox API.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use crate::error::{Error, ErrorKind, Result};
use crate::host::netns::OWN;
use crate::resource::cpu_mem::InitialSizeManager;
use crate::resource::volume::{DEFAULT_SHM_SIZE, shm_size};
use crate::types::CreateSandboxRequest;

/// A pod, before it runs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SandboxConfig {
    /// Sandbox id.
    pub id: String,
    /// Host name of the guest.
    pub hostname: String,
    /// Lines of /etc/resolv.conf.
    pub dns: Vec<String>,
    /// Network namespace; `None` for one of its own.
    pub netns: Option<PathBuf>,
    /// Host cgroup, as `linux.cgroupsPath` of the runtime specification; `None` for the shim's own.
    pub cgroups_path: Option<PathBuf>,
    /// Annotations.
    pub annotations: HashMap<String, String>,
    /// Bytes of the pod's shared memory.
    pub shm_size: u64,
    /// Limits that size the VM.
    pub size: InitialSizeManager,
    /// Kernel parameters of the pod; those of a pod with a pause container come with that.
    pub sysctls: HashMap<String, String>,
    /// Whether /etc/hosts and the like are the sandbox's to provide; a CRI makes them for a pod with a pause container.
    pub provides_files: bool,
}

impl SandboxConfig {
    /// The pod of the container with `spec`: the pause container of a CRI, or a container that is a pod of its own.
    pub fn from_spec(id: &str, spec: &Spec) -> Self {
        let cgroups_path = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.cgroups_path().clone());
        Self {
            id: id.to_owned(),
            hostname: spec.hostname().clone().unwrap_or_default(),
            dns: dns(spec),
            netns: netns(spec),
            cgroups_path,
            annotations: spec.annotations().clone().unwrap_or_default(),
            shm_size: shm_size(spec, id),
            size: InitialSizeManager::new(spec),
            sysctls: HashMap::new(),
            provides_files: false,
        }
    }

    /// The pod that the Sandbox API asks for; it has no container that stands for it. `spec` is what the bundle has, for a
    /// client that is no CRI.
    ///
    /// # Errors
    /// `Unimplemented` naming the namespaces of the host's that the pod asks to share.
    pub fn from_request(request: CreateSandboxRequest, spec: Option<&Spec>) -> Result<Self> {
        let id = request.sandbox_id;
        let mut config = match (request.pod, spec) {
            (Some(pod), _) => {
                refuse_host_namespaces(&pod.host_namespaces)?;
                Self {
                    hostname: pod.hostname,
                    dns: pod.dns,
                    cgroups_path: pod_cgroup(&pod.cgroup_parent, &id),
                    annotations: pod.annotations,
                    shm_size: DEFAULT_SHM_SIZE,
                    size: InitialSizeManager::of_limits(pod.cpu_quota, pod.cpu_period, pod.memory),
                    sysctls: pod.sysctls,
                    ..Default::default()
                }
            }
            (None, Some(spec)) => Self {
                sysctls: spec
                    .linux()
                    .as_ref()
                    .and_then(|linux| linux.sysctl().clone())
                    .unwrap_or_default(),
                ..Self::from_spec(&id, spec)
            },
            (None, None) => Self {
                shm_size: DEFAULT_SHM_SIZE,
                ..Default::default()
            },
        };
        config.id = id;
        config.provides_files = true;
        config.annotations.extend(request.annotations);
        if !request.netns.as_os_str().is_empty() {
            config.netns = Some(request.netns);
        }
        Ok(config)
    }
}

/// Refuses what a virtual machine cannot give: being in a namespace of the host's.
///
/// # Errors
/// `Unimplemented` naming all of them.
fn refuse_host_namespaces(kinds: &[&str]) -> Result<()> {
    if kinds.is_empty() {
        return Ok(());
    }
    let message = format!(
        "the pod asks for the host's namespaces: {}; it runs in a virtual machine, which has its own",
        kinds.join(", ")
    );
    Err(Error::new(ErrorKind::Unimplemented, message))
}

/// The cgroup of a pod below its parent, named as containerd names those of pause containers.
fn pod_cgroup(parent: &Path, id: &str) -> Option<PathBuf> {
    let name = parent.file_name()?.to_str()?;
    if name.ends_with(".slice") {
        return Some(format!("{name}:cri-containerd:{id}").into());
    }
    Some(parent.join(id))
}

/// What Docker says where it has no network namespace yet: a process that never is one.
const DOCKERS_NETNS: &str = "/proc/0/ns/net";

/// The namespace of a kind that the spec has a container in, its own or one that it joins.
pub(crate) fn namespace(spec: &Spec, kind: LinuxNamespaceType) -> Option<&LinuxNamespace> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    namespaces.iter().find(|namespace| namespace.typ() == kind)
}

/// Where `namespace` is; `None` for one that is still to be made.
pub(crate) fn place_of(namespace: &LinuxNamespace) -> Option<&Path> {
    let path = namespace.path().as_deref()?;
    let nowhere = path.as_os_str().is_empty() || path == Path::new(DOCKERS_NETNS);
    (!nowhere).then_some(path)
}

/// Path of the network namespace the spec names.
fn netns(spec: &Spec) -> Option<PathBuf> {
    spec.linux().as_ref()?.namespaces().as_ref()?;
    match namespace(spec, LinuxNamespaceType::Network) {
        Some(network) => place_of(network).map(Into::into),
        // The runtime specification: in none of its own, a container is in the runtime's.
        None => Some(OWN.into()),
    }
}

/// Lines of the file that is mounted on /etc/resolv.conf.
fn dns(spec: &Spec) -> Vec<String> {
    let mount = spec
        .mounts()
        .iter()
        .flatten()
        .find(|mount| mount.destination() == Path::new("/etc/resolv.conf"));
    let Some(source) = mount.and_then(|mount| mount.source().as_ref()) else {
        return Vec::new();
    };
    match fs::read_to_string(source) {
        Ok(text) => text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(Into::into)
            .collect(),
        Err(error) => {
            tracing::warn!(path = %source.display(), %error, "DNS configuration");
            Vec::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigFile;
    use crate::types::PodConfig;

    fn sized(config: &SandboxConfig) -> (f64, u64) {
        let mut file = ConfigFile::default();
        file.config.hypervisor.dragonball.default_maxvcpus = 8;
        config.size.setup_config(&mut file);
        let hypervisor = file.config.hypervisor.dragonball;
        (hypervisor.default_vcpus, hypervisor.default_memory)
    }

    #[test]
    fn pod_when_asked_for_by_spec_or_request_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let resolv_conf = folder.path().join("resolv.conf");
        fs::write(&resolv_conf, "# comment\nnameserver 10.0.0.1\n\nsearch a.b\n").unwrap();
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "hostname": "web",
            "annotations": {"a": "b"},
            "mounts": [{"destination": "/etc/resolv.conf", "type": "bind", "source": resolv_conf}],
            "linux": {
                "cgroupsPath": "/kubepods/s",
                "namespaces": [{"type": "network", "path": "/run/netns/x"}],
                "resources": {"cpu": {"quota": 150_000, "period": 100_000}, "memory": {"limit": 1_u64 << 30}},
            },
        });
        let request = CreateSandboxRequest {
            sandbox_id: "s".into(),
            netns: "/run/netns/x".into(),
            annotations: HashMap::from([("a".into(), "b".into())]),
            pod: Some(PodConfig {
                hostname: "web".into(),
                dns: vec!["nameserver 10.0.0.1".into(), "search a.b".into()],
                cgroup_parent: "/kubepods".into(),
                cpu_quota: 150_000,
                cpu_period: 100_000,
                memory: 1 << 30,
                ..Default::default()
            }),
            ..Default::default()
        };

        let from_spec = SandboxConfig::from_spec("s", &serde_json::from_value(spec).unwrap());
        let from_request = SandboxConfig::from_request(request, None).unwrap();

        assert_eq!(sized(&from_request), (2.0, 1056));
        let expected = SandboxConfig {
            provides_files: true,
            ..from_spec
        };
        assert_eq!(from_request, expected);
    }

    #[test]
    fn netns_when_the_spec_has_none_or_leaves_it_open_is_told_apart() {
        let of = |namespaces: serde_json::Value| {
            let spec = serde_json::json!({"ociVersion": "1.0.2", "linux": {"namespaces": namespaces}});
            netns(&serde_json::from_value(spec).unwrap())
        };
        let path = |path: &str| serde_json::json!([{"type": "network", "path": path}]);

        assert_eq!(of(path("/run/netns/x")), Some("/run/netns/x".into()));
        assert_eq!(of(path("")), None);
        assert_eq!(of(path("/proc/0/ns/net")), None);
        assert_eq!(of(serde_json::json!([{"type": "network"}])), None);
        assert_eq!(of(serde_json::json!([{"type": "pid"}])), Some(OWN.into()));
    }

    #[test]
    fn pod_when_nothing_is_asked_for_has_the_default_size() {
        let spec: Spec = serde_json::from_str(r#"{"ociVersion":"1"}"#).unwrap();
        let request = CreateSandboxRequest {
            sandbox_id: "s".into(),
            ..Default::default()
        };

        let bare = SandboxConfig::from_request(request.clone(), None).unwrap();
        let with_spec = SandboxConfig::from_request(request, Some(&spec)).unwrap();

        assert_eq!(bare, with_spec);
        assert_eq!(
            (bare.netns.as_deref(), bare.cgroups_path.as_deref()),
            (None, None)
        );
        assert_eq!(sized(&bare), sized(&SandboxConfig::default()));
    }

    #[test]
    fn pod_when_it_wants_the_hosts_namespaces_is_refused_by_name() {
        let request = CreateSandboxRequest {
            sandbox_id: "s".into(),
            pod: Some(PodConfig {
                host_namespaces: vec!["pid", "ipc"],
                ..Default::default()
            }),
            ..Default::default()
        };

        let error = SandboxConfig::from_request(request, None).unwrap_err();

        assert_eq!(error.kind, ErrorKind::Unimplemented);
        assert!(error.message.contains("pid, ipc"), "{error}");
    }

    #[test]
    fn cgroup_when_systemds_is_named_as_containerd_does() {
        let of = |parent: &str| pod_cgroup(Path::new(parent), "s").map(|path| path.display().to_string());
        assert_eq!(
            of("/kubepods/besteffort/pod1").as_deref(),
            Some("/kubepods/besteffort/pod1/s")
        );
        assert_eq!(
            of("/kubepods.slice/kubepods-pod1.slice").as_deref(),
            Some("kubepods-pod1.slice:cri-containerd:s")
        );
        assert_eq!(of(""), None);
    }
}
