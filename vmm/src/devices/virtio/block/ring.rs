//! An io_uring that can do what a disk needs and nothing else.
//!
//! The ring is made disabled, gets its two files and its eventfd, then its restrictions (allowed operations; only
//! registered files), and is enabled last: from then on nobody who gets hold of it can open, connect or touch another file.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use io_uring::register::{Probe, Restriction};
use io_uring::squeue::Flags;
use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config::BlockEngine;
use super::disk::{BlockError, Disk, Route};
use super::step::{Direction, Step};
use crate::interrupted;
use crate::lifecycle::errno_of;

const OPCODES: [(u8, &str); 4] = [
    (opcode::Readv::CODE, "READV"),
    (opcode::Writev::CODE, "WRITEV"),
    (opcode::Fsync::CODE, "FSYNC"),
    (opcode::Fallocate::CODE, "FALLOCATE"),
];
/// IORING_UNREGISTER_FILES (include/uapi/linux/io_uring.h).
const UNREGISTER_FILES: u8 = 3;

/// What a host's io_uring lacks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// A system call failed.
    #[error("{what}: {source}")]
    Refused {
        /// The call, or the file it is about.
        what: &'static str,
        /// Cause.
        source: errno::Error,
    },
    /// An operation is missing.
    #[error("the kernel has no IORING_OP_{0}")]
    Operation(&'static str),
    /// Completions may get lost (before Linux 5.5).
    #[error("the kernel may drop completions")]
    Drops,
}

impl RingFault {
    fn refused(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |error| Self::Refused {
            what,
            source: errno_of(&error),
        }
    }
}

/// Whether this host has all of it; found out once per process.
pub(super) fn available() -> Result<(), RingFault> {
    static PROBE: OnceLock<Result<(), RingFault>> = OnceLock::new();
    let result = PROBE.get_or_init(|| {
        let result = probe();
        match &result {
            Ok(()) => {
                guest_log!(
                    INFO,
                    "block: engine io_uring: the kernel has all operations and restrictions"
                );
            }
            Err(reason) => guest_log!(INFO, %reason, "block: engine sync: io_uring cannot be used"),
        }
        result
    });
    result.clone()
}

fn probe() -> Result<(), RingFault> {
    let failed = RingFault::refused;
    let null = std::fs::File::open("/dev/null").map_err(failed("/dev/null"))?;
    let ring = IoUring::builder()
        .setup_r_disabled()
        .build(4)
        .map_err(failed("io_uring_setup"))?;
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(failed("IORING_REGISTER_PROBE"))?;
    if let Some((_, name)) = OPCODES.iter().find(|(code, _)| !probe.is_supported(*code)) {
        return Err(RingFault::Operation(name));
    }
    if !ring.params().is_feature_nodrop() {
        return Err(RingFault::Drops);
    }
    restrict(&ring, &[null.as_raw_fd()]).map_err(|(what, error)| RingFault::refused(what)(error))
}

fn restrict(ring: &IoUring, files: &[i32]) -> Result<(), (&'static str, io::Error)> {
    let submitter = ring.submitter();
    submitter
        .register_files(files)
        .map_err(|e| ("IORING_REGISTER_FILES", e))?;
    let mut restrictions: Vec<_> = OPCODES
        .iter()
        .map(|(code, _)| Restriction::sqe_op(*code))
        .collect();
    restrictions.push(Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()));
    restrictions.push(Restriction::sqe_flags_allowed(
        (Flags::FIXED_FILE | Flags::ASYNC).bits(),
    ));
    restrictions.push(Restriction::register_op(UNREGISTER_FILES));
    submitter
        .register_restrictions(&mut restrictions)
        .map_err(|e| ("IORING_REGISTER_RESTRICTIONS", e))?;
    submitter
        .register_enable_rings()
        .map_err(|e| ("IORING_REGISTER_ENABLE_RINGS", e))
}

/// Decides once, when the disk is made. True: io_uring.
///
/// `in_memory`: the image's file system keeps files in memory only. Such a file system has no way to read or write without
/// perhaps waiting, so io_uring hands each request to a worker thread, which costs more than the copy itself
/// (`vmm/benches/README.md`).
pub(super) fn choose(id: &str, engine: BlockEngine, in_memory: bool) -> Result<bool, BlockError> {
    match engine {
        BlockEngine::Sync => Ok(false),
        BlockEngine::Auto if in_memory => {
            guest_log!(INFO, device = %id, "block: engine sync: the image is in memory");
            Ok(false)
        }
        BlockEngine::Auto => Ok(available().is_ok()),
        BlockEngine::IoUring => available()
            .map(|()| true)
            .map_err(|reason| BlockError::NoIoUring {
                id: id.to_owned(),
                reason,
            }),
    }
}

/// The submission queue is full: submit, then try again.
#[derive(Debug)]
pub(super) struct Full;

/// A restricted ring on one disk.
pub(super) struct Ring {
    ring: IoUring,
    completed: EventFd,
    /// The kernel still has operations.
    abandoned: bool,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").finish_non_exhaustive()
    }
}

impl Ring {
    /// A ring for `entries` operations at once.
    pub(super) fn new(disk: &Disk, entries: u16) -> io::Result<Self> {
        let completed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let ring = IoUring::builder()
            .dontfork()
            .setup_r_disabled()
            .build(u32::from(entries))?;
        ring.submitter().register_eventfd(completed.as_raw_fd())?;
        restrict(&ring, &disk.descriptors())
            .map_err(|(what, error)| io::Error::new(error.kind(), format!("{what}: {error}")))?;
        Ok(Self {
            ring,
            completed,
            abandoned: false,
        })
    }

    /// Readable when operations may have completed.
    pub(super) fn completed(&self) -> &EventFd {
        &self.completed
    }

    /// Queues an operation; the kernel sees it at the next [`submit`](Self::submit). `detached` keeps its copying and
    /// waiting off the caller's thread.
    ///
    /// # Safety
    /// The step, and with it the memory it points to, stays where it is until [`take`](Self::take) has given `token` back.
    pub(super) unsafe fn push(&mut self, token: u64, step: &Step, detached: bool) -> Result<(), Full> {
        let mut entry = entry(step).user_data(token);
        if detached {
            entry = entry.flags(Flags::ASYNC);
        }
        // SAFETY: the caller keeps the memory; file indices are those of `Ring::new`.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| Full)
    }

    /// Hands what was pushed to the kernel, and waits for `wait` completions.
    pub(super) fn submit(&mut self, wait: usize) -> io::Result<()> {
        if wait == 0 && self.ring.submission().is_empty() {
            return Ok(());
        }
        interrupted::again(|| self.ring.submit_and_wait(wait)).map(drop)
    }

    /// Nobody will take the completions of what the kernel still has.
    pub(super) fn abandon(&mut self) {
        self.abandoned = true;
    }

    /// The next completion: token and result.
    pub(super) fn take(&mut self) -> Option<(u64, io::Result<u64>)> {
        let entry = self.ring.completion().next()?;
        let result = u64::try_from(entry.result())
            .map_err(|_| io::Error::from_raw_os_error(entry.result().saturating_neg()));
        Some((entry.user_data(), result))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.abandoned {
            // Linux before 6.13 waits for the operations when files are unregistered.
            return;
        }
        // The kernel takes a closed ring apart in the background. The image must not stay open, and locked, until then.
        if let Err(error) = self.ring.submitter().unregister_files() {
            guest_log!(WARN, %error, "block: the image stays open until the kernel has freed the ring");
        }
    }
}

fn entry(step: &Step) -> squeue::Entry {
    let file = |route: Route| types::Fixed(route as u32);
    match step {
        Step::Move(transfer) => {
            let segments = transfer.segments();
            // At most MAX_SEGMENTS.
            let (pointer, count) = (segments.as_ptr(), segments.len() as u32);
            match transfer.direction() {
                Direction::Read => opcode::Readv::new(file(transfer.route()), pointer, count)
                    .offset(transfer.offset())
                    .build(),
                Direction::Write => opcode::Writev::new(file(transfer.route()), pointer, count)
                    .offset(transfer.offset())
                    .build(),
            }
        }
        Step::Flush => opcode::Fsync::new(file(Route::Main))
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
        Step::Allocate { mode, offset, len } => opcode::Fallocate::new(file(Route::Main), *len)
            .offset(*offset)
            .mode(*mode)
            .build(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::BlockConfig;

    #[test]
    fn ring_when_asked_for_more_than_a_disk_needs_refuses() {
        if let Err(reason) = available() {
            eprintln!("not run: {reason}");
            return;
        }
        let image = vmm_sys_util::tempfile::TempFile::new().unwrap();
        image.as_file().set_len(4096).unwrap();
        let disk = Disk::open(&BlockConfig::new("d", image.as_path())).unwrap();
        let mut ring = Ring::new(&disk, 8).unwrap();
        let mut byte = [0u8];
        let segment = libc::iovec {
            iov_base: byte.as_mut_ptr().cast(),
            iov_len: 1,
        };
        let file = image.as_file().as_raw_fd();
        let read = |file: types::Fd| opcode::Readv::new(file, &raw const segment, 1).build();
        let refused = [
            opcode::Nop::new().build(),
            opcode::Close::new(types::Fd(file)).build(),
            read(types::Fd(file)),
            opcode::Readv::new(types::Fixed(0), &raw const segment, 1)
                .build()
                .flags(Flags::IO_LINK),
        ];
        for entry in refused {
            // SAFETY: `segment` and `byte` outlive the completion taken below.
            unsafe { ring.ring.submission().push(&entry) }.unwrap();
            ring.submit(1).unwrap();
            let (_, result) = ring.take().unwrap();
            assert_eq!(
                result.unwrap_err().raw_os_error(),
                Some(libc::EACCES),
                "{entry:?}"
            );
        }
        assert!(ring.ring.submitter().register_files_update(0, &[file]).is_err());
        let allowed = opcode::Readv::new(types::Fixed(0), &raw const segment, 1).build();
        // SAFETY: as above.
        unsafe { ring.ring.submission().push(&allowed) }.unwrap();
        ring.submit(1).unwrap();
        assert_eq!(ring.take().unwrap().1.unwrap(), 1);
    }
}
