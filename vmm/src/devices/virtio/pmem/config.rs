//! The knobs of persistent memory.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Pmem, PmemFile};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::config::{KnobError, Knobs, OpenError, Opened};
use crate::memory::window::Windows;

/// A file as persistent memory, `/dev/pmemN` in the guest. Its pages in the host's page cache are the guest's memory, shared
/// by all VMs that have the file; a file system mounted with `-o dax` needs no page cache of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemConfig {
    /// Device id.
    pub id: String,
    /// A regular file or block device. Its size is rounded up to 2 MiB, with zeros that are not in the file. It must not
    /// become shorter while a VM has it.
    pub path: PathBuf,
    /// The guest's writes never reach the file: they stay in this VM, each in a page of its own, and are forgotten with
    /// it.
    pub read_only: bool,
}

impl Knobs for PmemConfig {
    fn id(&self) -> &str {
        &self.id
    }

    fn validate(&self) -> Result<(), KnobError> {
        Ok(())
    }

    fn open(&self) -> Result<Box<dyn Opened>, OpenError> {
        Ok(Box::new(PmemFile::open(self)?))
    }
}

impl Opened for PmemFile {
    fn id(&self) -> &str {
        PmemFile::id(self)
    }

    fn pmem_bytes(&self) -> u64 {
        self.window_bytes()
    }

    /// The device must get its place in guest memory.
    fn connect(self: Box<Self>, windows: &Windows) -> Result<Box<dyn VirtioDevice>, OpenError> {
        Ok(Box::new(Pmem::new(*self, windows)?))
    }

    fn connect_again(
        self: Box<Self>,
        windows: &Windows,
        state: &[u8],
    ) -> Result<Box<dyn VirtioDevice>, OpenError> {
        Ok(Box::new(Pmem::at_saved_place(*self, windows, state)?))
    }
}
