//! Where things of a sandbox live on the host. The names are Kata's: tools look for them.
//!
//! An id is unique within its containerd namespace only, so the folders of a sandbox carry both. In the namespace of
//! Kubernetes, the one that Kata's tools know, the folder is called as the id; elsewhere `<namespace>@<id>`. An id has no
//! `@`, so no two sandboxes meet.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Error, ErrorKind, Result};

/// virtio-fs tag of the share.
pub const SHARE_TAG: &str = "kataShared";
/// Where the guest mounts the share.
pub const GUEST_SHARE: &str = "/run/kata-containers/shared/containers";
/// Where the guest keeps what all containers of the sandbox share, e.g. `shm`.
pub const GUEST_SANDBOX: &str = "/run/kata-containers/sandbox";

/// containerd's namespace of Kubernetes' pods.
const KUBERNETES: &str = "k8s.io";
/// Longest name of a sandbox' folders: `/run/kata/<name>/root/kata.hvsock` must fit into a Unix socket's address (108
/// bytes with the final NUL). A pod's id has 64 characters.
const MAX_NAME: usize = 80;
/// How much of a longer name is kept for people; the hash after it makes it unique.
const SHORTENED: usize = 40;

/// Host paths of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxPaths {
    root: PathBuf,
    id: String,
    name: String,
}

impl SandboxPaths {
    /// Paths of the sandbox `id` of containerd's `namespace`, below `/run`.
    ///
    /// # Errors
    /// `InvalidArgument` for a namespace or an id that is no file name.
    pub fn new(namespace: &str, id: &str) -> Result<Self> {
        Self::below(Path::new("/run"), namespace, id)
    }

    /// As [`Self::new`], below `root` instead of `/run`.
    ///
    /// # Errors
    /// `InvalidArgument` for a namespace or an id that is no file name.
    pub fn below(root: &Path, namespace: &str, id: &str) -> Result<Self> {
        check_id("sandbox", id)?;
        check_id("containerd namespace of sandbox", namespace)?;
        let name = if namespace == KUBERNETES {
            id.to_owned()
        } else {
            format!("{namespace}@{id}")
        };
        Ok(Self {
            root: root.to_owned(),
            id: id.to_owned(),
            name: shortened(name),
        })
    }

    /// Id of the sandbox.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// State folder: `/run/kata/<name>`.
    pub fn state(&self) -> PathBuf {
        self.root.join("kata").join(&self.name)
    }

    /// Undo list.
    pub fn journal(&self) -> PathBuf {
        self.state().join("journal")
    }

    /// There once the sandbox' own container has been deleted, and others go on.
    pub fn orphaned(&self) -> PathBuf {
        self.state().join("orphaned")
    }

    /// Tail of the guest's console.
    pub fn console_log(&self) -> PathBuf {
        self.state().join("console.log")
    }

    /// Folder of the VM's sockets.
    pub fn jail(&self) -> PathBuf {
        self.state().join("root")
    }

    /// vsock for tools outside of this process.
    pub fn hvsock(&self) -> PathBuf {
        self.jail().join("kata.hvsock")
    }

    /// Folder of everything shared with the guest.
    pub fn sandbox_share(&self) -> PathBuf {
        self.root
            .join("kata-containers/shared/sandboxes")
            .join(&self.name)
    }

    /// Root of the virtio-fs share.
    pub fn share(&self) -> PathBuf {
        self.sandbox_share().join("shared")
    }

    /// Where `name` below the share's passthrough folder is on the host.
    pub fn passthrough(&self, name: &str) -> PathBuf {
        self.share().join("passthrough").join(name)
    }
}

/// A name of at most [`MAX_NAME`] bytes: a longer one becomes its beginning, `~` (which no name has) and a hash of it all.
fn shortened(name: String) -> String {
    if name.len() <= MAX_NAME {
        return name;
    }
    let hash = Sha256::digest(&name);
    let hash: String = hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    // Ids are ASCII: any place is a border between characters.
    format!("{}~{hash}", name.get(..SHORTENED).unwrap_or_default())
}

/// Where `name` below the share's passthrough folder is in the guest.
pub fn guest_passthrough(name: &str) -> String {
    format!("{GUEST_SHARE}/passthrough/{name}")
}

/// Ids become file names; containerd allows `[A-Za-z0-9._-]`, starting with a letter or digit.
///
/// # Errors
/// `InvalidArgument` naming the id.
pub fn check_id(what: &str, id: &str) -> Result<()> {
    let good = id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id.len() <= 255
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    if good {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::InvalidArgument,
        format!(
            "{what} id {id:?} must be 1 to 255 characters of [A-Za-z0-9._-], starting with a letter or digit"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_when_of_two_namespaces_are_apart() {
        let of = |namespace: &str, id: &str| SandboxPaths::new(namespace, id).unwrap();
        let pairs = [
            ("k8s.io", "a"),
            ("default", "a"),
            ("moby", "a"),
            ("default", "moby"),
            ("k8s.io", "default"),
        ];
        let all: Vec<_> = pairs.iter().map(|(namespace, id)| of(namespace, id)).collect();
        for (index, one) in all.iter().enumerate() {
            for other in &all[index + 1..] {
                assert_ne!(one.state(), other.state());
                assert_ne!(one.sandbox_share(), other.sandbox_share());
            }
        }
        assert_eq!(all[0].state(), Path::new("/run/kata/a"), "as Kata's tools expect");
        assert_eq!(all[1].state(), Path::new("/run/kata/default@a"));
    }

    #[test]
    fn paths_when_names_are_longest_fit_a_unix_socket() {
        let (namespace, id) = ("n".repeat(76), "i".repeat(255));
        let one = SandboxPaths::new(&namespace, &id).unwrap();
        let other = SandboxPaths::new(&namespace, &format!("{}j", &id[1..])).unwrap();

        assert_ne!(one, other);
        for paths in [one, other, SandboxPaths::new("k8s.io", &"f".repeat(80)).unwrap()] {
            assert!(
                paths.hvsock().as_os_str().len() < 108,
                "{}",
                paths.hvsock().display()
            );
        }
    }

    #[test]
    fn paths_when_a_name_leaves_the_folder_are_refused() {
        for (namespace, id) in [
            ("default", "../x"),
            ("..", "x"),
            ("a/b", "x"),
            ("", "x"),
            ("default", "a@b"),
        ] {
            let error = SandboxPaths::new(namespace, id).unwrap_err();
            assert_eq!(error.kind, ErrorKind::InvalidArgument, "{namespace} {id}");
        }
    }
}
