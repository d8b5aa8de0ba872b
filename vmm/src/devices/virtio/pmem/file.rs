//! The file behind the device, before it is in guest memory.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;

use super::config::PmemConfig;
use crate::devices::virtio::image_lock;
use crate::devices::virtio::state::StateError;
use crate::memory::layout::WINDOW_ALIGN;
use crate::memory::window::{FileMapping, FilePlace, Sharing, WindowError, Windows};

/// What sizes are rounded up to: Linux maps persistent memory in subsections (include/linux/mmzone.h, SUBSECTION_SIZE).
pub(super) const ALIGN: u64 = 2 << 20;
/// Largest file: 1 TiB, the largest window.
const MAX_BYTES: u64 = 1 << 40;

/// A file that cannot be persistent memory.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// The file cannot be opened.
    #[error("pmem {id}: cannot open {path:?} {mode}: {source}")]
    Open {
        /// Device id.
        id: String,
        /// The file.
        path: PathBuf,
        /// `read-only` or `read-write`.
        mode: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("pmem {id}: {path:?} is neither a regular file nor a block device")]
    Type {
        /// Device id.
        id: String,
        /// The file.
        path: PathBuf,
    },
    /// No bytes, or more than a window can hold.
    #[error("pmem {id}: {path:?} has {size} bytes, need 1 to {MAX_BYTES}")]
    Size {
        /// Device id.
        id: String,
        /// The file.
        path: PathBuf,
        /// Size in bytes.
        size: u64,
    },
    /// Somebody else writes the file, or uses it while we want to write it.
    #[error("pmem {id}: {path:?} is in use by another virtual machine or process")]
    Locked {
        /// Device id.
        id: String,
        /// The file.
        path: PathBuf,
    },
    /// It is not the file of a saved device.
    #[error(transparent)]
    State(#[from] StateError),
    /// It does not fit into guest memory.
    #[error("pmem {id}: {source}")]
    Window {
        /// Device id.
        id: String,
        /// Cause.
        source: WindowError,
    },
}

/// An open and locked file.
#[derive(Debug)]
pub struct PmemFile {
    config: PmemConfig,
    file: File,
    size: u64,
}

impl PmemFile {
    /// Opens the file and locks it as disks are: many readers or one writer, by open file description, until it is closed.
    ///
    /// # Errors
    /// [`PmemError`].
    pub fn open(config: &PmemConfig) -> Result<Self, PmemError> {
        let (id, path) = (config.id.clone(), config.path.clone());
        let open_error = |source| PmemError::Open {
            id: id.clone(),
            path: path.clone(),
            mode: if config.read_only {
                "read-only"
            } else {
                "read-write"
            },
            source,
        };
        // O_NONBLOCK: opening a FIFO by mistake must not hang. It has no meaning for files and disks.
        let mut file = OpenOptions::new()
            .read(true)
            .write(!config.read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .map_err(open_error)?;
        let file_type = file.metadata().map_err(open_error)?.file_type();
        if !file_type.is_file() && !file_type.is_block_device() {
            return Err(PmemError::Type { id, path });
        }
        lock(&file, config)?;
        // Works for block devices, whose metadata has no size.
        let size = file.seek(SeekFrom::End(0)).map_err(open_error)?;
        if size == 0 || size > MAX_BYTES {
            return Err(PmemError::Size { id, path, size });
        }
        Ok(Self {
            config: config.clone(),
            file,
            size,
        })
    }

    /// Device id.
    pub fn id(&self) -> &str {
        &self.config.id
    }

    /// What it takes of the window, in bytes.
    pub fn window_bytes(&self) -> u64 {
        self.size.next_multiple_of(WINDOW_ALIGN)
    }

    /// Size of the device, in bytes.
    pub(super) fn device_size(&self) -> u64 {
        self.size.next_multiple_of(ALIGN)
    }

    /// Maps it into the window. Returns the mapping, the file and whether the guest's writes stay out of it.
    pub(super) fn map(
        self,
        windows: &Windows,
        place: FilePlace,
    ) -> Result<(FileMapping, File, bool), PmemError> {
        let read_only = self.config.read_only;
        let sharing = if read_only {
            Sharing::Private
        } else {
            Sharing::Shared
        };
        let sizes = (self.size, self.device_size());
        let mapping = windows
            .pmem()
            .and_then(|window| window.map_file(&self.file, sizes, place, sharing));
        let mapping = mapping.map_err(|source| PmemError::Window {
            id: self.config.id,
            source,
        })?;
        Ok((mapping, self.file, read_only))
    }
}

fn lock(file: &File, config: &PmemConfig) -> Result<(), PmemError> {
    match image_lock::lock(file, config.read_only) {
        Ok(true) => {}
        Ok(false) => {
            return Err(PmemError::Locked {
                id: config.id.clone(),
                path: config.path.clone(),
            });
        }
        Err(error) => {
            tracing::warn!(device = %config.id, path = ?config.path, %error, "pmem: the file system has no locks");
        }
    }
    Ok(())
}
