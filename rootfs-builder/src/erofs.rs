//! The image as a read-only filesystem on a block device, built by `mkfs.erofs` with every variable thing pinned.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::tree::{Node, Tree};

/// A fixed identity: the image is known by its contents, not by when it was made.
const UUID: &str = "6b617461-6167-656e-7400-000000000001";

#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    #[error("{path}: {source}")]
    Staging { path: PathBuf, source: io::Error },
    #[error("device node {path}: mknod: {source}")]
    Device { path: PathBuf, source: io::Error },
    #[error("run mkfs.erofs (package erofs-utils): {0}")]
    Run(io::Error),
    #[error("mkfs.erofs failed: {0}")]
    Failed(String),
}

/// Writes `tree` as an EROFS image to `output`.
///
/// # Errors
/// Staging the tree needs root (device nodes); mkfs.erofs must be installed.
pub fn build(tree: &Tree, output: &Path) -> Result<(), ErofsError> {
    let mut staging = output.as_os_str().to_owned();
    staging.push(".staging");
    let staging = PathBuf::from(staging);
    let result = stage(tree, &staging).and_then(|()| make(&staging, output));
    let _ = fs::remove_dir_all(&staging);
    result
}

fn stage(tree: &Tree, folder: &Path) -> Result<(), ErofsError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ErofsError::Staging { path, source }
    };
    fs::create_dir_all(folder).map_err(failed(folder))?;
    for (path, node) in tree.entries() {
        let target = folder.join(path);
        match node {
            Node::Directory => fs::create_dir_all(&target).map_err(failed(&target))?,
            Node::File { mode, data } => {
                fs::write(&target, data).map_err(failed(&target))?;
                fs::set_permissions(&target, fs::Permissions::from_mode(*mode)).map_err(failed(&target))?;
            }
            Node::CharDevice { mode, major, minor } => {
                let status = Command::new("mknod")
                    .arg("-m")
                    .arg(format!("{mode:o}"))
                    .arg(&target)
                    .args(["c", &major.to_string(), &minor.to_string()])
                    .status();
                match status {
                    Ok(status) if status.success() => {}
                    Ok(status) => {
                        return Err(ErofsError::Device {
                            path: target,
                            source: io::Error::other(status.to_string()),
                        });
                    }
                    Err(source) => return Err(ErofsError::Device { path: target, source }),
                }
            }
        }
    }
    Ok(())
}

fn make(folder: &Path, output: &Path) -> Result<(), ErofsError> {
    let run = Command::new("mkfs.erofs")
        .args(["--quiet", "-T0", "--all-root", "-U", UUID])
        .arg(output)
        .arg(folder)
        .output()
        .map_err(ErofsError::Run)?;
    if run.status.success() {
        Ok(())
    } else {
        Err(ErofsError::Failed(
            String::from_utf8_lossy(&run.stderr).trim().to_owned(),
        ))
    }
}
