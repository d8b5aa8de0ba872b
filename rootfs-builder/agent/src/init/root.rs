//! The root filesystem of the running guest: a small tmpfs stacked over the image.
//!
//! An initramfs is unpacked into `rootfs`, the bottom of the mount tree, and `pivot_root(2)` refuses to swap that
//! one out. Containers could do without (`MS_MOVE` and `chroot`, runc's `--no-pivot`), but then the guest's own
//! mounts stay reachable below a container's root, and a process that escapes its chroot finds them. So the agent
//! first stacks a tmpfs over the image, as switch_root does: it has a parent, every container can `pivot_root`,
//! and detaching the old root removes all of the guest's mounts from the container's mount namespace. It costs a
//! few mounts that would be made anyway; nothing is copied. A block device image takes the same path, so there is
//! one to test.
//!
//! The image itself stays below, read-only: `/proc/<pid>/exe` of the agent's helpers leads a container there, and
//! a writable agent binary would be the way out of CVE-2019-5736.

use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

use super::InitError;
use super::mounts::{make_directory, mount_all};

/// An empty folder of the image that the new root is built in.
const STAGING: &str = "/newroot";
const MODULES: &str = "lib/modules";

/// Builds the root with all its mounts and makes it `/`.
pub fn build_and_enter() -> Result<(), InitError> {
    let staging = Path::new(STAGING);
    if !staging.is_dir() {
        make_directory(staging)?;
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(
        Some("tmpfs"),
        staging,
        Some("tmpfs"),
        flags,
        Some("mode=0755,size=16m"),
    )
    .map_err(|source| InitError::Mount {
        fstype: "tmpfs",
        target: staging.to_owned(),
        source,
    })?;
    mount_all(staging)?;
    make_directory(&staging.join("etc"))?;
    keep_modules(staging)?;

    let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(None::<&str>, "/", None::<&str>, read_only, None::<&str>).map_err(InitError::SwitchRoot)?;
    chdir(staging).map_err(InitError::SwitchRoot)?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(InitError::SwitchRoot)?;
    chroot(".").map_err(InitError::SwitchRoot)?;
    chdir("/").map_err(InitError::SwitchRoot)
}

/// Modules can be asked for later (`CreateSandbox.kernel_modules`).
fn keep_modules(staging: &Path) -> Result<(), InitError> {
    let source = Path::new("/").join(MODULES);
    if !source.is_dir() {
        return Ok(());
    }
    let target = staging.join(MODULES);
    make_directory(&target)?;
    mount(
        Some(&source),
        &target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .map_err(|source| InitError::Mount {
        fstype: "bind",
        target,
        source,
    })
}
