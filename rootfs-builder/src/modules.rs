//! Kernel modules of a stock kernel: which ones a guest needs, in an order that satisfies their dependencies.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// What a guest cannot do without: transport, console, vsock, shared folder, disks, image formats, network,
/// entropy, memory devices. Names a kernel has built in are skipped.
pub const DEFAULT: [&str; 22] = [
    "virtio_mmio",
    "virtio_console",
    "vsock",
    "vmw_vsock_virtio_transport",
    "fuse",
    "virtiofs",
    "virtio_blk",
    "overlay",
    "erofs",
    "ext4",
    "virtio_rng",
    "virtio_net",
    "virtio_balloon",
    "virtio_mem",
    "virtio_pmem",
    "nd_pmem",
    "veth",
    "tun",
    "bridge",
    "ip_tables",
    "iptable_nat",
    "nf_tables",
];

/// The agent loads the files named here, in order (see the agent's `init::modules`).
const LIST: &str = "agent.load";

#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    #[error("{path}: {source}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path}: no kernel release in it")]
    NoRelease { path: PathBuf },
    #[error("{path}: several kernel releases ({releases}); choose one with --kernel-release")]
    SeveralReleases { path: PathBuf, releases: String },
    #[error("kernel module {name}: neither in {path} nor built in")]
    Unknown { name: String, path: PathBuf },
    #[error("kernel module {path}: {reason}")]
    Decompress { path: PathBuf, reason: String },
}

/// A module to put into the image.
#[derive(Debug, PartialEq, Eq)]
pub struct Module {
    /// Its file in the kernel's package, perhaps compressed.
    source: PathBuf,
    /// Path in the release's folder, never compressed.
    relative: String,
    /// Path in the image.
    pub target: String,
}

impl Module {
    /// The module, decompressed: the agent has better things to do at boot.
    pub fn read(&self) -> Result<Vec<u8>, ModuleError> {
        let bytes = read(&self.source)?;
        if self.source.extension().is_some_and(|extension| extension == "xz") {
            let mut out = Vec::new();
            lzma_rust2::XzReader::new(bytes.as_slice(), false)
                .read_to_end(&mut out)
                .map_err(|error| ModuleError::Decompress {
                    path: self.source.clone(),
                    reason: error.to_string(),
                })?;
            return Ok(out);
        }
        Ok(bytes)
    }
}

/// The kernel release below `folder`: `chosen`, or the only one there.
pub fn release(folder: &Path, chosen: Option<&str>) -> Result<String, ModuleError> {
    if let Some(release) = chosen {
        return Ok(release.to_owned());
    }
    let path = folder.join("lib/modules");
    let failed = |source| ModuleError::Read {
        path: path.clone(),
        source,
    };
    let mut releases = Vec::new();
    for entry in fs::read_dir(&path).map_err(failed)? {
        releases.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    releases.sort_unstable();
    match releases.as_slice() {
        [only] => Ok(only.clone()),
        [] => Err(ModuleError::NoRelease { path }),
        several => Err(ModuleError::SeveralReleases {
            path,
            releases: several.join(", "),
        }),
    }
}

/// The files of `wanted` and everything they depend on, dependencies first. Which modules a kernel leaves out of
/// its built-in list and its package differs between releases, so an unknown name of the default list is skipped;
/// `wanted` by the user must exist.
pub fn resolve(folder: &Path, release: &str, wanted: &[&str]) -> Result<Vec<Module>, ModuleError> {
    let base = folder.join("lib/modules").join(release);
    let index = Index::read(&base)?;
    let mut plan = Vec::new();
    let mut seen = HashSet::new();
    for name in wanted {
        let key = normalized(name);
        if let Some(path) = index.by_name.get(&key) {
            index.visit(path, &mut seen, &mut plan);
        } else if !index.builtin.contains(&key) && !DEFAULT.contains(name) {
            return Err(ModuleError::Unknown {
                name: (*name).to_owned(),
                path: base,
            });
        }
    }
    Ok(plan
        .into_iter()
        .map(|path| {
            let relative = path.strip_suffix(".xz").unwrap_or(&path).to_owned();
            Module {
                source: base.join(&path),
                target: format!("lib/modules/{release}/{relative}"),
                relative,
            }
        })
        .collect())
}

/// Where the image keeps the load list of `release`.
pub fn list_path(release: &str) -> String {
    format!("lib/modules/{release}/{LIST}")
}

/// The load list's contents.
pub fn load_list(plan: &[Module]) -> String {
    plan.iter()
        .map(|module| format!("{}\n", module.relative))
        .collect()
}

/// depmod's files.
struct Index {
    by_name: BTreeMap<String, String>,
    dependencies: BTreeMap<String, Vec<String>>,
    builtin: HashSet<String>,
}

impl Index {
    fn read(base: &Path) -> Result<Self, ModuleError> {
        let mut by_name = BTreeMap::new();
        let mut dependencies = BTreeMap::new();
        for line in read_text(&base.join("modules.dep"))?.lines() {
            let Some((path, needs)) = line.split_once(':') else {
                continue;
            };
            by_name.insert(name_of(path), path.to_owned());
            dependencies.insert(
                path.to_owned(),
                needs.split_whitespace().map(str::to_owned).collect(),
            );
        }
        let builtin = match read_text(&base.join("modules.builtin")) {
            Ok(text) => text.lines().map(name_of).collect(),
            Err(ModuleError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                HashSet::new()
            }
            Err(error) => return Err(error),
        };
        Ok(Self {
            by_name,
            dependencies,
            builtin,
        })
    }

    /// Depth first, so that a dependency precedes its users.
    fn visit(&self, path: &str, seen: &mut HashSet<String>, plan: &mut Vec<String>) {
        if !seen.insert(path.to_owned()) {
            return;
        }
        for needed in self.dependencies.get(path).into_iter().flatten() {
            self.visit(needed, seen, plan);
        }
        plan.push(path.to_owned());
    }
}

/// `kernel/drivers/virtio/virtio-mmio.ko.xz` → `virtio_mmio`.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normalized(file.split(".ko").next().unwrap_or(file))
}

fn normalized(name: &str) -> String {
    name.replace('-', "_")
}

fn read(path: &Path) -> Result<Vec<u8>, ModuleError> {
    fs::read(path).map_err(|source| ModuleError::Read {
        path: path.to_owned(),
        source,
    })
}

fn read_text(path: &Path) -> Result<String, ModuleError> {
    fs::read_to_string(path).map_err(|source| ModuleError::Read {
        path: path.to_owned(),
        source,
    })
}
