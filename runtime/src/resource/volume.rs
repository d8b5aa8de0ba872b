//! A container's mounts: what the guest makes itself, what is shared from the host, what cannot be had and is refused.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use oci_spec::runtime::{Mount as OciMount, Spec};
use protocols::agent::{Device, Storage};

use super::device_manager::DeviceManager;
use super::share_fs::ShareFsMount;
use crate::error::{Error, ErrorKind, Result};
use crate::host::bind::{Bind, Propagation, ReadOnly};
use crate::host::{blocking, mounts};
use crate::paths::GUEST_SANDBOX;

/// Default size of a pod's /dev/shm, bytes.
pub const DEFAULT_SHM_SIZE: u64 = 64 << 20;

/// A mount of a container.
#[async_trait]
pub trait Volume: Send + Sync {
    /// The mount as the guest's spec has it; `None` drops it.
    fn get_volume_mount(&self) -> Option<OciMount>;
    /// What the agent has to mount for it.
    fn get_storage(&self) -> Option<Storage>;
    /// The device it is or is on, for the agent.
    fn get_device(&self) -> Option<Device> {
        None
    }
    /// Whether the guest may write to it, and what it writes is somebody's when the guest is gone.
    fn takes_writes(&self) -> bool;
    /// Takes it away from the guest. Idempotent.
    ///
    /// # Errors
    /// Naming the mount that stays.
    async fn cleanup(&self, devices: &DeviceManager) -> Result<()>;
}

/// All mounts of a container.
#[derive(Default)]
pub struct Volumes {
    volumes: Vec<Box<dyn Volume>>,
}

impl Volumes {
    /// Sets up every mount of `spec`.
    ///
    /// # Errors
    /// Naming the mount that is missing or not supported; nothing is left shared or attached then.
    pub async fn new(
        share: Arc<dyn ShareFsMount>,
        devices: &DeviceManager,
        sandbox_id: &str,
        container: &str,
        spec: &Arc<Spec>,
    ) -> Result<Self> {
        let (looked_at, sandbox) = (spec.clone(), sandbox_id.to_owned());
        let kinds = blocking("volumes", move || {
            let mounts = looked_at.mounts().iter().flatten();
            Ok(mounts.map(|mount| classify(mount, &sandbox)).collect::<Vec<_>>())
        });
        let mut volumes = Self::default();
        for (index, (mount, kind)) in spec.mounts().iter().flatten().zip(kinds.await?).enumerate() {
            let volume = match kind {
                Ok(kind) => set_up(&share, container, index, mount, kind).await,
                Err(error) => Err(error),
            };
            match volume {
                Ok(volume) => volumes.volumes.push(volume),
                Err(error) => {
                    volumes.cleanup(devices).await;
                    return Err(named(error, mount, container));
                }
            }
        }
        Ok(volumes)
    }

    /// The mounts for the guest's spec.
    pub fn mounts(&self) -> Vec<OciMount> {
        self.volumes
            .iter()
            .filter_map(|volume| volume.get_volume_mount())
            .collect()
    }

    /// What the agent has to mount first.
    pub fn storages(&self) -> Vec<Storage> {
        self.volumes
            .iter()
            .filter_map(|volume| volume.get_storage())
            .collect()
    }

    /// Whether one of them takes writes that outlive the guest.
    pub fn take_writes(&self) -> bool {
        self.volumes.iter().any(|volume| volume.takes_writes())
    }

    /// Devices the agent hands on to the container.
    pub fn devices(&self) -> Vec<Device> {
        self.volumes
            .iter()
            .filter_map(|volume| volume.get_device())
            .collect()
    }

    /// Takes all of them away; what stays is logged and left to the journal.
    pub async fn cleanup(&self, devices: &DeviceManager) {
        for volume in self.volumes.iter().rev() {
            if let Err(error) = volume.cleanup(devices).await {
                tracing::warn!(%error, "volume");
            }
        }
    }
}

/// Checks every mount of `spec` without setting anything up: before a VM is booted for it.
///
/// # Errors
/// As [`Volumes::new`].
pub fn check(sandbox_id: &str, container: &str, spec: &Spec) -> Result<()> {
    spec.mounts().iter().flatten().try_for_each(|mount| {
        classify(mount, sandbox_id)
            .map(drop)
            .map_err(|error| named(error, mount, container))
    })
}

fn named(error: Error, mount: &OciMount, container: &str) -> Error {
    let destination = mount.destination().display();
    error.context(format!("mount {destination} of container {container}"))
}

/// What becomes of a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// The guest makes it from nothing: proc, tmpfs and the like, or binds its own file.
    Guest,
    /// The pod's shared memory.
    Shm,
    /// Bind of a host file or folder.
    Share { source: PathBuf, how: Bind },
}

/// Devices that every kernel has by itself, the guest's as well as the host's.
const KERNEL_DEVICES: [&str; 10] = [
    "null", "zero", "full", "random", "urandom", "tty", "console", "ptmx", "fuse", "net/tun",
];

/// Filesystems the guest makes from nothing.
const GUEST_FILESYSTEMS: [&str; 11] = [
    "proc",
    "sysfs",
    "tmpfs",
    "devpts",
    "mqueue",
    "cgroup",
    "cgroup2",
    "securityfs",
    "debugfs",
    "tracefs",
    "bpf",
];

fn classify(mount: &OciMount, sandbox_id: &str) -> Result<Kind> {
    let options = mount.options().as_deref().unwrap_or_default();
    let option = |name: &str| options.iter().any(|option| option == name);
    let fs_type = mount.typ().as_deref().unwrap_or_default();
    if !(fs_type == "bind" || option("bind") || option("rbind")) {
        return if GUEST_FILESYSTEMS.contains(&fs_type) {
            Ok(Kind::Guest)
        } else {
            refused(format!(
                "filesystem type {fs_type:?} is not supported inside the VM; bind-mount a host folder instead"
            ))
        };
    }
    let source = mount.source().clone().unwrap_or_default();
    if mount.destination() == Path::new("/dev/shm") && is_sandbox_shm(&source, sandbox_id) {
        return Ok(Kind::Shm);
    }
    // /proc and /sys of the host would show the wrong kernel: the guest's own are bound.
    if source.starts_with("/proc") || source.starts_with("/sys") {
        return Ok(Kind::Guest);
    }
    if let Some(own) = device(&source)? {
        return Ok(own);
    }
    if mount.uid_mappings().is_some() || mount.gid_mappings().is_some() {
        return refused("id-mapped mounts are not supported: files would have the wrong owners".into());
    }
    if let Some(shared) = ["shared", "rshared"].iter().find(|name| option(name)) {
        return refused(format!(
            "propagation {shared}: what is mounted inside the VM cannot appear on the host; use rslave"
        ));
    }
    let how = Bind {
        recursive: !option("bind"),
        read_only: if option("rro") {
            ReadOnly::All
        } else if option("ro") {
            ReadOnly::Top
        } else {
            ReadOnly::No
        },
        propagation: if option("rslave") || option("slave") {
            Propagation::Slave
        } else {
            Propagation::Private
        },
    };
    Ok(Kind::Share { source, how })
}

fn refused<T>(message: String) -> Result<T> {
    Err(Error::new(ErrorKind::Unimplemented, message))
}

/// What a source that is no ordinary file or folder becomes; `None` for those that can be shared.
///
/// # Errors
/// `NotFound` for one that does not exist, `Unimplemented` for those whose data would silently be someone else's.
fn device(source: &Path) -> Result<Option<Kind>> {
    let metadata = fs::metadata(source).map_err(|error| {
        let kind = if error.kind() == std::io::ErrorKind::NotFound {
            ErrorKind::NotFound
        } else {
            ErrorKind::Internal
        };
        Error::new(kind, format!("source {}: {error}", source.display()))
    })?;
    let file_type = metadata.file_type();
    let shown = source.display();
    // Kata's meaning of the whole folder: the devices of the container's own kernel.
    let kernels_own = source == Path::new("/dev")
        || KERNEL_DEVICES
            .iter()
            .any(|name| source == Path::new("/dev").join(name));
    if kernels_own {
        tracing::debug!(source = %shown, "the guest's own device is mounted");
        return Ok(Some(Kind::Guest));
    }
    if file_type.is_block_device() {
        return refused(format!(
            "source {shown} is a block device, which is not passed to the guest; mount its filesystem on the host and \
             bind-mount that"
        ));
    }
    if file_type.is_char_device() {
        return refused(format!(
            "source {shown} is a device of the host, which is not passed to the guest"
        ));
    }
    if file_type.is_socket() || file_type.is_fifo() {
        return refused(format!(
            "source {shown} is a socket or FIFO: its other end on the host cannot be reached from inside the VM"
        ));
    }
    if file_type.is_dir() && fs::metadata("/dev").is_ok_and(|devices| devices.dev() == metadata.dev()) {
        return refused(format!(
            "source {shown} is a folder of devices of the host, which are not passed to the guest"
        ));
    }
    Ok(None)
}

/// Whether `source` is the shared memory that the CRI (`…/sandboxes/<id>/shm`), CRI-O (`…/<id>/userdata/shm`) or Docker
/// (`…/containers/<id>/mounts/shm`) makes for the sandbox. Anything else on /dev/shm is a volume like others.
fn is_sandbox_shm(source: &Path, sandbox_id: &str) -> bool {
    source.file_name().is_some_and(|name| name == "shm")
        && source.components().any(|part| part.as_os_str() == sandbox_id)
}

/// Whether something is mounted below `source`, or may come to be, that is shared with it and not read-only as it is.
fn writable_below(source: &Path, how: Bind) -> Result<bool> {
    Ok(how.read_only == ReadOnly::Top
        && how.recursive
        && (how.propagation == Propagation::Slave || mounts::has_mounts_below(source)?))
}

/// The options of a shared mount for the guest, where the share is one mount whatever is mounted below.
fn guest_options(options: &[String], writable_below: bool) -> Vec<String> {
    // `ro` of the top mount would be one of everything below it in the guest. The host's mount refuses to be written.
    let options = options
        .iter()
        .filter(|option| !(writable_below && *option == "ro"));
    let plain = options.map(|option| match option.as_str() {
        // Recursive attributes (mount_setattr(2)): there is one mount to set them on.
        "rro" | "rrw" | "rnosuid" | "rsuid" | "rnodev" | "rdev" | "rnoexec" | "rexec" | "rnodiratime"
        | "rdiratime" | "rrelatime" | "rnorelatime" | "rnoatime" | "ratime" | "rstrictatime"
        | "rnostrictatime" => option[1..].to_owned(),
        other => other.to_owned(),
    });
    plain.collect()
}

async fn set_up(
    share: &Arc<dyn ShareFsMount>,
    container: &str,
    index: usize,
    mount: &OciMount,
    kind: Kind,
) -> Result<Box<dyn Volume>> {
    match kind {
        Kind::Guest => Ok(Box::new(GuestVolume { mount: mount.clone() })),
        Kind::Shm => {
            let mut mount = mount.clone();
            mount.set_typ(Some("bind".into()));
            mount.set_source(Some(format!("{GUEST_SANDBOX}/shm").into()));
            mount.set_options(Some(vec!["rbind".into()]));
            Ok(Box::new(GuestVolume { mount }))
        }
        Kind::Share { source, how } => {
            // Kata's naming: container, something unique, and the name people know it by.
            let base = mount
                .destination()
                .file_name()
                .map_or("root".into(), |name| name.to_string_lossy());
            let name = format!("{container}-{index:08x}-{base}");
            let options = mount.options().clone().unwrap_or_default();
            let (writable_below, guest_path) = {
                let (share, name) = (share.clone(), name.clone());
                blocking("share", move || {
                    let writable_below = writable_below(&source, how)?;
                    Ok((writable_below, share.share_volume(&name, &source, how)?))
                })
                .await?
            };
            let mut mount = mount.clone();
            mount.set_options(Some(guest_options(&options, writable_below)));
            mount.set_typ(Some("bind".into()));
            mount.set_source(Some(guest_path.into()));
            Ok(Box::new(ShareFsVolume {
                share: share.clone(),
                name,
                mount,
                takes_writes: how.read_only == ReadOnly::No || writable_below,
            }))
        }
    }
}

struct GuestVolume {
    mount: OciMount,
}

#[async_trait]
impl Volume for GuestVolume {
    fn get_volume_mount(&self) -> Option<OciMount> {
        Some(self.mount.clone())
    }
    fn get_storage(&self) -> Option<Storage> {
        None
    }
    /// It goes with the guest.
    fn takes_writes(&self) -> bool {
        false
    }
    async fn cleanup(&self, _devices: &DeviceManager) -> Result<()> {
        Ok(())
    }
}

struct ShareFsVolume {
    share: Arc<dyn ShareFsMount>,
    name: String,
    mount: OciMount,
    takes_writes: bool,
}

#[async_trait]
impl Volume for ShareFsVolume {
    fn get_volume_mount(&self) -> Option<OciMount> {
        Some(self.mount.clone())
    }
    fn get_storage(&self) -> Option<Storage> {
        None
    }
    fn takes_writes(&self) -> bool {
        self.takes_writes
    }
    async fn cleanup(&self, _devices: &DeviceManager) -> Result<()> {
        let (share, name) = (self.share.clone(), self.name.clone());
        blocking("volume", move || share.umount_volume(&name)).await
    }
}

/// Size of the pod's shared memory: that of the host folder the CRI made for it, or the default.
pub fn shm_size(spec: &Spec, sandbox_id: &str) -> u64 {
    let bound = spec
        .mounts()
        .iter()
        .flatten()
        .find(|mount| mount.destination() == Path::new("/dev/shm"));
    let source = bound
        .and_then(|mount| mount.source().as_ref())
        .filter(|source| is_sandbox_shm(source, sandbox_id));
    let Some(source) = source else {
        return DEFAULT_SHM_SIZE;
    };
    match nix::sys::statfs::statfs(source) {
        Ok(stat) if stat.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC => {
            stat.blocks() * u64::try_from(stat.block_size()).unwrap_or(4096)
        }
        _ => DEFAULT_SHM_SIZE,
    }
}

/// The pod's shared memory, for CreateSandbox.
pub(super) fn shm_storage(size: u64) -> Storage {
    Storage {
        driver: "ephemeral".into(),
        source: "shm".into(),
        fstype: "tmpfs".into(),
        options: ["noexec", "nosuid", "nodev", "mode=1777", &format!("size={size}")]
            .map(String::from)
            .into(),
        mount_point: format!("{GUEST_SANDBOX}/shm"),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(destination: &str, fs_type: &str, source: &str, options: &[&str]) -> OciMount {
        let mut mount = OciMount::default();
        mount.set_destination(destination.into());
        mount.set_typ(Some(fs_type.into()));
        mount.set_source(Some(source.into()));
        mount.set_options(Some(options.iter().map(|option| (*option).to_owned()).collect()));
        mount
    }

    /// Id of the sandbox in these tests.
    const SANDBOX: &str = "s1";

    #[test]
    fn mounts_when_classified_are_made_or_shared() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let share = |recursive, read_only, propagation| Kind::Share {
            source: path.into(),
            how: Bind {
                recursive,
                read_only,
                propagation,
            },
        };
        use Propagation::{Private, Slave};
        for (mount, expected) in [
            (mount("/proc", "proc", "proc", &["nosuid"]), Kind::Guest),
            (mount("/dev", "tmpfs", "tmpfs", &["mode=755"]), Kind::Guest),
            (mount("/dev/shm", "tmpfs", "shm", &["size=65536k"]), Kind::Guest),
            (mount("/sys/fs/cgroup", "cgroup", "cgroup", &["ro"]), Kind::Guest),
            (
                mount("/data", "bind", path, &["rbind", "rw"]),
                share(true, ReadOnly::No, Private),
            ),
            (
                mount("/data", "none", path, &["bind", "ro"]),
                share(false, ReadOnly::Top, Private),
            ),
            (
                mount("/data", "bind", path, &["rbind", "rro"]),
                share(true, ReadOnly::All, Private),
            ),
            (
                mount("/data", "bind", path, &["rbind", "ro", "rslave"]),
                share(true, ReadOnly::Top, Slave),
            ),
            (mount("/host/proc", "bind", "/proc", &["rbind"]), Kind::Guest),
            (mount("/dev", "bind", "/dev", &["rbind"]), Kind::Guest),
            (mount("/dev/null", "bind", "/dev/null", &["bind"]), Kind::Guest),
        ] {
            assert_eq!(classify(&mount, SANDBOX).unwrap(), expected, "{mount:?}");
        }
    }

    #[test]
    fn dev_shm_when_its_source_is_the_pods_is_the_pods() {
        let folder = tempfile::tempdir().unwrap();
        for (path, pods) in [
            ("sandboxes/s1/shm", true),
            ("s1/userdata/shm", true),
            ("containers/s1/mounts/shm", true),
            ("sandboxes/s2/shm", false),
            ("pods/uid/volumes/kubernetes.io~empty-dir/shm", false),
            ("s1/memory", false),
        ] {
            let source = folder.path().join(path);
            fs::create_dir_all(&source).unwrap();
            let mount = mount("/dev/shm", "bind", source.to_str().unwrap(), &["rbind"]);
            assert_eq!(classify(&mount, SANDBOX).unwrap() == Kind::Shm, pods, "{path}");
        }
    }

    /// A file of every kind that cannot be had in the guest, and a word its refusal must have.
    fn foreign(folder: &Path) -> Vec<(PathBuf, &'static str)> {
        use nix::sys::stat::{Mode, SFlag, makedev, mknod};
        let node = |name: &str, kind, major, minor| {
            let path = folder.join(name);
            mknod(&path, kind, Mode::S_IRWXU, makedev(major, minor)).unwrap();
            path
        };
        let socket = folder.join("socket");
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        vec![
            (node("disk", SFlag::S_IFBLK, 7, 0), "block device"),
            (node("device", SFlag::S_IFCHR, 10, 232), "device of the host"),
            (node("fifo", SFlag::S_IFIFO, 0, 0), "FIFO"),
            (socket, "socket"),
            ("/dev/pts/..".into(), "folder of devices"),
        ]
    }

    #[test]
    fn source_when_it_would_not_be_the_hosts_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for (source, word) in foreign(folder.path()) {
            let mount = mount("/data", "bind", source.to_str().unwrap(), &["rbind"]);
            let mut spec = Spec::default();
            spec.set_mounts(Some(vec![mount]));

            let error = check(SANDBOX, "c1", &spec).unwrap_err();

            assert_eq!(error.kind, ErrorKind::Unimplemented, "{error}");
            let names_all = error.message.contains("mount /data of container c1")
                && error.message.contains(&*source.to_string_lossy());
            assert!(names_all && error.message.contains(word), "{error}");
        }
    }

    #[test]
    fn mount_when_it_cannot_be_had_is_named() {
        let error = classify(&mount("/data", "bind", "/nonexistent/x", &["rbind"]), SANDBOX).unwrap_err();
        assert_eq!(error.kind, ErrorKind::NotFound);
        assert!(error.message.contains("/nonexistent/x"), "{error}");

        let error = classify(&mount("/data", "nfs", "host:/x", &[]), SANDBOX).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unimplemented);
        assert!(error.message.contains("\"nfs\""), "{error}");

        let error = classify(&mount("/data", "bind", "/tmp", &["rbind", "rshared"]), SANDBOX).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Unimplemented);
        assert!(error.message.contains("rshared"), "{error}");
    }

    #[test]
    fn read_only_when_of_the_top_mount_leaves_those_below_writable() {
        let folder = tempfile::tempdir().unwrap();
        let options = ["rbind", "ro"].map(String::from);
        let of = |read_only, propagation| {
            let how = Bind {
                read_only,
                propagation,
                ..Bind::tree()
            };
            guest_options(&options, writable_below(folder.path(), how).unwrap())
        };
        assert_eq!(
            of(ReadOnly::Top, Propagation::Private),
            ["rbind", "ro"],
            "nothing below"
        );
        assert_eq!(
            of(ReadOnly::Top, Propagation::Slave),
            ["rbind"],
            "something may come"
        );

        let below = folder.path().join("below");
        fs::create_dir(&below).unwrap();
        crate::host::bind::bind_to_itself(&below).unwrap();
        assert_eq!(of(ReadOnly::Top, Propagation::Private), ["rbind"]);
        mounts::unmount(&below).unwrap();

        let options = ["rbind", "rro", "rnoexec", "rslave"].map(String::from);
        let how = Bind {
            read_only: ReadOnly::All,
            ..Bind::tree()
        };
        let all = guest_options(&options, writable_below(folder.path(), how).unwrap());
        assert_eq!(all, ["rbind", "ro", "noexec", "rslave"]);
    }

    #[test]
    fn shm_when_not_the_sandboxs_own_has_the_default_size() {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("s1/shm");
        fs::create_dir_all(&own).unwrap();
        let tmpfs = crate::types::Mount {
            fs_type: "tmpfs".into(),
            source: "shm".into(),
            options: vec!["size=1m".into()],
            ..Default::default()
        };
        mounts::mount_request(&tmpfs, &own).unwrap();
        let size = |mount| {
            let mut spec = Spec::default();
            spec.set_mounts(Some(vec![mount]));
            shm_size(&spec, SANDBOX)
        };
        let source = own.to_str().unwrap();
        assert_eq!(size(mount("/dev/shm", "bind", source, &["rbind"])), 1 << 20);
        assert_eq!(
            size(mount("/dev/shm", "tmpfs", "shm", &["size=1k"])),
            DEFAULT_SHM_SIZE
        );
        assert_eq!(
            size(mount("/dev/shm", "bind", "/nonexistent", &["rbind"])),
            DEFAULT_SHM_SIZE
        );
        mounts::unmount(&own).unwrap();
    }
}
