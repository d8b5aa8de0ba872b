//! The poststop hooks that are due, one record for each container in its sandbox' state folder.
//!
//! A record is written before the container's first hook runs, and taken away before its poststop hooks do. Whoever gets to
//! take it runs them: the deletion of the container, the end of its sandbox, or, after a crash of the shim, `delete`. So
//! they run once, and not a second time when they were interrupted: runc removes a container's state before its
//! poststop hooks, too.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Hook;
use serde::{Deserialize, Serialize};

use super::hooks;
use crate::error::{Error, ErrorKind, Result};

/// Name of the folder of the records.
const FOLDER: &str = "poststop";

/// Poststop hooks that are due, with what they are told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Poststop {
    /// Container.
    pub(super) container: String,
    /// Its bundle.
    pub(super) bundle: PathBuf,
    /// The hooks.
    pub(super) hooks: Vec<Hook>,
    /// The container's last state, as JSON.
    pub(super) state: String,
}

impl Poststop {
    /// Runs them all; a failure is logged and the next one runs.
    pub(crate) async fn run(self) {
        for (number, hook) in self.hooks.iter().enumerate() {
            // containerd may have removed the bundle of a container whose shim is gone.
            let folder = if self.bundle.is_dir() {
                self.bundle.as_path()
            } else {
                Path::new("/")
            };
            let path = hook.path().display();
            match hooks::run(hook, folder, self.state.as_bytes()).await {
                Ok(()) => tracing::debug!(container = self.container, "poststop hook #{number} {path}"),
                Err(error) => {
                    tracing::warn!(container = self.container, %error, "poststop hook #{number} {path}");
                }
            }
        }
    }
}

/// The records of a sandbox.
#[derive(Debug, Clone)]
pub(crate) struct Records {
    folder: PathBuf,
}

impl Records {
    /// Those below the sandbox' state folder.
    pub(crate) fn of(state_folder: &Path) -> Self {
        Self {
            folder: state_folder.join(FOLDER),
        }
    }

    /// Notes that the hooks of a container are due. Blocks.
    ///
    /// # Errors
    /// Naming the file; nothing is due then.
    pub(super) fn write(&self, poststop: &Poststop) -> Result<()> {
        let path = self.path(&poststop.container);
        // No id begins with a dot. A crash leaves no half record under the record's name.
        let half = self.folder.join(format!(".{}", poststop.container));
        let write = || {
            fs::create_dir_all(&self.folder)?;
            fs::write(&half, serde_json::to_vec(poststop)?)?;
            fs::rename(&half, &path)
        };
        write().map_err(|error: io::Error| {
            let kind = match error.kind() {
                io::ErrorKind::StorageFull => ErrorKind::ResourceExhausted,
                _ => ErrorKind::Internal,
            };
            Error::new(
                kind,
                format!("record of poststop hooks {}: {error}", path.display()),
            )
        })
    }

    /// The hooks of `container`, if they are due: they are the caller's to run, and nobody else's. Blocks.
    pub(super) fn take(&self, container: &str) -> Option<Poststop> {
        let path = self.path(container);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::error!(container, path = %path.display(), %error, "poststop hooks do not run");
                return None;
            }
        };
        match fs::remove_file(&path) {
            Ok(()) => {}
            // Somebody else was faster.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::error!(container, path = %path.display(), %error, "poststop hooks do not run");
                return None;
            }
        }
        serde_json::from_slice(&text)
            .inspect_err(|error| tracing::error!(container, %error, "poststop hooks do not run"))
            .ok()
    }

    /// All that are due, taken. Blocks.
    pub(crate) fn take_all(&self) -> Vec<Poststop> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::error!(folder = %self.folder.display(), %error, "poststop hooks do not run");
                }
                return Vec::new();
            }
        };
        let names = entries.flatten().map(|entry| entry.file_name());
        names
            .filter_map(|name| self.take(name.to_str().filter(|name| !name.starts_with('.'))?))
            .collect()
    }

    fn path(&self, container: &str) -> PathBuf {
        self.folder.join(container)
    }
}

/// Runs the hooks of several containers beside each other.
pub(crate) async fn run_all(due: Vec<Poststop>) {
    let mut running = tokio::task::JoinSet::new();
    for poststop in due {
        running.spawn(poststop.run());
    }
    running.join_all().await;
}
