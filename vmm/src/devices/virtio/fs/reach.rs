//! How a known file is reached again: by what is open, or by its last name below its directory.
//!
//! Names are only hints. What is found is used if it is the file the guest knows, otherwise the guest gets ESTALE, upon
//! which Linux looks the whole path up anew (path_lookupat with LOOKUP_REVAL). So neither a rename by the host nor one
//! by another guest leads to another file, and the descriptors in use do not depend on how much a guest knows.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::descriptors::PathFd;
use super::inodes::{Found, Inode, Place};
use super::mounts::Mount;
use super::open_files::Handle;
use super::share::Share;
use super::sys::{self, Stat, errno};

/// Most directories between an inode and the share: PATH_MAX with names of one letter. Names are recorded one by one
/// while the host moves directories about, so they can also form a ring.
const MAX_DEPTH: usize = 2048;

/// A descriptor of a known file, for the length of a request.
#[derive(Debug)]
pub(super) enum Fd {
    /// Of the directory of a share.
    Share(Arc<Mount>),
    Kept(Arc<PathFd>),
    /// What the guest has open: also reaches a file that has no name any more.
    Open(Arc<Handle>),
}

impl AsFd for Fd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Share(mount) => mount.root(),
            Self::Kept(fd) => fd.as_fd(),
            Self::Open(handle) => handle.as_fd(),
        }
    }
}

/// The file is not where it was found last.
fn stale(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP) => errno(libc::ESTALE),
        _ => error,
    }
}

impl Share {
    /// A descriptor of `inode`.
    ///
    /// # Errors
    /// ESTALE when it is not where it was found last; ENFILE.
    pub(super) fn fd(&self, inode: &Arc<Inode>) -> io::Result<Fd> {
        let mut missing: Vec<(Arc<Inode>, CString)> = Vec::new();
        let mut next = inode.clone();
        let mut fd = loop {
            if let Some(fd) = self.fd_at_hand(&next) {
                break fd;
            }
            if missing.len() == MAX_DEPTH {
                return Err(errno(libc::ESTALE));
            }
            let (parent, name) = self.parent(&next)?;
            missing.push((next, name));
            next = parent;
        };
        while let Some((inode, name)) = missing.pop() {
            let found = sys::open_child(fd.as_fd(), &name, libc::O_PATH, 0).map_err(stale)?;
            inode.check(&sys::stat(found.as_fd())?)?;
            fd = Fd::Kept(self.descriptors.keep(&inode, found)?);
        }
        Ok(fd)
    }

    /// A descriptor of `inode` if there is one.
    pub(super) fn fd_at_hand(&self, inode: &Inode) -> Option<Fd> {
        if inode.place() == Place::Share {
            return Some(Fd::Share(inode.mount().clone()));
        }
        let kept = self.descriptors.get(inode.id()).map(Fd::Kept);
        kept.or_else(|| self.handles.of_inode(inode.id()).map(Fd::Open))
    }

    /// Where `inode` was found last.
    fn parent(&self, inode: &Inode) -> io::Result<(Arc<Inode>, CString)> {
        let Place::Name { parent, name } = inode.place() else {
            return Err(errno(libc::ESTALE));
        };
        let parent = self.inodes.get(parent).map_err(|_| errno(libc::ESTALE))?;
        match parent.mount().id == inode.mount().id {
            true => Ok((parent, name)),
            false => Err(errno(libc::ESTALE)),
        }
    }

    /// Names from the share's directory to `inode`, separated by `/`, as far as is known.
    ///
    /// # Errors
    /// ESTALE.
    pub(super) fn path(&self, inode: &Arc<Inode>) -> io::Result<Vec<u8>> {
        let mut names = Vec::new();
        let mut next = inode.clone();
        while next.place() != Place::Share {
            if names.len() == MAX_DEPTH {
                return Err(errno(libc::ESTALE));
            }
            let (parent, name) = self.parent(&next)?;
            names.push(name.into_bytes());
            next = parent;
        }
        names.reverse();
        Ok(names.join(&b'/'))
    }

    /// What `inode` is now. Needs no descriptor but that of its directory.
    ///
    /// # Errors
    /// As [`Self::fd`].
    pub(super) fn stat(&self, inode: &Arc<Inode>) -> io::Result<Stat> {
        if let Some(fd) = self.fd_at_hand(inode) {
            return sys::stat(fd.as_fd());
        }
        let (parent, name) = self.parent(inode)?;
        let stat = sys::stat_child(self.fd(&parent)?.as_fd(), &name).map_err(stale)?;
        inode.check(&stat)?;
        Ok(stat)
    }

    /// The inode of `name` in `parent`, whose descriptor is `directory`, with one reference more. `stat` is what the
    /// name was found to be.
    pub(super) fn remember(
        &self,
        parent: &Inode,
        directory: BorrowedFd,
        name: &CStr,
        stat: &Stat,
    ) -> io::Result<Arc<Inode>> {
        let crossed = stat.mount != parent.host_mount();
        let mut found = Found {
            stat,
            mount: parent.mount(),
            births: parent.births(),
            foreign: crossed && stat.attr.st_mode & libc::S_IFMT != libc::S_IFDIR,
            place: Place::Name {
                parent: parent.id(),
                name: name.to_owned(),
            },
        };
        if !crossed {
            return self.inodes.remember(found);
        }
        // Another file system perhaps; known files need not be looked at for that.
        for births in [true, false] {
            found.births = births;
            if let Some(inode) = self.inodes.refer(&found)? {
                return Ok(inode);
            }
        }
        let fd = sys::open_child(directory, name, libc::O_PATH, 0)?;
        found.births = !sys::changes_births(fd.as_fd())?;
        self.inodes.remember(found)
    }
}
