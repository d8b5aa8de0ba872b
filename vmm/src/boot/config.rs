//! What to boot.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Kernel, initramfs and command line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootConfig {
    /// ELF vmlinux (64-bit entry or PVH note) or bzImage.
    pub kernel: PathBuf,
    /// initramfs, any format the guest kernel understands.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Folder of the cache of kernels taken out of bzImages.
    pub cache_dir: PathBuf,
}
