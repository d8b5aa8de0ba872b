//! Where a sandbox' socket lives: the path that containerd's own shims use, so that tools can compute it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// containerd's default folder of shim sockets; fixed in every release, whatever its state folder is.
pub const DEFAULT_SOCKET_DIR: &str = "/run/containerd/s";

/// Longest path `sockaddr_un` takes: 108 bytes with the final NUL.
pub const MAX_SOCKET_PATH: usize = 107;

const SCHEME: &str = "unix://";

/// Why there is no address.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AddressError {
    /// The socket folder makes the path too long for a Unix socket.
    #[error("socket path {} has {} bytes, Unix sockets take at most {MAX_SOCKET_PATH}: choose a shorter socket folder",
            .0.display(), .0.as_os_str().len())]
    TooLong(PathBuf),
}

/// Address of a shim's socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address(PathBuf);

impl Address {
    /// The socket of sandbox `id`: `<socket_dir>/<sha256 of containerd_address/namespace/id>` (containerd's
    /// `shim.CreateSocketAddress`; the hash is over the cleaned join, in lower-case hex).
    ///
    /// # Errors
    /// [`AddressError::TooLong`]
    pub fn of_sandbox(
        socket_dir: &Path,
        containerd_address: &str,
        namespace: &str,
        id: &str,
    ) -> Result<Self, AddressError> {
        let digest = Sha256::digest(go_join(&[containerd_address, namespace, id]));
        let mut name = String::with_capacity(64);
        for byte in digest {
            // Writing to a String cannot fail.
            let _ = write!(name, "{byte:02x}");
        }
        Self::of_path(socket_dir.join(name))
    }

    /// The socket at `path`.
    ///
    /// # Errors
    /// [`AddressError::TooLong`]
    pub fn of_path(path: PathBuf) -> Result<Self, AddressError> {
        if path.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(AddressError::TooLong(path));
        }
        Ok(Self(path))
    }

    /// Reads back what [`Address::to_string`] wrote; `None` when it is not a `unix://` address.
    pub fn parse(text: &str) -> Option<Self> {
        let path = text.trim().strip_prefix(SCHEME)?;
        (path.starts_with('/') && path.len() <= MAX_SOCKET_PATH).then(|| Self(PathBuf::from(path)))
    }

    /// Path of the socket.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{SCHEME}{}", self.0.display())
    }
}

/// Go's `filepath.Join`: skips empty elements and cleans the result lexically.
fn go_join(elements: &[&str]) -> String {
    let joined = elements
        .iter()
        .filter(|e| !e.is_empty())
        .copied()
        .collect::<Vec<_>>()
        .join("/");
    let rooted = joined.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in joined.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            ".." if rooted => {}
            part => parts.push(part),
        }
    }
    format!("{}{}", if rooted { "/" } else { "" }, parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn address_when_computed_is_containerds() {
        // printf '/run/containerd/containerd.sock/default/hello' | sha256sum
        let address = Address::of_sandbox(
            Path::new(DEFAULT_SOCKET_DIR),
            "/run/containerd/containerd.sock",
            "default",
            "hello",
        )
        .unwrap();

        assert_eq!(
            address.to_string(),
            "unix:///run/containerd/s/f89a747f6a50d5c2ffc699d28a658410899f12d03fa638893cc55d2da1cf53f6"
        );
    }

    #[test]
    fn join_when_paths_are_odd_cleans_like_go() {
        assert_eq!(go_join(&["/run//c.sock/", "ns", "id"]), "/run/c.sock/ns/id");
        assert_eq!(go_join(&["", "ns", "id"]), "ns/id");
        assert_eq!(go_join(&["/a/./b/../c", "ns"]), "/a/c/ns");
        assert_eq!(go_join(&["/../x"]), "/x");
        assert_eq!(go_join(&["../x"]), "../x");
    }

    #[test]
    fn address_when_names_are_longest_fits() {
        let (namespace, id) = ("n".repeat(76), "i".repeat(64));

        let address =
            Address::of_sandbox(Path::new(DEFAULT_SOCKET_DIR), "/run/c.sock", &namespace, &id).unwrap();

        assert!(address.path().as_os_str().len() < MAX_SOCKET_PATH);
    }

    #[test]
    fn socket_dir_when_too_long_is_refused() {
        let dir = format!("/{}", "d".repeat(60));

        let error = Address::of_sandbox(Path::new(&dir), "/run/c.sock", "ns", "id").unwrap_err();

        assert!(error.to_string().contains(&dir), "{error}");
        assert!(error.to_string().contains("at most 107"), "{error}");
    }

    #[test]
    fn address_when_parsed_is_read_back() {
        let address = Address::of_path(PathBuf::from("/run/x")).unwrap();

        assert_eq!(Address::parse(&format!("{address}\n")), Some(address));
        assert_eq!(Address::parse("/run/x"), None);
        assert_eq!(Address::parse("unix://relative"), None);
    }
}
