//! Where things of a sandbox live on the host. The names are Kata's: tools look for them.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};

/// virtio-fs tag of the share.
pub const SHARE_TAG: &str = "kataShared";
/// Where the guest mounts the share.
pub const GUEST_SHARE: &str = "/run/kata-containers/shared/containers";
/// Where the guest keeps what all containers of the sandbox share, e.g. `shm`.
pub const GUEST_SANDBOX: &str = "/run/kata-containers/sandbox";

/// Host paths of one sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxPaths {
    root: PathBuf,
    id: String,
}

impl SandboxPaths {
    /// Paths of sandbox `id`, below `/run`.
    ///
    /// # Errors
    /// `InvalidArgument` for an id that is no file name.
    pub fn new(id: &str) -> Result<Self> {
        Self::below(Path::new("/run"), id)
    }

    /// Paths of sandbox `id`, below `root` instead of `/run`.
    ///
    /// # Errors
    /// `InvalidArgument` for an id that is no file name.
    pub fn below(root: &Path, id: &str) -> Result<Self> {
        check_id("sandbox", id)?;
        Ok(Self {
            root: root.to_owned(),
            id: id.to_owned(),
        })
    }

    /// State folder: `/run/kata/<id>`.
    pub fn state(&self) -> PathBuf {
        self.root.join("kata").join(&self.id)
    }

    /// Undo list.
    pub fn journal(&self) -> PathBuf {
        self.state().join("journal")
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
        self.root.join("kata-containers/shared/sandboxes").join(&self.id)
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
