//! The bundle: the folder containerd makes for a container, and the files in it that belong to the shim.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use runtime::cri::{self, ContainerKind, NoSandboxId};
use serde::Deserialize;

use crate::address::Address;

const CONFIG: &str = "config.json";
const ADDRESS: &str = "address";
const PID: &str = "shim.pid";
const OPTIONS: &str = "options.pb";

/// A bundle folder.
#[derive(Debug, Clone)]
pub struct Bundle {
    dir: PathBuf,
}

/// Why a file of the bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// Reading or writing failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// File.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// config.json is not an OCI runtime configuration.
    #[error("{}: {source}", path.display())]
    Config {
        /// File.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A pod's container that does not say which pod.
    #[error("{}: {source}", path.display())]
    NoSandboxId {
        /// File.
        path: PathBuf,
        /// Which annotation is missing.
        source: NoSandboxId,
    },
}

/// The part of config.json that decides about `start`.
#[derive(Deserialize)]
struct Config {
    annotations: Option<HashMap<String, String>>,
}

impl Bundle {
    /// The bundle at `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the container is to its pod, by its annotations. Without a config.json there is no container: it is a sandbox of
    /// the Sandbox API.
    ///
    /// # Errors
    /// [`BundleError`] when config.json is unreadable or contradicts itself.
    pub fn kind(&self) -> Result<ContainerKind, BundleError> {
        let path = self.dir.join(CONFIG);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.dir.is_dir() => {
                return Ok(ContainerKind::Sandbox);
            }
            Err(source) => return Err(BundleError::Io { path, source }),
        };
        let config: Config = serde_json::from_slice(&bytes).map_err(|source| BundleError::Config {
            path: path.clone(),
            source,
        })?;
        let annotations = config.annotations.unwrap_or_default();
        cri::kind(&annotations).map_err(|source| BundleError::NoSandboxId { path, source })
    }

    /// Records the address; containerd ≤ 1.6 reads it to find the shim again after a restart.
    ///
    /// # Errors
    /// [`BundleError::Io`]
    pub fn write_address(&self, address: &Address) -> Result<(), BundleError> {
        self.write(ADDRESS, address.to_string().as_bytes())
    }

    /// The recorded address, if any.
    pub fn address(&self) -> Option<Address> {
        Address::parse(&fs::read_to_string(self.dir.join(ADDRESS)).ok()?)
    }

    /// Records the shim's pid.
    ///
    /// # Errors
    /// [`BundleError::Io`]
    pub fn write_pid(&self, pid: u32) -> Result<(), BundleError> {
        self.write(PID, pid.to_string().as_bytes())
    }

    /// The recorded pid, if any.
    pub fn pid(&self) -> Option<u32> {
        fs::read_to_string(self.dir.join(PID))
            .ok()?
            .trim()
            .parse()
            .ok()
            .filter(|pid| *pid > 1)
    }

    /// Keeps the options of the runtime class for the process that serves the bundle: containerd gives them to `start`, and
    /// not with a request for a sandbox.
    ///
    /// # Errors
    /// [`BundleError::Io`]
    pub fn write_options(&self, options: &[u8]) -> Result<(), BundleError> {
        self.write(OPTIONS, options)
    }

    /// The options that were kept, if any.
    ///
    /// # Errors
    /// [`BundleError::Io`] when they cannot be read.
    pub fn options(&self) -> Result<Option<Vec<u8>>, BundleError> {
        let path = self.dir.join(OPTIONS);
        match fs::read(&path) {
            Ok(options) => Ok(Some(options)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(BundleError::Io { path, source }),
        }
    }

    /// Forgets address, pid and options.
    pub fn clear(&self) {
        for name in [ADDRESS, PID, OPTIONS] {
            // Missing files are what we want; a bundle that cannot be changed is about to be removed by containerd.
            let _ = fs::remove_file(self.dir.join(name));
        }
    }

    /// Whole or not at all: containerd may read the file at any time.
    fn write(&self, name: &str, text: &[u8]) -> Result<(), BundleError> {
        let path = self.dir.join(name);
        let temporary = self.dir.join(format!(".{name}.{}", std::process::id()));
        let written = fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, &path));
        written.map_err(|source| {
            // Best effort: the error that matters is the one being returned.
            let _ = fs::remove_file(&temporary);
            BundleError::Io { path, source }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(config: &str) -> (tempfile::TempDir, Bundle) {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CONFIG), config).unwrap();
        let bundle = Bundle::new(dir.path());
        (dir, bundle)
    }

    #[test]
    fn kind_when_annotated_is_read() {
        for config in [
            r#"{"ociVersion":"1.0.2"}"#,
            r#"{"annotations":null}"#,
            r#"{"annotations":{"a":"b"}}"#,
        ] {
            assert_eq!(bundle(config).1.kind().unwrap(), ContainerKind::Single);
        }
        let (dir, member) = bundle(r#"{"annotations":{"io.kubernetes.cri.container-type":"container"}}"#);
        let error = member.kind().unwrap_err().to_string();
        let path = dir.path().join(CONFIG).display().to_string();
        assert!(
            error.starts_with(&path) && error.contains("io.kubernetes.cri.sandbox-id"),
            "{error}"
        );
    }

    #[test]
    fn kind_when_there_is_no_config_is_a_sandbox() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Bundle::new(dir.path()).kind().unwrap(), ContainerKind::Sandbox);
    }

    #[test]
    fn config_when_its_folder_is_missing_or_it_is_broken_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let gone = Bundle::new(dir.path().join("gone"));
        let error = gone.kind().unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("{}/gone/config.json: ", dir.path().display())),
            "{error}"
        );

        let (dir, bundle) = bundle("{\"annotations\":");
        let error = bundle.kind().unwrap_err().to_string();
        assert!(error.contains("config.json: EOF while parsing"), "{error}");
        drop(dir);
    }

    #[test]
    fn bundle_when_cleared_has_no_address_and_pid() {
        let (dir, bundle) = bundle("{}");
        let address = Address::of_path("/run/x".into()).unwrap();
        bundle.write_address(&address).unwrap();
        bundle.write_pid(4242).unwrap();
        bundle.write_options(b"\xff").unwrap();

        assert_eq!((bundle.address(), bundle.pid()), (Some(address), Some(4242)));
        assert_eq!(bundle.options().unwrap().as_deref(), Some(&b"\xff"[..]));
        assert_eq!(
            fs::read_to_string(dir.path().join("address")).unwrap(),
            "unix:///run/x"
        );
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            4,
            "no temporary file is left"
        );

        bundle.clear();
        assert_eq!((bundle.address(), bundle.pid()), (None, None));
        assert_eq!(bundle.options().unwrap(), None);
    }

    #[test]
    fn pid_when_it_could_hurt_is_not_believed() {
        let (dir, bundle) = bundle("{}");
        for text in ["", "0", "1", "-1", "12 13", "x"] {
            fs::write(dir.path().join(PID), text).unwrap();
            assert_eq!(bundle.pid(), None, "{text:?}");
        }
    }
}
