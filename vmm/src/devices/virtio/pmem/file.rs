//! The file behind the device, before it is in guest memory.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use super::config::PmemConfig;
use crate::devices::virtio::config::{OpenError, OpenErrorKind};
use crate::devices::virtio::image::{self, ImageError};
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
    /// The file cannot be opened, is none, or is in use.
    #[error("pmem {id}: {source}")]
    Image {
        /// Device id.
        id: String,
        /// What is wrong with it.
        source: ImageError,
    },
    /// The size cannot be read.
    #[error("pmem {id}: {path:?}: its size: {source}")]
    Measure {
        /// Device id.
        id: String,
        /// The file.
        path: PathBuf,
        /// Cause.
        source: io::Error,
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

impl From<PmemError> for OpenError {
    fn from(error: PmemError) -> Self {
        let kind = match &error {
            PmemError::Image { source, .. } => source.kind(),
            PmemError::Measure { source, .. } => OpenErrorKind::of(source),
            PmemError::Size { .. } | PmemError::State(_) => OpenErrorKind::Unfit,
            PmemError::Window { source, .. } => match source {
                WindowError::Full { .. } => OpenErrorKind::Exhausted,
                WindowError::Host { source, .. } => OpenErrorKind::of(source),
                WindowError::Missing(_) | WindowError::Range { .. } => OpenErrorKind::Unfit,
            },
        };
        Self::new(kind, error)
    }
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
        let opened = image::open(&id, &path, config.read_only);
        let file = opened.map_err(|source| PmemError::Image {
            id: id.clone(),
            source,
        })?;
        let size = image::size(&file).map_err(|source| PmemError::Measure {
            id: id.clone(),
            path: path.clone(),
            source,
        })?;
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
