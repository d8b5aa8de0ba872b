//! A busybox image in OCI layout, built from the host's static busybox: no registry, same bytes every time.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::command;

mod elf;
pub mod mapped;
mod pause;

/// Busybox as root in `/`.
pub const BUSYBOX: &str = "docker.io/e2e/busybox:latest";
/// The same files with a user, a working directory and a variable set in the image's configuration.
pub const TESTER: &str = "docker.io/e2e/tester:latest";
/// A pod's first container: one program that waits and reaps.
pub const PAUSE: &str = "docker.io/e2e/pause:latest";
/// `UID:GID` of the normal user, `tester` in the image's `/etc/passwd`.
pub const TESTER_ID: &str = "1000:1001";

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\ntester:x:1000:1001:tester:/home/tester:/bin/sh\n";
const GROUP: &str = "root:x:0:\nstaff:x:50:tester\ntesters:x:1001:\n";
const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

/// Why the image could not be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// None of the candidates exists.
    #[error("no busybox at {0:?}; install busybox-static")]
    NoBusybox(Vec<PathBuf>),
    /// `busybox --list` failed.
    #[error("cannot list the applets: {0}")]
    Applets(#[from] command::Error),
    /// Reading busybox or writing the archive failed.
    #[error("image file {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Composing an archive in memory failed.
    #[error("tar archive: {0}")]
    Archive(#[from] std::io::Error),
}

/// Writes the images as one OCI archive, ready for `ctr images import`.
///
/// # Errors
/// When there is no busybox or the archive cannot be written.
pub fn write_archive(candidates: &[PathBuf], path: &Path) -> Result<(), Error> {
    let busybox = candidates
        .iter()
        .find(|p| p.exists())
        .ok_or_else(|| Error::NoBusybox(candidates.to_vec()))?;
    let program = std::fs::read(busybox).map_err(|source| Error::File {
        path: busybox.clone(),
        source,
    })?;
    let list = command::run(Command::new(busybox).arg("--list"), Duration::from_secs(60))?.out();
    let archive = archive(&layer(&program, &list)?, &pause::layer()?)?;
    std::fs::write(path, archive).map_err(|source| Error::File {
        path: path.to_owned(),
        source,
    })
}

/// Unpacks the image's files into `root`, for bundles that do not come from a snapshotter.
///
/// # Errors
/// When there is no busybox or a file cannot be written.
pub fn unpack(candidates: &[PathBuf], root: &Path) -> Result<(), Error> {
    let busybox = candidates
        .iter()
        .find(|p| p.exists())
        .ok_or_else(|| Error::NoBusybox(candidates.to_vec()))?;
    let program = std::fs::read(busybox).map_err(|source| Error::File {
        path: busybox.clone(),
        source,
    })?;
    let list = command::run(Command::new(busybox).arg("--list"), Duration::from_secs(60))?.out();
    let layer = layer(&program, &list)?;
    let mut archive = tar::Archive::new(layer.as_slice());
    archive.set_preserve_ownerships(true);
    archive.unpack(root).map_err(|source| Error::File {
        path: root.to_owned(),
        source,
    })
}

/// The header of an entry that is the same every time.
fn header(kind: tar::EntryType, mode: u32, size: usize, owner: (u64, u64)) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size as u64);
    header.set_uid(owner.0);
    header.set_gid(owner.1);
    header.set_mtime(0);
    header
}

fn layer(busybox: &[u8], applets: &str) -> std::io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    let root = (0, 0);
    let folders = [
        "bin", "dev", "etc", "home", "mnt", "proc", "root", "run", "sys", "usr", "usr/bin", "var",
    ];
    for (path, mode, owner) in folders
        .into_iter()
        .map(|path| (path, 0o755, root))
        .chain([("tmp", 0o1777, root), ("home/tester", 0o755, (1000, 1001))])
    {
        tar.append_data(
            &mut header(tar::EntryType::Directory, mode, 0, owner),
            path,
            std::io::empty(),
        )?;
    }
    for (path, mode, bytes) in [
        ("bin/busybox", 0o755, busybox),
        ("etc/passwd", 0o644, PASSWD.as_bytes()),
        ("etc/group", 0o644, GROUP.as_bytes()),
        ("etc/hostname", 0o644, b"image\n".as_slice()),
        ("etc/hosts", 0o644, b"127.0.0.1 localhost\n".as_slice()),
    ] {
        tar.append_data(
            &mut header(tar::EntryType::Regular, mode, bytes.len(), root),
            path,
            bytes,
        )?;
    }
    for applet in applets.lines().filter(|name| *name != "busybox") {
        let mut link = header(tar::EntryType::Symlink, 0o777, 0, root);
        tar.append_link(&mut link, format!("bin/{applet}"), "busybox")?;
    }
    tar.into_inner()
}

/// Blobs by digest, in the order of their digests.
#[derive(Default)]
struct Blobs(BTreeMap<String, Vec<u8>>);

impl Blobs {
    fn add(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = Sha256::digest(&bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>();
        let descriptor =
            json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": bytes.len()});
        self.0.insert(digest, bytes);
        descriptor
    }
}

fn archive(layer: &[u8], pause: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut blobs = Blobs::default();
    let layer = blobs.add(LAYER_TYPE, layer.to_vec());
    let pause_layer = blobs.add(LAYER_TYPE, pause.to_vec());
    let path = "PATH=/bin:/usr/bin";
    let root = json!({"Env": [path, "E2E_IMAGE=busybox"], "Cmd": ["/bin/sh"]});
    let tester = json!({
        "Env": [path, "E2E_IMAGE=tester"], "Cmd": ["/bin/sh"], "User": "tester", "WorkingDir": "/home/tester"
    });
    let pause = json!({"Entrypoint": ["/pause"]});
    let mut manifests = Vec::new();
    for (name, config, layer) in [
        (BUSYBOX, root, &layer),
        (TESTER, tester, &layer),
        (PAUSE, pause, &pause_layer),
    ] {
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
        });
        let config = blobs.add(CONFIG_TYPE, config.to_string().into_bytes());
        let manifest =
            json!({"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config, "layers": [layer]});
        let mut manifest = blobs.add(MANIFEST_TYPE, manifest.to_string().into_bytes());
        manifest["annotations"] = json!({"io.containerd.image.name": name});
        manifest["platform"] = json!({"architecture": "amd64", "os": "linux"});
        manifests.push(manifest);
    }
    let index = json!({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": manifests}).to_string();
    let mut tar = tar::Builder::new(Vec::new());
    let mut append = |path: &str, bytes: &[u8]| {
        let mut header = header(tar::EntryType::Regular, 0o644, bytes.len(), (0, 0));
        tar.append_data(&mut header, path, bytes)
    };
    append("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    append("index.json", index.as_bytes())?;
    for (digest, bytes) in &blobs.0 {
        append(&format!("blobs/sha256/{digest}"), bytes)?;
    }
    let mut bytes = tar.into_inner()?;
    bytes.flush()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_when_built_twice_is_identical() {
        let build = || archive(&layer(b"program", "sh\necho\nbusybox\n").unwrap(), b"pause").unwrap();
        assert!(build() == build());
    }

    #[test]
    fn layer_when_listed_holds_applets_as_links() {
        let layer = layer(b"program", "sh\nbusybox\n").unwrap();
        let mut archive = tar::Archive::new(layer.as_slice());
        let links = archive
            .entries()
            .unwrap()
            .map(Result::unwrap)
            .filter(|entry| entry.header().entry_type().is_symlink())
            .map(|entry| entry.path().unwrap().into_owned())
            .collect::<Vec<_>>();
        assert_eq!(links, [PathBuf::from("bin/sh")]);
    }
}
