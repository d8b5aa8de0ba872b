//! The host's side of a share: directories come and go while the guest runs.

use std::sync::Arc;

use super::config::{SharedDir, check_share_name};
use super::device::{FsError, open_directory};
use super::mounts::MAX_MOUNTS;
use super::share::MountError;
use super::worker::Service;
use crate::devices::virtio::config::KnobError;

/// How a directory is taken out of a share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmount {
    /// Only if no file or directory of it is open in the guest. What the guest has merely cached is taken away from it.
    IfUnused,
    /// Also if files are open: the name goes at once, open files work until the guest closes them, and the host's
    /// directory stays in use until the guest has forgotten them. Until then the device cannot be saved.
    Lazy,
}

/// A directory cannot be mounted in, or taken out of, a share.
#[derive(Debug, thiserror::Error)]
pub enum FsMountError {
    /// The name cannot be one of a directory.
    #[error(transparent)]
    Name(#[from] KnobError),
    /// The directory cannot be opened.
    #[error(transparent)]
    Directory(#[from] FsError),
    /// The root of the share is a host directory.
    #[error(
        "share {id}: its root is a host directory: nothing can be mounted in it (configure shares instead)"
    )]
    NoNames {
        /// Device id.
        id: String,
    },
    /// The name is taken.
    #[error("share {id}: {name:?} is mounted already")]
    Exists {
        /// Device id.
        id: String,
        /// The name.
        name: String,
    },
    /// There is no such name.
    #[error("share {id}: {name:?} is not mounted")]
    Missing {
        /// Device id.
        id: String,
        /// The name.
        name: String,
    },
    /// All places are taken.
    #[error("share {id}: {MAX_MOUNTS} directories are mounted, which is the most")]
    TooMany {
        /// Device id.
        id: String,
    },
    /// The guest uses it.
    #[error(
        "share {id}: {name:?} is in use: {open} files of it are open in the guest (unmount it lazily, or close them)"
    )]
    Busy {
        /// Device id.
        id: String,
        /// The name.
        name: String,
        /// Open files and directories.
        open: usize,
    },
}

/// The host's side of a share. Clones refer to the same device; on one that is gone, calls have no effect on anybody.
#[derive(Debug, Clone)]
pub struct FsHandle {
    id: String,
    service: Arc<Service>,
}

impl FsHandle {
    pub(super) fn new(id: String, service: Arc<Service>) -> Self {
        Self { id, service }
    }

    /// Opens `dir` and makes it appear in the root as `name`, whether the guest runs or not.
    ///
    /// # Errors
    /// [`FsMountError`]; nothing has changed.
    pub fn mount(&self, name: &str, dir: &SharedDir) -> Result<(), FsMountError> {
        check_share_name(&self.id, name)?;
        let fd = open_directory(&dir.path).map_err(|source| FsError::Directory {
            id: self.id.clone(),
            path: dir.path.clone(),
            source,
        })?;
        let mounted = self
            .service
            .share
            .mount(name, dir.path.clone(), dir.read_only, fd);
        mounted.map_err(|error| self.mount_error(name, error))
    }

    /// Takes `name` out of the root. When this returns, and unless files stay open ([`Unmount::Lazy`]), the device holds
    /// nothing of the directory any more, except for requests that are just being served.
    ///
    /// # Errors
    /// [`FsMountError`], above all [`FsMountError::Busy`]; nothing has changed.
    pub fn unmount(&self, name: &str, how: Unmount) -> Result<(), FsMountError> {
        let unmounted = self.service.share.unmount(name, how == Unmount::Lazy);
        unmounted.map_err(|error| self.mount_error(name, error))
    }

    fn mount_error(&self, name: &str, error: MountError) -> FsMountError {
        let (id, name) = (self.id.clone(), name.to_owned());
        match error {
            MountError::NoNames => FsMountError::NoNames { id },
            MountError::Exists => FsMountError::Exists { id, name },
            MountError::Missing => FsMountError::Missing { id, name },
            MountError::TooMany => FsMountError::TooMany { id },
            MountError::Busy(open) => FsMountError::Busy { id, name, open },
        }
    }
}
