//! The state folders of sandboxes, of living ones and of those whose shim died.

use std::path::{Path, PathBuf};

use runtime::paths::SandboxPaths;

use super::files::{entries, name, text};
use super::process::Shim;

/// The folder of one sandbox below `/run/kata`.
#[derive(Debug)]
pub struct StateFolder {
    /// Where it is.
    pub path: PathBuf,
    /// Its name: the sandbox' id, after its namespace and an `@` outside of Kubernetes; see `runtime::paths`.
    pub name: String,
}

impl StateFolder {
    /// Whether `shim` made it.
    pub fn belongs_to(&self, shim: &Shim) -> bool {
        SandboxPaths::new(&shim.namespace, &shim.id)
            .is_ok_and(|paths| paths.state().file_name() == self.path.file_name())
    }

    /// Whether a person who says `wanted`, the id with or without the namespace, may mean this one.
    pub fn is_called(&self, wanted: &str) -> bool {
        let id = self.name.split_once('@').map_or(self.name.as_str(), |(_, id)| id);
        wanted == self.name || wanted == id
    }

    /// The guest's console; see `runtime::paths`.
    pub fn console(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// What has to be undone; see `runtime::paths`.
    pub fn journal(&self) -> PathBuf {
        self.path.join("journal")
    }

    /// What the journal lists, in the order in which it is undone.
    pub fn undo_list(&self) -> Vec<String> {
        text(&self.journal()).lines().rev().map(str::to_owned).collect()
    }
}

/// All state folders below `parent`.
pub fn state_folders(parent: &Path) -> Vec<StateFolder> {
    let folders = entries(parent).into_iter().filter(|path| path.is_dir());
    folders
        .map(|path| StateFolder {
            name: name(&path),
            path,
        })
        .collect()
}
