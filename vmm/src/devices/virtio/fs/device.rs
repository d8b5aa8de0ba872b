//! Features, configuration space and activation.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use super::share::Share;
use super::worker::FsWorkers;
use crate::config::FsConfig;
use crate::devices::virtio::served_queue::ServedQueue;
use crate::devices::virtio::state::{self, QueuePosition, StateError};
use crate::devices::virtio::{ActivateError, Activation, CHAIN_FEATURES, VirtioDevice, read_space};

/// hiprio (FORGET, INTERRUPT) and the request queues. All threads serve all queues, so one request queue is as
/// parallel as many; Linux before 6.10 uses no more anyway. A request of 256 pages needs 260 descriptors.
const QUEUE_SIZES: [u16; 2] = [128, 1024];
/// `struct virtio_fs_config`: tag[36], num_request_queues (5.11.4).
const CONFIG_BYTES: usize = 40;
const TAG_BYTES: usize = 36;
const REQUEST_QUEUES: u32 = QUEUE_SIZES.len() as u32 - 1;
/// Descriptors left to the rest of the process.
const RESERVED_FDS: u64 = 1024;

/// A share that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The shared directory cannot be opened, or is none.
    #[error("share {id}: cannot open directory {path:?}: {source}")]
    Directory {
        /// Device id.
        id: String,
        /// The shared directory.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Something else of the host is missing.
    #[error("share {id}: {what}: {source}")]
    Host {
        /// Device id.
        id: String,
        /// What was attempted.
        what: &'static str,
        /// Cause.
        source: io::Error,
    },
}

/// A shared directory.
#[derive(Debug)]
pub struct Fs {
    config: FsConfig,
    space: [u8; CONFIG_BYTES],
    root: OwnedFd,
    proc_fds: OwnedFd,
    fd_limit: usize,
    workers: Option<FsWorkers>,
}

impl Fs {
    /// Opens the shared directory; it is this directory from now on, wherever it is moved.
    ///
    /// The guest makes the process hold one descriptor for every file in its dentry cache. The soft limit of open files
    /// of the whole process is therefore raised to the hard one; the guest gets ENFILE when less than a reserve is
    /// left.
    ///
    /// # Errors
    /// [`FsError`] when the directory or `/proc/self/fd` cannot be opened.
    pub fn new(config: &FsConfig) -> Result<Self, FsError> {
        let id = &config.id;
        let root = open_directory(&config.shared_dir).map_err(|source| FsError::Directory {
            id: id.clone(),
            path: config.shared_dir.clone(),
            source,
        })?;
        let host = |what| {
            move |source| FsError::Host {
                id: id.clone(),
                what,
                source,
            }
        };
        let proc_fds =
            open_directory(Path::new("/proc/self/fd")).map_err(host("cannot open /proc/self/fd"))?;
        let limit = raise_fd_limit().map_err(host("cannot read the limit of open files"))?;
        let mut space = [0; CONFIG_BYTES];
        let (tag, queues) = space.split_at_mut(TAG_BYTES);
        for (to, from) in tag.iter_mut().zip(config.tag.bytes()) {
            *to = from;
        }
        queues.copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        let fd_limit = limit.saturating_sub(RESERVED_FDS).max(limit / 2);
        Ok(Self {
            config: config.clone(),
            space,
            root,
            proc_fds,
            fd_limit: usize::try_from(fd_limit).unwrap_or(usize::MAX),
            workers: None,
        })
    }

    fn start(&self, activation: Activation) -> io::Result<FsWorkers> {
        let Activation {
            memory,
            queues,
            interrupt,
            ..
        } = activation;
        let id = &self.config.id;
        let queues = queues
            .into_iter()
            .map(|queue| ServedQueue::new(id, queue, memory.clone(), interrupt.clone()))
            .collect();
        let (root, proc_fds) = (self.root.try_clone()?, self.proc_fds.try_clone()?);
        let share = Share::new(root, proc_fds, self.config.cache, self.fd_limit)?;
        FsWorkers::spawn(id, self.config.threads, share, queues, memory)
    }
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    Ok(File::options().read(true).custom_flags(flags).open(path)?.into())
}

/// Raises the soft limit of open files to the hard one and returns it.
fn raise_fd_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` has room for the answer.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let soft = limit.rlim_cur;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is valid during the call.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } == 0 {
        return Ok(limit.rlim_max);
    }
    Ok(soft)
}

impl VirtioDevice for Fs {
    fn id(&self) -> &str {
        &self.config.id
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        CHAIN_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        for index in 0..QUEUE_SIZES.len() {
            if !activation.queues.iter().any(|queue| queue.index == index) {
                return Err(ActivateError::QueueMissing {
                    device: self.config.id.clone(),
                    index,
                });
            }
        }
        let workers = self.start(activation).map_err(|source| ActivateError::Host {
            device: self.config.id.clone(),
            what: "cannot start the worker threads",
            source,
        })?;
        self.workers = Some(workers);
        Ok(())
    }

    fn reset(&mut self) {
        self.suspend();
    }

    fn suspend(&mut self) -> Vec<QueuePosition> {
        self.workers.take().map(FsWorkers::stop).unwrap_or_default()
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        Err(StateError::Unsupported {
            device: self.config.id.clone(),
            reason: "the guest's open files and inodes of a share are not saved".to_owned(),
        })
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        state::expect_none(&self.config.id, state)
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.reset();
    }
}
