//! The pod's cgroup on the host: the whole shim, the VM included, runs in it (`sandbox_cgroup_only`).

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::host::cgroup;
use crate::host::journal::{Journal, Undo};

/// The host cgroups of a sandbox; the journal removes them.
#[derive(Debug, Clone)]
pub struct CgroupsResource {
    folders: Vec<PathBuf>,
}

impl CgroupsResource {
    /// The cgroup `cgroups_path` of an OCI spec, in every hierarchy of the host. Nothing is created yet.
    ///
    /// # Errors
    /// `InvalidArgument` for a path that leaves the hierarchy.
    pub fn new(cgroups_path: &Path) -> Result<Self> {
        let relative = relative(cgroups_path)?;
        let folders = cgroup::hierarchies()
            .into_iter()
            .map(|root| root.join(&relative))
            .collect();
        Ok(Self { folders })
    }

    /// Creates the cgroup and moves this process into it. A hierarchy that refuses is reported and skipped: the host's
    /// accounting is worth less than the container.
    ///
    /// # Errors
    /// When the journal cannot be written.
    pub fn setup_before_start_vm(&self, journal: &Journal) -> Result<()> {
        for folder in &self.folders {
            if folder.exists() {
                tracing::debug!(cgroup = %folder.display(), "joins an existing cgroup");
            } else {
                journal.record(&Undo::RemoveCgroup(folder.clone()))?;
            }
            if let Err(error) = cgroup::join(folder) {
                tracing::warn!(cgroup = %folder.display(), %error, "sandbox cgroup is not used");
            }
        }
        Ok(())
    }
}

/// cgroupsPath is a path, or `slice:prefix:name` for systemd.
fn relative(cgroups_path: &Path) -> Result<PathBuf> {
    let text = cgroups_path.to_string_lossy();
    let parts: Vec<&str> = text.split(':').collect();
    let path = match parts.as_slice() {
        [slice, prefix, name] => slice_path(slice).join(format!("{prefix}-{name}.scope")),
        _ => PathBuf::from(text.trim_start_matches('/')),
    };
    let normal = path
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_)));
    if !normal || path.as_os_str().is_empty() {
        let message = format!("linux.cgroupsPath {text:?} is not a path below the cgroup root");
        return Err(Error::new(ErrorKind::InvalidArgument, message));
    }
    Ok(path)
}

/// systemd nests `a-b.slice` in `a.slice`.
fn slice_path(slice: &str) -> PathBuf {
    let name = slice.strip_suffix(".slice").unwrap_or(slice);
    let mut path = PathBuf::new();
    let mut prefix = String::new();
    for part in name.split('-').filter(|part| !part.is_empty()) {
        if !prefix.is_empty() {
            prefix.push('-');
        }
        prefix.push_str(part);
        path.push(format!("{prefix}.slice"));
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_path_when_systemds_becomes_a_folder() {
        let path = |text: &str| relative(Path::new(text)).map(|path| path.display().to_string());
        assert_eq!(path("/default/c1").unwrap(), "default/c1");
        assert_eq!(
            path("kubepods-pod1.slice:cri-containerd:c1").unwrap(),
            "kubepods.slice/kubepods-pod1.slice/cri-containerd-c1.scope"
        );
        for bad in ["", "/", "../x", "/a/../../b"] {
            assert_eq!(path(bad).unwrap_err().kind, ErrorKind::InvalidArgument, "{bad}");
        }
    }
}
