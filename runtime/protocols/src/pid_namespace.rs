//! How a container's specification names the PID namespace of another container of its pod: by a path that is none.
//!
//! The wire has a flag for the pod's namespace (`sandbox_pidns`) and nothing for a container's (`kubectl debug --target`). A
//! path is what the specification has a place for, and an agent that does not know this one fails to open it instead of
//! giving the container a namespace of its own.

use std::path::{Path, PathBuf};

/// Where the guest keeps its containers' bundles.
const FOLDER: &str = "/run/kata-containers";
const FILE: &str = "ns/pid";

/// The name of the PID namespace of `container`.
pub fn path_of(container: &str) -> PathBuf {
    Path::new(FOLDER).join(container).join(FILE)
}

/// The container whose PID namespace `path` names.
pub fn container_of(path: &Path) -> Option<&str> {
    let rest = path.strip_prefix(FOLDER).ok()?.to_str()?;
    let container = rest.strip_suffix(FILE)?.strip_suffix('/')?;
    (!container.is_empty() && !container.contains('/')).then_some(container)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_of_a_namespace_when_read_is_its_containers() {
        assert_eq!(container_of(&path_of("c1")), Some("c1"));
        for other in [
            "/proc/4711/ns/pid",
            "/run/kata-containers/ns/pid",
            "/run/kata-containers/a/b/ns/pid",
            "/run/kata-containers/a/ns/net",
            "",
        ] {
            assert_eq!(container_of(Path::new(other)), None, "{other}");
        }
    }
}
