//! Mounts whose folders have to be made first: containerd's type `mkdir/TYPE` with options
//! `X-containerd.mkdir.path=PATH[:MODE[:UID:GID]]` (containerd: docs/mounts.md). The mount manager of containerd ≥ 2.2 leaves them
//! to a shim that says it can do them.

use std::borrow::Cow;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt, chown};
use std::path::Path;

use super::mounts::MountError;
use crate::types::Mount;

/// In front of the type of the mount.
const TYPE: &str = "mkdir/";
/// In front of an option that is for this.
const OPTION: &str = "X-containerd.mkdir.path=";
/// Mode of a folder that names none.
const MODE: u32 = 0o700;

/// Makes the folders that `request` asks for, and returns the mount that is left; another mount as it is.
///
/// # Errors
/// [`MountError::Target`] naming the folder, or the option that is not one.
pub fn make_folders(request: &Mount) -> Result<Cow<'_, Mount>, MountError> {
    let Some(fs_type) = request.fs_type.strip_prefix(TYPE) else {
        return Ok(Cow::Borrowed(request));
    };
    let (folders, options): (Vec<_>, Vec<_>) = request
        .options
        .iter()
        .partition(|option| option.starts_with(OPTION));
    for option in folders {
        let folder = option.strip_prefix(OPTION).unwrap_or_default();
        make(folder).map_err(|source| MountError::Target {
            target: folder.into(),
            source,
        })?;
    }
    Ok(Cow::Owned(Mount {
        fs_type: fs_type.to_owned(),
        options: options.into_iter().cloned().collect(),
        ..request.clone()
    }))
}

/// `PATH[:MODE[:UID:GID]]`; a folder that exists stays as it is.
fn make(folder: &str) -> io::Result<()> {
    let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "not PATH[:MODE[:UID:GID]]");
    let parts: Vec<&str> = folder.split(':').collect();
    let (path, mode, owner) = match *parts.as_slice() {
        [path] => (path, None, None),
        [path, mode] => (path, Some(mode), None),
        [path, mode, uid, gid] => (path, Some(mode), Some((uid, gid))),
        _ => return Err(invalid()),
    };
    let path = Path::new(path);
    if !path.is_absolute() {
        return Err(invalid());
    }
    let mode = match mode {
        Some(mode) => u32::from_str_radix(mode, 8).map_err(|_| invalid())?,
        None => MODE,
    };
    let number = |text: &str| text.parse::<u32>().map_err(|_| invalid());
    let owner = owner.map(|(uid, gid)| Ok::<_, io::Error>((number(uid)?, number(gid)?)));
    let owner = owner.transpose()?;
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(MODE).create(path)?;
    // Past the umask.
    fs::set_permissions(path, Permissions::from_mode(mode))?;
    match owner {
        Some((uid, gid)) => chown(path, Some(uid), Some(gid)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(fs_type: &str, options: &[String]) -> Mount {
        Mount {
            fs_type: fs_type.into(),
            source: "overlay".into(),
            options: options.to_vec(),
            ..Default::default()
        }
    }

    #[test]
    fn folders_when_asked_for_are_made_and_the_mount_is_left() {
        let root = tempfile::tempdir().unwrap();
        let (upper, work) = (root.path().join("a/upper"), root.path().join("work"));
        let option = |path: &Path, rest: &str| format!("{OPTION}{}{rest}", path.display());
        let request = request(
            "mkdir/overlay",
            &[option(&upper, ":0755"), "lowerdir=/x".into(), option(&work, "")],
        );

        let mount = make_folders(&request).unwrap();

        assert_eq!(
            (mount.fs_type.as_str(), mount.options.as_slice()),
            ("overlay", &["lowerdir=/x".to_owned()][..])
        );
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode(&upper), mode(&work)), (0o755, 0o700));
        make_folders(&request).unwrap();
    }

    #[test]
    fn mount_when_it_wants_no_folders_is_untouched() {
        let plain = request("overlay", &["lowerdir=/x".into()]);
        assert_eq!(*make_folders(&plain).unwrap(), plain);
    }

    #[test]
    fn folder_when_malformed_is_named() {
        for bad in ["relative", "/x:9", "/x:0700:1", "/x:0700:a:b", ""] {
            let request = request("mkdir/bind", &[format!("{OPTION}{bad}")]);
            let error = make_folders(&request).unwrap_err().to_string();
            assert!(error.contains("PATH[:MODE") && error.contains(bad), "{error}");
        }
    }
}
