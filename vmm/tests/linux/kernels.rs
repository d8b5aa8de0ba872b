//! The kernels every user may bring: ours, and Debian's as they come.

use std::path::{Path, PathBuf};

use dragonball::config::{ConsoleConfig, VmConfig};

use crate::guest::Scratch;
use crate::guest::initramfs::{self, Extras};
use crate::{CMDLINE, kernel};

/// A guest kernel and what makes it find our devices.
#[derive(Debug)]
pub struct Kernel {
    /// `ours`, or the name of the folder.
    pub name: String,
    /// vmlinux or bzImage.
    pub image: PathBuf,
    extras: Extras,
}

impl Kernel {
    /// Ours has all drivers built in.
    pub fn ours() -> Self {
        Self {
            name: "ours".to_owned(),
            image: kernel(),
            extras: Extras::default(),
        }
    }

    fn stock(folder: &Path) -> Self {
        Self {
            name: folder
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            image: folder.join("vmlinuz"),
            extras: Extras {
                modules: initramfs::stock_modules(&folder.join("modules")),
                ..Extras::default()
            },
        }
    }

    /// A machine that boots this kernel, loads what it needs and runs `script`.
    pub fn config(&self, scratch: &Scratch, script: &str, console: ConsoleConfig) -> VmConfig {
        let mut config = crate::config(scratch, "");
        config.id.clone_from(&self.name);
        config.boot.kernel.clone_from(&self.image);
        config.boot.initramfs = Some(initramfs::build_with(scratch, &self.extras, script));
        if console == ConsoleConfig::Serial {
            config.boot.cmdline = CMDLINE.replace("hvc0", "ttyS0");
        }
        config.console = console;
        config
    }
}

/// The stock kernels, the newest first. Without any a test would say it passed and have tried nothing.
pub fn stock() -> Vec<Kernel> {
    let folders = std::env::var("DRAGONBALL_STOCK").expect("DRAGONBALL_STOCK names folders of stock kernels");
    folders
        .split(':')
        .map(|folder| Kernel::stock(Path::new(folder)))
        .collect()
}

/// Our kernel and the stock ones.
pub fn all() -> Vec<Kernel> {
    std::iter::once(Kernel::ours()).chain(stock()).collect()
}
