//! Whose processes a container sees: its own, its pod's (`shareProcessNamespace`), or those of another container of the pod
//! (`kubectl debug --target`).
//!
//! A CRI says so by a path, `/proc/PID/ns/pid`, with a pid that it was told by this shim. The pid of each container is its own
//! ([`HostPid`](super::HostPid)), so the path can be read backwards.

use std::path::Path;

use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::VirtContainerManager;
use crate::error::{Error, ErrorKind, Result};
use crate::sandbox::namespace;

/// The PID namespace of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum PidNamespace {
    /// Nobody else's.
    Own,
    /// That of the pod.
    Pods,
    /// That of another container.
    Of(String),
}

impl VirtContainerManager {
    /// The PID namespace that `spec` asks for.
    ///
    /// # Errors
    /// `InvalidArgument` for one that is not of this pod.
    pub(super) fn pid_namespace(&self, spec: &Spec) -> Result<PidNamespace> {
        let Some(path) = path(spec) else {
            return Ok(PidNamespace::Own);
        };
        // The pid of the sandbox itself, where no container stands for it.
        let container = match pid(path) {
            Some(pid) if pid == std::process::id() => return Ok(PidNamespace::Pods),
            Some(pid) => self.container_at(pid),
            None => None,
        };
        match container {
            Some(container) if container.id == self.sandbox_id => Ok(PidNamespace::Pods),
            Some(container) => Ok(PidNamespace::Of(container.id.clone())),
            None => {
                let message = format!(
                    "linux.namespaces: pid namespace {} is not that of a container of sandbox {}",
                    path.display(),
                    self.sandbox_id
                );
                Err(Error::new(ErrorKind::InvalidArgument, message))
            }
        }
    }
}

/// Path of the PID namespace that `spec` wants to join.
fn path(spec: &Spec) -> Option<&Path> {
    let of_pids = namespace(spec, LinuxNamespaceType::Pid)?;
    let path = of_pids.path().as_deref();
    path.filter(|path| !path.as_os_str().is_empty())
}

/// The pid in `/proc/PID/ns/pid`.
fn pid(path: &Path) -> Option<u32> {
    let pid = path.to_str()?.strip_prefix("/proc/")?.strip_suffix("/ns/pid")?;
    pid.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_of_a_namespace_when_read_backwards_has_the_pid() {
        assert_eq!(pid(Path::new("/proc/4711/ns/pid")), Some(4711));
        for other in [
            "/proc/self/ns/pid",
            "/proc/4711/ns/net",
            "/run/netns/x",
            "/proc//ns/pid",
        ] {
            assert_eq!(pid(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn namespace_when_it_has_no_path_is_the_containers_own() {
        for namespace in [
            r#"{"type":"pid","path":""}"#,
            r#"{"type":"pid"}"#,
            r#"{"type":"network","path":"/proc/4711/ns/pid"}"#,
        ] {
            let json = format!(r#"{{"ociVersion":"1","linux":{{"namespaces":[{namespace}]}}}}"#);
            let spec = serde_json::from_str(&json).unwrap();
            assert_eq!(path(&spec), None, "{namespace}");
        }
    }
}
