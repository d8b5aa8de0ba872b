//! Features, configuration space and activation.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_FS;

use super::config::{FsConfig, FsRoot, SharedDir};
use super::handle::FsHandle;
use super::mounts::{MAX_MOUNTS, Mount, Names, ROOT_MOUNT, Root};
use super::share::{Options, Share};
use super::state::FsState;
use super::waiting::{MAX_WAITING, Waiting};
use super::worker::{FsWorkers, Service, lock};
use crate::descriptors::Budget;
use crate::devices::virtio::config::{OpenError, OpenErrorKind};
use crate::devices::virtio::queue::served_queue::ServedQueue;
use crate::devices::virtio::state::{self, QueuePosition, StateError};
use crate::devices::virtio::{ActivateError, Activation, CHAIN_FEATURES, VirtioDevice, read_space};
use crate::rate_limiter::RateLimiter;

/// hiprio (FORGET, INTERRUPT) and the request queue, whose size is configured. All threads serve both, so one request
/// queue is as parallel as many; Linux before 6.10 uses no more anyway.
const QUEUES: usize = 2;
const HIPRIO_SIZE: u16 = 128;
/// `struct virtio_fs_config`: tag[36], num_request_queues (5.11.4).
const CONFIG_BYTES: usize = 40;
const TAG_BYTES: usize = 36;
const REQUEST_QUEUES: u32 = QUEUES as u32 - 1;

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
    /// More directories than one device can have.
    #[error("share {id}: {count} directories, at most {MAX_MOUNTS}")]
    TooManyShares {
        /// Device id.
        id: String,
        /// Configured directories.
        count: usize,
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

impl From<FsError> for OpenError {
    fn from(error: FsError) -> Self {
        let kind = match &error {
            FsError::Directory { source, .. } | FsError::Host { source, .. } => OpenErrorKind::of(source),
            FsError::TooManyShares { .. } => OpenErrorKind::Unfit,
        };
        Self::new(kind, error)
    }
}

/// A shared directory, or several.
#[derive(Debug)]
pub struct Fs {
    config: FsConfig,
    space: [u8; CONFIG_BYTES],
    queue_sizes: [u16; QUEUES],
    service: Arc<Service>,
    workers: Option<FsWorkers>,
}

impl Fs {
    /// Opens the shared directories; they are these directories from now on, wherever they are moved.
    ///
    /// What the guest knows costs memory, not descriptors; what it has open costs one each, and one more for every owner of
    /// fcntl locks. They come out of the process's [`Budget`]; when that is used up it gets ENFILE. (File handles would
    /// need a descriptor for every mount of the host, which keeps it busy, and do not exist on overlayfs, where container
    /// images are. Nor are they confined to a directory: open_by_handle_at(2) opens any file of the file system.)
    ///
    /// # Errors
    /// [`FsError`] when the directory or `/proc/self/fd` cannot be opened.
    pub fn new(config: &FsConfig) -> Result<Self, FsError> {
        let id = &config.id;
        let root = open_root(config)?;
        let host = |what| {
            move |source| FsError::Host {
                id: id.clone(),
                what,
                source,
            }
        };
        let proc_fds =
            open_directory(Path::new("/proc/self/fd")).map_err(host("cannot open /proc/self/fd"))?;
        let mut space = [0; CONFIG_BYTES];
        let (tag, queues) = space.split_at_mut(TAG_BYTES);
        for (to, from) in tag.iter_mut().zip(config.tag.bytes()) {
            *to = from;
        }
        queues.copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        let options = Options {
            cache: config.cache,
            writeback: config.writeback,
            xattr: config.xattr,
        };
        let share = Share::new(root, proc_fds, options, Budget::of_process())
            .map_err(host("cannot look at the directory"))?;
        let limiter = RateLimiter::new(&config.rate_limiter).map_err(host("cannot create a timer"))?;
        Ok(Self {
            config: config.clone(),
            space,
            queue_sizes: [HIPRIO_SIZE, config.queue_size],
            service: Arc::new(Service::new(share, limiter)),
            workers: None,
        })
    }

    /// The host's side of the device, usable from any thread for as long as it exists.
    pub fn handle(&self) -> FsHandle {
        FsHandle::new(self.config.id.clone(), self.service.clone())
    }

    fn start(&self, activation: Activation) -> io::Result<FsWorkers> {
        let Activation {
            memory,
            queues,
            interrupt,
            confinement,
            ..
        } = activation;
        let id = &self.config.id;
        let queues = queues
            .into_iter()
            .map(|queue| ServedQueue::new(id, queue, memory.clone(), interrupt.clone()))
            .collect();
        FsWorkers::spawn(
            (id, confinement),
            self.config.threads,
            self.service.clone(),
            queues,
            memory,
        )
    }
}

fn open_root(config: &FsConfig) -> Result<Root, FsError> {
    let open = |id, name: &str, dir: &SharedDir| {
        let fd = open_directory(&dir.path).map_err(|source| FsError::Directory {
            id: config.id.clone(),
            path: dir.path.clone(),
            source,
        })?;
        let mount = Mount::new(id, name.to_owned(), dir.path.clone(), dir.read_only, fd);
        Ok(Arc::new(mount))
    };
    match &config.root {
        FsRoot::Directory(dir) => Ok(Root::Directory(open(ROOT_MOUNT, "", dir)?)),
        FsRoot::Shares(shares) if shares.len() > MAX_MOUNTS => Err(FsError::TooManyShares {
            id: config.id.clone(),
            count: shares.len(),
        }),
        FsRoot::Shares(shares) => {
            let mut names = Names::default();
            for (name, dir) in shares {
                let id = names.next_id();
                names.insert(open(id, name, dir)?);
            }
            Ok(Root::Names(names))
        }
    }
}

pub(super) fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    Ok(File::options().read(true).custom_flags(flags).open(path)?.into())
}

impl VirtioDevice for Fs {
    fn id(&self) -> &str {
        &self.config.id
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        CHAIN_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.space, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        for index in 0..QUEUES {
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
        lock(&self.service.waiting).clear();
        self.service.share.forget_guest();
    }

    fn suspend(&mut self) -> Vec<QueuePosition> {
        self.workers.take().map(FsWorkers::stop).unwrap_or_default()
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let limiter = lock(&self.service.limiter).state();
        let id = &self.config.id;
        let waiting = lock(&self.service.waiting);
        let waiting = waiting.iter().map(|request| (request.queue, request.head));
        let state = super::state::save(id, &self.service.share, limiter, waiting.collect())?;
        state::encode(id, &state)
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), StateError> {
        let state: FsState = state::decode(&self.config.id, state)?;
        lock(&self.service.limiter).restore(&state.limiter);
        let waiting = state.waiting.iter().take(MAX_WAITING);
        *lock(&self.service.waiting) = waiting.map(|(queue, head)| Waiting::new(*queue, *head)).collect();
        super::state::restore(&self.config, &self.service.share, state)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let Service { share, .. } = &*self.service;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        vec![
            ("requests", read(&self.service.requests)),
            ("malformed", read(&self.service.malformed)),
            ("read_bytes", read(&share.moved.read_bytes)),
            ("write_bytes", read(&share.moved.write_bytes)),
            ("inodes", share.inodes.len() as u64),
            ("open_files", share.handles.len() as u64),
            ("kept_descriptors", share.descriptors.len() as u64),
            ("mounts", share.root().mounts().len() as u64),
            ("throttled", lock(&self.service.limiter).throttled()),
        ]
    }
}

impl Drop for Fs {
    fn drop(&mut self) {
        self.reset();
    }
}
