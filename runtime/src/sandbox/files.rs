//! What a pod without a pause container provides to its containers: /etc/hosts, /etc/hostname, /etc/resolv.conf and
//! /dev/shm. containerd makes them for a pause container and leaves them out where the runtime is the sandbox.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};

use super::SandboxConfig;
use crate::error::{Error, ErrorKind, Result};

/// For a host that has no /etc/hosts.
const LOCALHOST: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";
const SHM: &str = "/dev/shm";

/// Files of a pod on the host, shared with every container that brings none of its own.
#[derive(Debug)]
pub(super) struct PodFiles {
    folder: PathBuf,
    names: Vec<&'static str>,
}

impl PodFiles {
    /// Writes the files of `pod` into `folder`, which goes with the sandbox. Blocks.
    ///
    /// # Errors
    /// Naming the file that cannot be read or written.
    pub(super) fn write(folder: PathBuf, pod: &SandboxConfig) -> Result<Self> {
        fs::create_dir_all(&folder).map_err(|error| failed(&folder, &error))?;
        let mut files = vec![("hosts", read_or(Path::new("/etc/hosts"), LOCALHOST)?)];
        let resolver = if pod.dns.is_empty() {
            read_or(Path::new("/etc/resolv.conf"), "")?
        } else {
            pod.dns.iter().map(|line| format!("{line}\n")).collect()
        };
        files.push(("resolv.conf", resolver));
        if !pod.hostname.is_empty() {
            files.push(("hostname", format!("{}\n", pod.hostname)));
        }
        for (name, text) in &files {
            let path = folder.join(name);
            fs::write(&path, text).map_err(|error| failed(&path, &error))?;
        }
        let names = files.into_iter().map(|(name, _)| name).collect();
        Ok(Self { folder, names })
    }

    /// Adds to `spec` what it lacks.
    pub(super) fn mount_into(&self, spec: &mut Spec, sandbox_id: &str) {
        let mounts = spec.mounts_mut().get_or_insert_default();
        for name in &self.names {
            let destination = Path::new("/etc").join(name);
            if !mounts.iter().any(|mount| mount.destination() == &destination) {
                mounts.push(bind(&destination, self.folder.join(name)));
            }
        }
        // A memory of the container's own is the default of a spec; that of the pod comes as a bind mount.
        let is_default = |mount: &Mount| {
            mount.destination() == Path::new(SHM)
                && mount.typ().as_deref().is_some_and(|kind| kind == "tmpfs")
        };
        mounts.retain(|mount| !is_default(mount));
        if !mounts.iter().any(|mount| mount.destination() == Path::new(SHM)) {
            // Known by its name, as the folder that a CRI makes; there is none.
            mounts.push(bind(Path::new(SHM), Path::new("/").join(sandbox_id).join("shm")));
        }
    }
}

fn bind(destination: &Path, source: PathBuf) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_destination(destination.to_owned())
        .set_typ(Some("bind".into()))
        .set_source(Some(source))
        .set_options(Some(vec!["rbind".into(), "rprivate".into(), "rw".into()]));
    mount
}

fn read_or(path: &Path, default: &str) -> Result<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(default.to_owned()),
        read => read.map_err(|error| failed(path, &error)),
    }
}

fn failed(path: &Path, error: &io::Error) -> Error {
    Error::new(ErrorKind::Internal, format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(mounts: &str) -> Spec {
        serde_json::from_str(&format!(r#"{{"ociVersion":"1.0.2","mounts":{mounts}}}"#)).unwrap()
    }

    fn mounts(spec: &Spec) -> Vec<(String, String)> {
        let shown = |path: &Path| path.display().to_string();
        let mounts = spec.mounts().iter().flatten();
        mounts
            .map(|mount| {
                let source = mount.source().as_deref().map(shown).unwrap_or_default();
                (shown(mount.destination()), source)
            })
            .collect()
    }

    #[test]
    fn files_when_a_container_brings_none_are_the_pods() {
        let folder = tempfile::tempdir().unwrap();
        let pod = SandboxConfig {
            hostname: "web".into(),
            dns: vec!["nameserver 10.0.0.1".into(), "search a.b".into()],
            ..Default::default()
        };
        let files = PodFiles::write(folder.path().join("etc"), &pod).unwrap();
        let read = |name: &str| fs::read_to_string(folder.path().join("etc").join(name)).unwrap();
        assert_eq!(read("hostname"), "web\n");
        assert_eq!(read("resolv.conf"), "nameserver 10.0.0.1\nsearch a.b\n");
        assert!(read("hosts").contains("localhost"));

        let mut bare = spec(r#"[{"destination":"/dev/shm","type":"tmpfs","source":"shm"}]"#);
        files.mount_into(&mut bare, "s1");

        let own = |name: &str| folder.path().join("etc").join(name).display().to_string();
        let expected = [
            ("/etc/hosts", own("hosts")),
            ("/etc/resolv.conf", own("resolv.conf")),
            ("/etc/hostname", own("hostname")),
            ("/dev/shm", "/s1/shm".to_owned()),
        ];
        let expected = expected.map(|(destination, source)| (destination.to_owned(), source));
        assert_eq!(mounts(&bare), expected);
    }

    #[test]
    fn files_when_a_container_brings_its_own_stay_away() {
        let folder = tempfile::tempdir().unwrap();
        let files = PodFiles::write(folder.path().join("etc"), &SandboxConfig::default()).unwrap();
        let mut full = spec(
            r#"[{"destination":"/etc/hosts","type":"bind","source":"/k/hosts"},
                {"destination":"/etc/resolv.conf","type":"bind","source":"/k/resolv.conf"},
                {"destination":"/dev/shm","type":"bind","source":"/k/shm"}]"#,
        );
        let before = mounts(&full);

        files.mount_into(&mut full, "s1");

        assert_eq!(
            mounts(&full),
            before,
            "and a pod without a hostname has no file of it"
        );
    }

    #[test]
    fn resolver_when_the_pod_names_none_is_the_hosts() {
        let folder = tempfile::tempdir().unwrap();
        PodFiles::write(folder.path().join("etc"), &SandboxConfig::default()).unwrap();

        let of_host = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
        let of_pod = fs::read_to_string(folder.path().join("etc/resolv.conf")).unwrap();

        assert_eq!(of_pod, of_host);
    }
}
