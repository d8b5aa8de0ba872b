//! The state folders of sandboxes, of living ones and of those whose shim died.

use std::path::{Path, PathBuf};

use super::files::{entries, name, text};
use super::process::Shim;

/// The folder of one sandbox below `/run/kata`.
#[derive(Debug)]
pub struct StateFolder {
    /// Where it is.
    pub path: PathBuf,
    /// The sandbox' id.
    pub id: String,
}

impl StateFolder {
    /// Whether `shim` made it.
    pub fn belongs_to(&self, shim: &Shim) -> bool {
        self.id == shim.id
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
            id: name(&path),
            path,
        })
        .collect()
}
