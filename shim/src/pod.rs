//! The `options` of CreateSandbox: the pod as containerd's CRI plugin describes it.

use protobuf::Message;
use protobuf::well_known_types::any::Any;
use runtime::error::{Error, ErrorKind, Result};
use runtime::types::PodConfig;

include!(concat!(env!("OUT_DIR"), "/wire_cri.rs"));

use cri::{LinuxPodSandboxConfig, NamespaceMode, PodSandboxConfig};

/// Message name; some containerd releases put a host in front of it.
const POD: &str = "runtime.v1.PodSandboxConfig";

/// Prefix of the annotations with which containerd names the pod to a pause container.
const ANNOTATION: &str = "io.kubernetes.cri.sandbox-";

/// Reads the pod; `None` when the options are not a CRI's.
///
/// # Errors
/// `InvalidArgument` when the value does not decode.
pub fn decode(any: Option<&Any>) -> Result<Option<PodConfig>> {
    let Some(any) = any.filter(|any| any.type_url.ends_with(POD)) else {
        return Ok(None);
    };
    let pod = PodSandboxConfig::parse_from_bytes(&any.value).map_err(|error| {
        let message = format!("options {}: {error}", any.type_url);
        Error::new(ErrorKind::InvalidArgument, message)
    })?;
    Ok(Some(pod_config(pod)))
}

fn pod_config(pod: PodSandboxConfig) -> PodConfig {
    let linux = pod.linux.unwrap_or_default();
    let host_namespaces = host_namespaces(&linux);
    let resources = linux.resources.unwrap_or_default();
    let mut annotations = pod.annotations;
    let metadata = pod.metadata.unwrap_or_default();
    for (name, value) in [
        ("name", metadata.name),
        ("namespace", metadata.namespace),
        ("uid", metadata.uid),
    ] {
        if !value.is_empty() {
            annotations.insert(format!("{ANNOTATION}{name}"), value);
        }
    }
    let dns = pod.dns_config.unwrap_or_default();
    let servers = dns.servers.iter().map(|server| format!("nameserver {server}"));
    let list =
        |word: &str, values: &[String]| (!values.is_empty()).then(|| format!("{word} {}", values.join(" ")));
    let rest = [list("search", &dns.searches), list("options", &dns.options)];
    PodConfig {
        hostname: pod.hostname,
        dns: servers.chain(rest.into_iter().flatten()).collect(),
        cgroup_parent: linux.cgroup_parent.into(),
        annotations,
        sysctls: linux.sysctls,
        host_namespaces,
        cpu_quota: resources.cpu_quota,
        cpu_period: u64::try_from(resources.cpu_period).unwrap_or_default(),
        memory: resources.memory_limit_in_bytes,
    }
}

/// The namespaces of the host's that the pod asks for, and those that a virtual machine has no use for.
fn host_namespaces(linux: &LinuxPodSandboxConfig) -> Vec<&'static str> {
    let options = linux
        .security_context
        .namespace_options
        .clone()
        .unwrap_or_default();
    let modes = [
        ("network (hostNetwork)", options.network),
        ("pid (hostPID)", options.pid),
        ("ipc (hostIPC)", options.ipc),
    ];
    let of_host = modes
        .into_iter()
        .filter(|(_, mode)| mode.enum_value() == Ok(NamespaceMode::NODE));
    of_host.map(|(kind, _)| kind).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pod as containerd sends it, a field on each line, with fields that this crate has no name for: log folder, ports,
    /// labels, overhead, shares.
    const GOLDEN: &[u8] = b"\
        \x0a\x11\x0a\x03web\x12\x02u1\x1a\x04apps \x01\
        \x12\x04host\
        \x1a\x0f/var/log/pods/x\
        \x22%\x0a\x0810.0.0.1\x0a\x0810.0.0.2\x12\x03a.b\x12\x01c\x1a\x07ndots:5\
        *\x05\x10P\x18\x90?\
        2\x0a\x0a\x03app\x12\x03web\
        :\x18\x0a\x13io.katacontainers.x\x12\x01y\
        BS\
        \x0a\x0e/kubepods/pod1\
        \x12\x11\x0a\x07\x10\x02\x18\x02\x22\x01t \x010\x00J\x02\x08\x00\
        \x1a\x15\x0a\x0dkernel.shmmax\x12\x041024\
        \x22\x02\x08\x01\
        *\x13\x08\xa0\x8d\x06\x10\xf0\x93\x09\x18\x80\x08 \x80\x80\x80\x80\x04(d";

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any {
            type_url: type_url.to_owned(),
            value: value.to_vec(),
            ..Default::default()
        }
    }

    #[test]
    fn pod_when_containerd_sends_it_is_read() {
        let pod = decode(Some(&any(POD, GOLDEN))).unwrap().unwrap();

        assert_eq!(pod.hostname, "host");
        let dns = [
            "nameserver 10.0.0.1",
            "nameserver 10.0.0.2",
            "search a.b c",
            "options ndots:5",
        ];
        assert_eq!(pod.dns, dns);
        assert_eq!(pod.cgroup_parent.to_str(), Some("/kubepods/pod1"));
        assert_eq!(pod.sysctls.get("kernel.shmmax").map(String::as_str), Some("1024"));
        assert_eq!(pod.host_namespaces, ["pid (hostPID)", "ipc (hostIPC)"]);
        assert_eq!(
            (pod.cpu_quota, pod.cpu_period, pod.memory),
            (150_000, 100_000, 1 << 30)
        );
        let annotation = |name: &str| pod.annotations.get(name).map(String::as_str);
        assert_eq!(annotation("io.katacontainers.x"), Some("y"));
        assert_eq!(annotation("io.kubernetes.cri.sandbox-name"), Some("web"));
        assert_eq!(annotation("io.kubernetes.cri.sandbox-namespace"), Some("apps"));
        assert_eq!(annotation("io.kubernetes.cri.sandbox-uid"), Some("u1"));
    }

    #[test]
    fn pod_when_it_says_nothing_is_empty() {
        assert_eq!(decode(Some(&any(POD, b""))).unwrap(), Some(PodConfig::default()));
    }

    #[test]
    fn options_when_not_a_cris_are_no_pod() {
        assert_eq!(decode(None).unwrap(), None);
        assert_eq!(
            decode(Some(&any("runtimeoptions.v1.Options", GOLDEN))).unwrap(),
            None
        );
    }

    #[test]
    fn pod_when_garbage_is_an_invalid_argument() {
        let error = decode(Some(&any(POD, b"\x0a\xff"))).unwrap_err();
        assert_eq!(error.kind, ErrorKind::InvalidArgument);
        assert!(error.message.contains(POD), "{error}");
    }
}
