//! The listening socket: bound once by `start`, private to root, never left stale.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::address::Address;

/// Why a socket cannot be bound.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A folder or file operation failed.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Somebody listens there.
    #[error("a shim already serves {}", .0.display())]
    InUse(PathBuf),
    /// Something that is not a socket is in the way.
    #[error("{} exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
}

/// Binds and listens at `address`: folder 0700, socket 0600. A socket nobody listens on, left by a crashed shim, is
/// replaced.
///
/// # Errors
/// [`SocketError`] naming the path.
pub fn bind(address: &Address) -> Result<UnixListener, SocketError> {
    let path = address.path();
    let failed = |what| {
        move |source| SocketError::Io {
            what,
            path: path.to_owned(),
            source,
        }
    };
    if let Some(dir) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|source| SocketError::Io {
                what: "creating socket folder",
                path: dir.to_owned(),
                source,
            })?;
    }
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            if is_served(path) {
                return Err(SocketError::InUse(path.to_owned()));
            }
            remove(path)?;
            UnixListener::bind(path)
        }
        other => other,
    }
    .map_err(failed("binding socket"))?;
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed("restricting socket"))?;
    Ok(listener)
}

/// Whether something listens at `path`. Does not block on a listener whose backlog is full.
pub fn is_served(path: &Path) -> bool {
    let Ok(address) = SocketAddrUnix::new(path) else {
        return false;
    };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let Ok(socket) = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None) else {
        return false;
    };
    matches!(connect(&socket, &address), Ok(()) | Err(Errno::AGAIN))
}

/// Removes the socket at `path`; one that does not exist is fine, anything but a socket is not touched.
///
/// # Errors
/// [`SocketError`] naming the path.
pub fn remove(path: &Path) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Ok(meta) if !meta.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
        _ => {}
    }
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(SocketError::Io {
            what: "removing socket",
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(dir: &tempfile::TempDir) -> Address {
        Address::of_path(dir.path().join("s/socket")).unwrap()
    }

    #[test]
    fn socket_when_made_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let address = address(&dir);

        let _listener = bind(&address).unwrap();

        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(address.path()), 0o600);
        assert_eq!(mode(address.path().parent().unwrap()), 0o700);
        assert!(is_served(address.path()));
    }

    #[test]
    fn socket_when_stale_is_replaced_and_when_served_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let address = address(&dir);
        drop(bind(&address).unwrap());
        assert!(address.path().exists() && !is_served(address.path()));

        let _listener = bind(&address).unwrap();

        let error = bind(&address).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("a shim already serves {}", address.path().display())
        );
    }

    #[test]
    fn socket_when_its_backlog_is_full_counts_as_served() {
        let dir = tempfile::tempdir().unwrap();
        let address = address(&dir);
        let _listener = bind(&address).unwrap();
        let mut clients = Vec::new();
        // The kernel caps the backlog at net.core.somaxconn (4096 by default).
        for _ in 0..5000 {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let client = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
            if connect(&client, &SocketAddrUnix::new(address.path()).unwrap()) == Err(Errno::AGAIN) {
                break;
            }
            clients.push(client);
        }

        assert!(is_served(address.path()));
    }

    #[test]
    fn socket_when_a_file_is_in_the_way_leaves_it() {
        let dir = tempfile::tempdir().unwrap();
        let address = address(&dir);
        fs::create_dir_all(address.path().parent().unwrap()).unwrap();
        fs::write(address.path(), "precious").unwrap();

        assert!(matches!(bind(&address), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read(address.path()).unwrap(), b"precious");
    }

    #[test]
    fn socket_folder_when_unusable_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let address = Address::of_path(file.join("s/socket")).unwrap();

        let error = bind(&address).unwrap_err().to_string();

        assert!(
            error.starts_with(&format!("creating socket folder {}/s:", file.display())),
            "{error}"
        );
    }
}
