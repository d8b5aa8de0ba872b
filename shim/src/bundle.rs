//! The bundle: the folder containerd makes for a container, and the files in it that belong to the shim.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::address::Address;

const CONFIG: &str = "config.json";
const ADDRESS: &str = "address";
const PID: &str = "shim.pid";

/// A bundle folder.
#[derive(Debug, Clone)]
pub struct Bundle {
    dir: PathBuf,
}

/// What a container is to its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContainerKind {
    /// Not part of a pod: `ctr`, nerdctl, docker. It is its own sandbox.
    Single,
    /// The pod's sandbox ("pause") container.
    Sandbox,
    /// A container in a pod's sandbox.
    Member {
        /// Id of the sandbox.
        sandbox_id: String,
    },
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
    /// There is no config.json, which only a Sandbox API request has reason to do without.
    #[error("{} does not exist: the folder is not an OCI bundle (the Sandbox API, sandboxer = \"shim\", is not supported)",
            .0.display())]
    NoConfig(PathBuf),
    /// config.json is not an OCI runtime configuration.
    #[error("{}: {source}", path.display())]
    Config {
        /// File.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A pod's container that does not say which pod.
    #[error("{}: {type_key} is {type_value:?} but annotation {id_key} is missing", path.display())]
    NoSandboxId {
        /// File.
        path: PathBuf,
        /// Annotation with the type.
        type_key: &'static str,
        /// Its value.
        type_value: String,
        /// Annotation that should hold the sandbox id.
        id_key: &'static str,
    },
}

/// Annotation keys of the CRI implementations: type, its value for a sandbox, its value for a member, sandbox id.
const CRI_KEYS: [(&str, &str, &str, &str); 3] = [
    (
        "io.kubernetes.cri.container-type",
        "sandbox",
        "container",
        "io.kubernetes.cri.sandbox-id",
    ),
    (
        "io.kubernetes.cri-o.ContainerType",
        "sandbox",
        "container",
        "io.kubernetes.cri-o.SandboxID",
    ),
    (
        "io.kubernetes.docker.type",
        "podsandbox",
        "container",
        "io.kubernetes.sandbox.id",
    ),
];

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

    /// What the container is to its pod, by its annotations.
    ///
    /// # Errors
    /// [`BundleError`] when config.json is missing, unreadable or contradicts itself.
    pub fn kind(&self) -> Result<ContainerKind, BundleError> {
        let path = self.dir.join(CONFIG);
        let bytes = fs::read(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => BundleError::NoConfig(path.clone()),
            _ => BundleError::Io {
                path: path.clone(),
                source,
            },
        })?;
        let config: Config = serde_json::from_slice(&bytes).map_err(|source| BundleError::Config {
            path: path.clone(),
            source,
        })?;
        let annotations = config.annotations.unwrap_or_default();
        for (type_key, sandbox, member, id_key) in CRI_KEYS {
            match annotations.get(type_key).map(String::as_str) {
                Some(value) if value == sandbox => return Ok(ContainerKind::Sandbox),
                Some(value) if value == member => {
                    let sandbox_id =
                        annotations
                            .get(id_key)
                            .filter(|id| !id.is_empty())
                            .ok_or_else(|| BundleError::NoSandboxId {
                                path: path.clone(),
                                type_key,
                                type_value: value.to_owned(),
                                id_key,
                            })?;
                    return Ok(ContainerKind::Member {
                        sandbox_id: sandbox_id.clone(),
                    });
                }
                _ => {}
            }
        }
        Ok(ContainerKind::Single)
    }

    /// Records the address; containerd ≤ 1.6 reads it to find the shim again after a restart.
    ///
    /// # Errors
    /// [`BundleError::Io`]
    pub fn write_address(&self, address: &Address) -> Result<(), BundleError> {
        self.write(ADDRESS, &address.to_string())
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
        self.write(PID, &pid.to_string())
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

    /// Forgets address and pid.
    pub fn clear(&self) {
        for name in [ADDRESS, PID] {
            // Missing files are what we want; a bundle that cannot be changed is about to be removed by containerd.
            let _ = fs::remove_file(self.dir.join(name));
        }
    }

    /// Whole or not at all: containerd may read the file at any time.
    fn write(&self, name: &str, text: &str) -> Result<(), BundleError> {
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
    fn kind_follows_the_annotations_of_every_cri() {
        for (type_key, sandbox, member, id_key) in CRI_KEYS {
            let (_dir, bundle) = bundle(&format!(
                r#"{{"annotations":{{"{type_key}":"{sandbox}","{id_key}":"s"}}}}"#
            ));
            assert_eq!(bundle.kind().unwrap(), ContainerKind::Sandbox);

            let (_dir, bundle) = self::bundle(&format!(
                r#"{{"annotations":{{"{type_key}":"{member}","{id_key}":"s"}}}}"#
            ));
            assert_eq!(
                bundle.kind().unwrap(),
                ContainerKind::Member {
                    sandbox_id: "s".into()
                }
            );

            let (_dir, bundle) = self::bundle(&format!(r#"{{"annotations":{{"{type_key}":"{member}"}}}}"#));
            let error = bundle.kind().unwrap_err().to_string();
            assert!(error.contains(type_key) && error.contains(id_key), "{error}");
        }
    }

    #[test]
    fn container_without_annotations_is_single() {
        for config in [
            r#"{"ociVersion":"1.0.2"}"#,
            r#"{"annotations":null}"#,
            r#"{"annotations":{"a":"b"}}"#,
        ] {
            assert_eq!(bundle(config).1.kind().unwrap(), ContainerKind::Single);
        }
    }

    #[test]
    fn missing_and_broken_config_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Bundle::new(dir.path()).kind().unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("{}/config.json does not exist", dir.path().display())),
            "{error}"
        );

        let (dir, bundle) = bundle("{\"annotations\":");
        let error = bundle.kind().unwrap_err().to_string();
        assert!(error.contains("config.json: EOF while parsing"), "{error}");
        drop(dir);
    }

    #[test]
    fn address_and_pid_are_read_back_and_cleared() {
        let (dir, bundle) = bundle("{}");
        let address = Address::of_path("/run/x".into()).unwrap();
        bundle.write_address(&address).unwrap();
        bundle.write_pid(4242).unwrap();

        assert_eq!((bundle.address(), bundle.pid()), (Some(address), Some(4242)));
        assert_eq!(
            fs::read_to_string(dir.path().join("address")).unwrap(),
            "unix:///run/x"
        );
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            3,
            "no temporary file is left"
        );

        bundle.clear();
        assert_eq!((bundle.address(), bundle.pid()), (None, None));
    }

    #[test]
    fn pids_that_could_hurt_are_not_believed() {
        let (dir, bundle) = bundle("{}");
        for text in ["", "0", "1", "-1", "12 13", "x"] {
            fs::write(dir.path().join(PID), text).unwrap();
            assert_eq!(bundle.pid(), None, "{text:?}");
        }
    }
}
