//! One request to the share and its answer: which operation, with which arguments.
//!
//! What is not in [`answer`]'s table is answered ENOSYS, after which Linux does not ask again; IOCTL with ENOTTY, which is
//! what ioctl(2) says of a file without any.

use std::io;

use fuse_backend_rs::abi::fuse_abi::{
    AccessIn, AttrOut, BatchForgetIn, CreateIn, Dirent, EntryOut, FATTR_FH, FallocateIn, FlushIn, ForgetIn,
    ForgetOne, FsOptions, FsyncIn, GETATTR_FH, GetattrIn, GetxattrIn, GetxattrOut, InHeader, InitIn, InitIn2,
    InitOut, KERNEL_MINOR_VERSION, KERNEL_VERSION, Kstatfs, LinkIn, LkIn, LkOut, LseekIn, LseekOut, MkdirIn,
    MknodIn, OpenIn, OpenOut, READ_LOCKOWNER, RELEASE_FLOCK_UNLOCK, RELEASE_FLUSH, ReadIn, ReleaseIn,
    Rename2In, RenameIn, SetattrIn, SetattrValid, SetxattrIn, WRITE_CACHE, WRITE_LOCKOWNER, WriteIn,
    WriteOut, stat64,
};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileLock, FileSystem, GetxattrReply, ListxattrReply,
};
use vm_memory::ByteValued;

use super::additions::StatxIn;
use super::locks::Holder;
use super::message::{Arguments, GuestData, MAX_DATA, MessageError, Request, Room, opcode, read_header};
use super::share::Share;
use super::sys::errno;
use crate::devices::virtio::queue::chain::Chain;
use crate::memory::GuestMemory;

/// The first minor version whose INIT has an answer as long as ours; virtio-fs came with 7.31.
const OLDEST_MINOR: u32 = 23;
/// Requests the guest may have in flight in the background, and from how many on it is to slow writers down.
const MAX_BACKGROUND: u16 = u16::MAX;
const CONGESTION: u16 = MAX_BACKGROUND / 4 * 3;
const PAGE: u32 = 4096;

/// Whom a process of the guest may wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    Endless,
    /// The guest's own processes: it has waited for others long enough.
    Guest,
    /// Nobody: too many wait already.
    None,
}

/// What became of a request.
#[derive(Debug, Default)]
pub(super) struct Served {
    /// Bytes of the answer.
    pub(super) written: u32,
    /// There is no answer yet: it is for a lock somebody else has. To be served again.
    pub(super) waits: bool,
    /// The message was no request, or had no room for its answer.
    pub(super) error: Option<MessageError>,
}

/// Carries the request in `chain` out.
pub(super) fn serve(share: &Share, memory: &GuestMemory, chain: &Chain, patience: Patience) -> Served {
    let dropped = |error| Served {
        error: Some(error),
        ..Served::default()
    };
    let header = match read_header(memory, &chain.readable) {
        Ok(header) => header,
        Err(error) => return dropped(error),
    };
    let room = Room::new(memory, &chain.writable, &header);
    let request = Request::read(header, memory, &chain.readable);
    let result = request
        .map_err(Refusal::from)
        .and_then(|request| answer(share, memory, &request, &room, patience));
    let (reply, error) = match result {
        Ok(reply) => (reply, None),
        Err(Refusal::Error(error)) => (Reply::Error(error.raw_os_error().unwrap_or(libc::EIO)), None),
        Err(Refusal::Malformed(error)) => (Reply::Error(libc::EINVAL), Some(error)),
        Err(Refusal::Waits) => {
            return Served {
                waits: true,
                ..Served::default()
            };
        }
    };
    let written = match (reply, header.opcode) {
        // These have no answer, not even an error.
        (_, opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT) => Ok(0),
        (Reply::Body(body), _) => room.answer(&body),
        (Reply::InPlace(len), _) => room.finish(len),
        (Reply::Error(number), _) => room.error(number),
    };
    match written {
        Ok(written) => Served {
            written,
            error,
            waits: false,
        },
        Err(error) => dropped(error),
    }
}

/// What is answered.
enum Reply {
    Body(Vec<u8>),
    /// So many bytes, which are in the room already.
    InPlace(usize),
    /// An errno.
    Error(i32),
}

/// Why not.
enum Refusal {
    Error(io::Error),
    Malformed(MessageError),
    /// Not yet.
    Waits,
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Error(error)
    }
}

impl From<MessageError> for Refusal {
    fn from(error: MessageError) -> Self {
        Self::Malformed(error)
    }
}

type Answer = Result<Reply, Refusal>;

fn done(result: io::Result<()>) -> Answer {
    result?;
    Ok(Reply::Body(Vec::new()))
}

fn body(value: &impl ByteValued) -> Answer {
    Ok(Reply::Body(value.as_slice().to_vec()))
}

fn entry(entry: io::Result<Entry>) -> Answer {
    body(&EntryOut::from(entry?))
}

fn attributes(result: io::Result<(stat64, std::time::Duration)>) -> Answer {
    let (attr, timeout) = result?;
    body(&AttrOut {
        attr_valid: timeout.as_secs(),
        attr_valid_nsec: timeout.subsec_nanos(),
        dummy: 0,
        attr: attr.into(),
    })
}

fn answer(
    share: &Share,
    memory: &GuestMemory,
    request: &Request<'_>,
    room: &Room<'_>,
    patience: Patience,
) -> Answer {
    let InHeader {
        opcode, nodeid: node, ..
    } = request.header;
    let ctx = &Context::from(&request.header);
    let mut args = request.arguments();
    match opcode {
        opcode::INIT => init(share, &mut args),
        opcode::DESTROY => {
            share.destroy();
            Ok(Reply::Body(Vec::new()))
        }
        opcode::FORGET => {
            share.forget(ctx, node, args.take::<ForgetIn>()?.nlookup);
            Ok(Reply::Body(Vec::new()))
        }
        opcode::BATCH_FORGET => {
            for _ in 0..args.take::<BatchForgetIn>()?.count {
                let ForgetOne { nodeid, nlookup } = args.take()?;
                share.forget(ctx, nodeid, nlookup);
            }
            Ok(Reply::Body(Vec::new()))
        }
        opcode::INTERRUPT => Ok(Reply::Body(Vec::new())),
        opcode::IOCTL => Err(errno(libc::ENOTTY).into()),
        opcode::LOOKUP => entry(share.lookup(ctx, node, args.name()?)),
        opcode::GETATTR
        | opcode::SETATTR
        | opcode::STATX
        | opcode::STATFS
        | opcode::SYNCFS
        | opcode::ACCESS => of_node(share, ctx, request, &mut args),
        opcode::SETXATTR | opcode::GETXATTR | opcode::LISTXATTR | opcode::REMOVEXATTR => {
            extended_attribute(share, ctx, request, &mut args)
        }
        opcode::READ => read(share, ctx, memory, node, &mut args, room),
        opcode::WRITE => write(share, ctx, node, &mut args, request.data()),
        opcode::READDIR | opcode::READDIRPLUS => list(share, ctx, request, &mut args, room),
        opcode::OPEN | opcode::OPENDIR | opcode::CREATE | opcode::TMPFILE => {
            open(share, ctx, request, &mut args)
        }
        opcode::READLINK
        | opcode::SYMLINK
        | opcode::MKNOD
        | opcode::MKDIR
        | opcode::UNLINK
        | opcode::RMDIR
        | opcode::RENAME
        | opcode::RENAME2
        | opcode::LINK => in_directory(share, ctx, request, &mut args),
        opcode::GETLK | opcode::SETLK | opcode::SETLKW => lock(share, request, &mut args, patience),
        _ => of_handle(share, ctx, request, &mut args),
    }
}

fn lock(share: &Share, request: &Request<'_>, args: &mut Arguments<'_>, patience: Patience) -> Answer {
    let InHeader {
        opcode, nodeid: node, ..
    } = request.header;
    let LkIn {
        fh,
        owner,
        lk,
        lk_flags,
        ..
    } = args.take()?;
    let wanted = FileLock::from(lk);
    if opcode == opcode::GETLK {
        let lk = share.test_lock(node, fh, owner, &wanted)?.into();
        return body(&LkOut { lk });
    }
    match share.set_lock(node, fh, owner, &wanted, lk_flags) {
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && opcode == opcode::SETLKW => {
            let holder = share.wait_for_lock(node, fh, owner, &wanted, lk_flags)?;
            match (patience, holder) {
                (Patience::Endless, _) | (Patience::Guest, Holder::Guest) => Err(Refusal::Waits),
                _ => {
                    share.stop_waiting(owner);
                    Err(errno(libc::ENOLCK).into())
                }
            }
        }
        result => done(result),
    }
}

fn init(share: &Share, args: &mut Arguments<'_>) -> Answer {
    let InitIn {
        major,
        minor,
        max_readahead,
        flags,
    } = args.take()?;
    if major > KERNEL_VERSION {
        // The guest tries again with our version.
        return body(&InitOut {
            major: KERNEL_VERSION,
            minor: KERNEL_MINOR_VERSION,
            ..InitOut::default()
        });
    }
    if major < KERNEL_VERSION || minor < OLDEST_MINOR {
        return Err(errno(libc::EPROTO).into());
    }
    let mut offered = u64::from(flags);
    if offered & FsOptions::INIT_EXT.bits() != 0 {
        offered |= u64::from(args.take::<InitIn2>()?.flags2) << 32;
    }
    let offered = FsOptions::from_bits_truncate(offered);
    let enabled = (share.init(offered)? & offered).bits();
    body(&InitOut {
        major: KERNEL_VERSION,
        minor: KERNEL_MINOR_VERSION,
        max_readahead,
        flags: enabled as u32,
        flags2: (enabled >> 32) as u32,
        max_background: MAX_BACKGROUND,
        congestion_threshold: CONGESTION,
        max_write: MAX_DATA,
        max_pages: (MAX_DATA / PAGE) as u16,
        // Nanoseconds.
        time_gran: 1,
        ..InitOut::default()
    })
}

/// Requests about a file that may or may not be open.
fn of_node(share: &Share, ctx: &Context, request: &Request<'_>, args: &mut Arguments<'_>) -> Answer {
    let node = request.header.nodeid;
    match request.header.opcode {
        opcode::GETATTR => {
            let GetattrIn { flags, fh, .. } = args.take()?;
            attributes(share.getattr(ctx, node, (flags & GETATTR_FH != 0).then_some(fh)))
        }
        opcode::SETATTR => {
            let new: SetattrIn = args.take()?;
            let handle = (new.valid & FATTR_FH != 0).then_some(new.fh);
            let valid = SetattrValid::from_bits_truncate(new.valid);
            attributes(share.setattr(ctx, node, new.into(), handle, valid))
        }
        opcode::STATX => {
            let StatxIn {
                getattr_flags, fh, ..
            } = args.take()?;
            body(&share.statx(node, (getattr_flags & GETATTR_FH != 0).then_some(fh))?)
        }
        opcode::SYNCFS => done(share.syncfs(node)),
        opcode::STATFS => body(&Kstatfs::from(share.statfs(ctx, node)?)),
        opcode::ACCESS => done(share.access(ctx, node, args.take::<AccessIn>()?.mask)),
        _ => Err(errno(libc::ENOSYS).into()),
    }
}

/// Requests that name something in a directory, or make it.
fn in_directory(share: &Share, ctx: &Context, request: &Request<'_>, args: &mut Arguments<'_>) -> Answer {
    let node = request.header.nodeid;
    match request.header.opcode {
        opcode::READLINK => Ok(Reply::Body(share.readlink(ctx, node)?)),
        opcode::SYMLINK => {
            let (name, target) = (args.name()?, args.name()?);
            entry(share.symlink(ctx, target, node, name))
        }
        opcode::MKNOD => {
            let MknodIn {
                mode, rdev, umask, ..
            } = args.take()?;
            entry(share.mknod(ctx, node, args.name()?, mode, rdev, umask))
        }
        opcode::MKDIR => {
            let MkdirIn { mode, umask } = args.take()?;
            entry(share.mkdir(ctx, node, args.name()?, mode, umask))
        }
        opcode::UNLINK => done(share.unlink(ctx, node, args.name()?)),
        opcode::RMDIR => done(share.rmdir(ctx, node, args.name()?)),
        opcode::RENAME => {
            let RenameIn { newdir } = args.take()?;
            done(share.rename(ctx, node, args.name()?, newdir, args.name()?, 0))
        }
        opcode::RENAME2 => {
            let Rename2In { newdir, flags, .. } = args.take()?;
            done(share.rename(ctx, node, args.name()?, newdir, args.name()?, flags))
        }
        opcode::LINK => {
            let LinkIn { oldnodeid } = args.take()?;
            entry(share.link(ctx, oldnodeid, node, args.name()?))
        }
        _ => Err(errno(libc::ENOSYS).into()),
    }
}

fn open(share: &Share, ctx: &Context, request: &Request<'_>, args: &mut Arguments<'_>) -> Answer {
    let node = request.header.nodeid;
    let mut reply = Vec::new();
    let (handle, options, passthrough) = match request.header.opcode {
        opcode::CREATE => {
            let wanted: CreateIn = args.take()?;
            let (entry, handle, options, passthrough) = share.create(ctx, node, args.name()?, wanted)?;
            reply.extend_from_slice(EntryOut::from(entry).as_slice());
            (handle, options, passthrough)
        }
        opcode::TMPFILE => {
            let (entry, handle, options) = share.tmpfile(ctx, node, args.take()?)?;
            reply.extend_from_slice(EntryOut::from(entry).as_slice());
            (Some(handle), options, None)
        }
        opcode::OPENDIR => {
            let (handle, options) = share.opendir(ctx, node, args.take::<OpenIn>()?.flags)?;
            (handle, options, None)
        }
        _ => {
            let OpenIn { flags, fuse_flags } = args.take()?;
            share.open(ctx, node, flags, fuse_flags)?
        }
    };
    let opened = OpenOut {
        fh: handle.unwrap_or(0),
        open_flags: options.bits(),
        passthrough: passthrough.unwrap_or(0),
    };
    reply.extend_from_slice(opened.as_slice());
    Ok(Reply::Body(reply))
}

fn read(
    share: &Share,
    ctx: &Context,
    memory: &GuestMemory,
    node: u64,
    args: &mut Arguments<'_>,
    room: &Room<'_>,
) -> Answer {
    let wanted: ReadIn = args.take()?;
    let owner = (wanted.read_flags & READ_LOCKOWNER != 0).then_some(wanted.lock_owner);
    let size = wanted.size.min(MAX_DATA);
    let buffers = room.data(size.into());
    let data = &mut GuestData::new(memory, &buffers);
    let (handle, at) = (wanted.fh, wanted.offset);
    let count = share.read(ctx, node, handle, data, size, at, owner, wanted.flags)?;
    Ok(Reply::InPlace(count))
}

fn write(
    share: &Share,
    ctx: &Context,
    node: u64,
    args: &mut Arguments<'_>,
    mut data: GuestData<'_>,
) -> Answer {
    let wanted: WriteIn = args.take()?;
    let owner = (wanted.fuse_flags & WRITE_LOCKOWNER != 0).then_some(wanted.lock_owner);
    let count = share.write(
        ctx,
        node,
        wanted.fh,
        &mut data,
        wanted.size,
        wanted.offset,
        owner,
        wanted.fuse_flags & WRITE_CACHE != 0,
        wanted.flags,
        wanted.fuse_flags,
    )?;
    body(&WriteOut {
        // At most MAX_DATA.
        size: count as u32,
        padding: 0,
    })
}

/// READDIR and READDIRPLUS: `struct fuse_dirent`, after `struct fuse_entry_out` with the latter.
fn list(
    share: &Share,
    ctx: &Context,
    request: &Request<'_>,
    args: &mut Arguments<'_>,
    room: &Room<'_>,
) -> Answer {
    let node = request.header.nodeid;
    let wanted: ReadIn = args.take()?;
    if room.len() < u64::from(wanted.size) {
        return Err(errno(libc::ENOMEM).into());
    }
    let size = wanted.size.min(MAX_DATA);
    let mut listing = Vec::new();
    let mut add = |found: DirEntry<'_>, entry: Option<Entry>| {
        let before = listing.len();
        if let Some(entry) = entry {
            listing.extend_from_slice(EntryOut::from(entry).as_slice());
        }
        let dirent = Dirent {
            ino: found.ino,
            off: found.offset,
            // NAME_MAX bytes at most.
            namelen: found.name.len() as u32,
            type_: found.type_,
        };
        listing.extend_from_slice(dirent.as_slice());
        listing.extend_from_slice(found.name);
        listing.resize(listing.len().next_multiple_of(8), 0);
        if listing.len() > size as usize {
            listing.truncate(before);
        }
        Ok(listing.len() - before)
    };
    if request.header.opcode == opcode::READDIRPLUS {
        let mut add = |found: DirEntry<'_>, entry| add(found, Some(entry));
        share.readdirplus(ctx, node, wanted.fh, size, wanted.offset, &mut add)?;
    } else {
        let mut add = |found: DirEntry<'_>| add(found, None);
        share.readdir(ctx, node, wanted.fh, size, wanted.offset, &mut add)?;
    }
    Ok(Reply::Body(listing))
}

fn extended_attribute(
    share: &Share,
    ctx: &Context,
    request: &Request<'_>,
    args: &mut Arguments<'_>,
) -> Answer {
    let node = request.header.nodeid;
    let count = |size| body(&GetxattrOut { size, padding: 0 });
    match request.header.opcode {
        opcode::SETXATTR => {
            let SetxattrIn { size, flags } = args.take()?;
            let name = args.name()?;
            done(share.setxattr(ctx, node, name, args.bytes(size)?, flags))
        }
        opcode::GETXATTR => {
            let GetxattrIn { size, .. } = args.take()?;
            match share.getxattr(ctx, node, args.name()?, size)? {
                GetxattrReply::Value(value) => Ok(Reply::Body(value)),
                GetxattrReply::Count(size) => count(size),
            }
        }
        opcode::LISTXATTR => match share.listxattr(ctx, node, args.take::<GetxattrIn>()?.size)? {
            ListxattrReply::Names(names) => Ok(Reply::Body(names)),
            ListxattrReply::Count(size) => count(size),
        },
        _ => done(share.removexattr(ctx, node, args.name()?)),
    }
}

/// Requests about an open file or directory.
fn of_handle(share: &Share, ctx: &Context, request: &Request<'_>, args: &mut Arguments<'_>) -> Answer {
    let node = request.header.nodeid;
    match request.header.opcode {
        opcode::FLUSH => {
            let FlushIn { fh, lock_owner, .. } = args.take()?;
            done(share.flush(ctx, node, fh, lock_owner))
        }
        opcode::FSYNC | opcode::FSYNCDIR => {
            let FsyncIn { fh, fsync_flags, .. } = args.take()?;
            let data_only = fsync_flags & 1 != 0;
            done(match request.header.opcode {
                opcode::FSYNC => share.fsync(ctx, node, data_only, fh),
                _ => share.fsyncdir(ctx, node, data_only, fh),
            })
        }
        opcode::RELEASE => {
            let closed: ReleaseIn = args.take()?;
            let flush = closed.release_flags & RELEASE_FLUSH != 0;
            let unlock = closed.release_flags & RELEASE_FLOCK_UNLOCK != 0;
            let owner = (flush || unlock).then_some(closed.lock_owner);
            done(share.release(ctx, node, closed.flags, closed.fh, flush, unlock, owner))
        }
        opcode::RELEASEDIR => {
            let ReleaseIn { fh, flags, .. } = args.take()?;
            done(share.releasedir(ctx, node, flags, fh))
        }
        opcode::FALLOCATE => {
            let FallocateIn {
                fh,
                offset,
                length,
                mode,
                ..
            } = args.take()?;
            done(share.fallocate(ctx, node, fh, mode, offset, length))
        }
        opcode::COPY_FILE_RANGE => body(&WriteOut {
            size: share.copy_file_range(ctx, node, &args.take()?)?,
            padding: 0,
        }),
        opcode::LSEEK => {
            let LseekIn {
                fh, offset, whence, ..
            } = args.take()?;
            let offset = share.lseek(ctx, node, fh, offset, whence)?;
            body(&LseekOut { offset })
        }
        _ => Err(errno(libc::ENOSYS).into()),
    }
}
