//! What is known of the sandboxes on this host, as text for a person: each with its shim, what the shim's threads and its VM
//! do, the end of the guest's console and what would be undone; then shims and folders that belong to nothing.
//!
//! Everything is read from outside, so that a shim that hangs can be looked at.

mod files;
mod process;
mod sandbox;

use std::path::{Path, PathBuf};

use self::process::Shim;
use self::sandbox::StateFolder;

/// What was found.
#[derive(Debug)]
pub struct Report {
    /// Whether what was asked for is there.
    pub found: bool,
    /// What to print.
    pub text: String,
}

/// Looks at the host whose root folder is `root`; only at sandbox `wanted` if that is given.
pub fn report(root: &Path, wanted: Option<&str>) -> Report {
    let chosen = |id: &str| wanted.is_none_or(|wanted| wanted == id);
    let shims = process::shims(root);
    let folders = sandbox::state_folders(&root.join("run/kata"));
    let mut text = String::new();
    let mut found = false;
    for shim in shims.iter().filter(|shim| chosen(&shim.id)) {
        found = true;
        let folder = folders.iter().find(|folder| folder.belongs_to(shim));
        text.push_str(&alive(root, shim, folder));
    }
    let orphan = |folder: &&StateFolder| !shims.iter().any(|shim| folder.belongs_to(shim));
    let called = |folder: &&StateFolder| wanted.is_none_or(|wanted| folder.is_called(wanted));
    for folder in folders.iter().filter(called).filter(orphan) {
        found = true;
        text.push_str(&left_behind(folder));
    }
    match wanted {
        Some(id) if !found => text.push_str(&format!(
            "sandbox {id}: no shim runs for it and nothing of it is on this host. Look into containerd's log for the line that \
             names it; `kata-ctl check` says whether the host can run sandboxes.\n"
        )),
        None if !found => {
            found = true;
            text.push_str("No sandboxes on this host, and nothing left behind by any.\n");
        }
        _ => {}
    }
    Report { found, text }
}

fn alive(root: &Path, shim: &Shim, folder: Option<&StateFolder>) -> String {
    let mut text = section(
        &format!(
            "sandbox {} of namespace {}: shim {}, bundle {}",
            shim.id,
            shim.namespace,
            shim.pid,
            shim.bundle.display()
        ),
        &shim.summary(root),
    );
    text.push_str(&section(
        &format!("threads and KVM counters of {}, twice within a second", shim.pid),
        &process::activity(root, shim.pid),
    ));
    match folder {
        Some(folder) => text.push_str(&folder_sections(folder)),
        None => text.push_str(&section(
            "state folder",
            "none yet: the shim waits for the first container, or failed before it made one",
        )),
    }
    text
}

fn left_behind(folder: &StateFolder) -> String {
    let mut text = section(
        &format!(
            "sandbox {}: LEFT BEHIND in {}",
            folder.name,
            folder.path.display()
        ),
        "No shim runs for it. containerd cleans up when it next looks at the bundle (`ctr -n NAMESPACE containers delete`, or a \
         restart of containerd); what will be undone is listed below.",
    );
    text.push_str(&folder_sections(folder));
    text
}

fn folder_sections(folder: &StateFolder) -> String {
    let mut text = section(
        &format!("end of the guest's console, {}", folder.console().display()),
        &console(&folder.console()),
    );
    let undone = folder.undo_list();
    text.push_str(&section(
        &format!(
            "undone when it ends, {}: {} entries, last first",
            folder.journal().display(),
            undone.len()
        ),
        &undone.join("\n"),
    ));
    text
}

fn console(path: &PathBuf) -> String {
    let text = files::tail_of(path, 0);
    if text.trim().is_empty() {
        return "(nothing: the kernel has printed nothing. It prints when `enable_debug` is set or it panics; if the vCPU threads \
                above stand still, KVM cannot run this kernel: see `kata-ctl check`)"
            .to_owned();
    }
    text
}

fn section(title: &str, body: &str) -> String {
    format!("---- {title}\n{}\n", body.trim_end())
}

#[cfg(test)]
mod tests;
