//! Paths inside a container's root: resolved as the container would see them, made where they are missing, and never
//! followed out of it. The image is not trusted: any component may be a link that leads anywhere.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, openat, readlinkat};
use nix::sys::stat::{Mode, SFlag, fstat, mkdirat};

/// As many links as the kernel follows in one path, MAXSYMLINKS.
const MAX_LINKS: u32 = 40;
/// A place in the tree, not opened for reading: a link is the link itself.
const PLACE: OFlag = OFlag::O_PATH.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

/// What is made where a path ends and nothing is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// An empty file.
    File,
}

/// A container's root directory.
pub struct Root {
    folder: OwnedFd,
}

impl Root {
    /// The directory at `path`.
    ///
    /// # Errors
    /// There is none.
    pub fn open(path: &Path) -> nix::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        openat(AT_FDCWD, path, flags, Mode::empty()).map(|folder| Self { folder })
    }

    /// The path without links, `..` and `.`, from the root on and without a leading slash. What is missing is taken to
    /// be made of directories.
    ///
    /// # Errors
    /// Too many links, or a component that is not a directory.
    pub fn resolve(&self, path: &Path) -> nix::Result<PathBuf> {
        let mut left: VecDeque<OsString> = components(path);
        let mut links = 0;
        let mut names: Vec<OsString> = Vec::new();
        // One for each name that exists.
        let mut places: Vec<OwnedFd> = Vec::new();
        while let Some(name) = left.pop_front() {
            if name == ".." {
                names.pop();
                places.truncate(names.len());
                continue;
            }
            if places.len() < names.len() {
                // Below something missing.
                names.push(name);
                continue;
            }
            let place = match openat(self.innermost(&places), name.as_os_str(), PLACE, Mode::empty()) {
                Ok(place) => place,
                Err(Errno::ENOENT) => {
                    names.push(name);
                    continue;
                }
                Err(error) => return Err(error),
            };
            if !is(&place, SFlag::S_IFLNK)? {
                names.push(name);
                places.push(place);
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::ELOOP);
            }
            let target = PathBuf::from(readlinkat(place.as_fd(), "")?);
            if target.is_absolute() {
                names.clear();
                places.clear();
            }
            for name in components(&target).into_iter().rev() {
                left.push_front(name);
            }
        }
        Ok(names.iter().collect())
    }

    /// Opens `resolved`, a path from [`resolve`](Self::resolve), and makes what of it is missing.
    ///
    /// # Errors
    /// It cannot be made, or a link has appeared in it since.
    pub fn make(&self, resolved: &Path, kind: Kind) -> nix::Result<OwnedFd> {
        let mut place = self.folder.try_clone().map_err(errno)?;
        let mut names = resolved.components().peekable();
        while let Some(name) = names.next() {
            let name = name.as_os_str();
            let kind = if names.peek().is_some() {
                Kind::Directory
            } else {
                kind
            };
            place = open_or_make(place.as_fd(), name, kind)?;
            if is(&place, SFlag::S_IFLNK)? {
                return Err(Errno::ELOOP);
            }
        }
        Ok(place)
    }

    fn innermost<'a>(&'a self, places: &'a [OwnedFd]) -> BorrowedFd<'a> {
        places.last().unwrap_or(&self.folder).as_fd()
    }
}

/// The name by which mount(2) can be told of `place`.
pub fn name_of(place: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", place.as_raw_fd()))
}

fn open_or_make(folder: BorrowedFd<'_>, name: &OsStr, kind: Kind) -> nix::Result<OwnedFd> {
    match openat(folder, name, PLACE, Mode::empty()) {
        Err(Errno::ENOENT) => {}
        opened => return opened,
    }
    let made = match kind {
        Kind::Directory => mkdirat(folder, name, Mode::from_bits_truncate(0o755)),
        Kind::File => {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            openat(folder, name, flags, Mode::from_bits_truncate(0o644)).map(drop)
        }
    };
    match made {
        // Somebody was faster.
        Ok(()) | Err(Errno::EEXIST) => openat(folder, name, PLACE, Mode::empty()),
        Err(error) => Err(error),
    }
}

fn components(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some(OsStr::from_bytes(b"..").to_owned()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
        })
        .collect()
}

fn is(place: &OwnedFd, kind: SFlag) -> nix::Result<bool> {
    let mode = SFlag::from_bits_truncate(fstat(place)?.st_mode);
    Ok(mode & SFlag::S_IFMT == kind)
}

fn errno(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// A root with links in it, and a folder beside it that no path may reach.
    fn root(name: &str) -> (PathBuf, Root) {
        let folder = std::env::temp_dir().join(format!("agent-inside-{name}-{}", std::process::id()));
        let root = folder.join("root");
        fs::create_dir_all(root.join("real/deep")).unwrap();
        fs::create_dir_all(folder.join("outside")).unwrap();
        for (link, target) in [
            ("one", "two"),
            ("two", "/real"),
            ("up", "../../../.."),
            ("out", "../outside"),
            ("dangling", "/nowhere/at/all"),
            ("loop", "loop"),
            ("real/back", ".."),
        ] {
            symlink(target, root.join(link)).unwrap();
        }
        let opened = Root::open(&root).unwrap();
        (folder, opened)
    }

    #[test]
    fn path_when_it_passes_links_stays_inside() {
        let (folder, root) = root("resolve");
        for (path, resolved) in [
            ("/", ""),
            ("/one/deep", "real/deep"),
            ("one/deep/../back/two/./deep", "real/deep"),
            ("/up/real", "real"),
            ("/out/x", "outside/x"),
            ("/../../real", "real"),
            ("/dangling", "nowhere/at/all"),
            ("/dangling/../x", "nowhere/at/x"),
            ("/new/a/../../one", "real"),
        ] {
            assert_eq!(
                root.resolve(Path::new(path)).unwrap(),
                Path::new(resolved),
                "{path}"
            );
        }
        assert_eq!(root.resolve(Path::new("/loop/x")), Err(Errno::ELOOP));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn path_when_missing_is_made_inside() {
        let (folder, root) = root("make");
        for (path, kind) in [
            ("/one/new/folder", Kind::Directory),
            ("/dangling", Kind::File),
            ("/out/file", Kind::File),
            ("/one/deep", Kind::Directory),
            ("/", Kind::Directory),
        ] {
            let resolved = root.resolve(Path::new(path)).unwrap();
            root.make(&resolved, kind).unwrap();
        }
        let inside = folder.join("root");
        assert!(inside.join("real/new/folder").is_dir());
        assert!(inside.join("nowhere/at/all").is_file());
        assert!(inside.join("outside/file").is_file());
        assert_eq!(fs::read_dir(folder.join("outside")).unwrap().count(), 0);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn link_when_it_appears_after_the_resolution_is_not_followed() {
        let (folder, root) = root("race");
        let resolved = root.resolve(Path::new("/late/file")).unwrap();
        symlink("/real", folder.join("root/late")).unwrap();

        assert_eq!(root.make(&resolved, Kind::File).unwrap_err(), Errno::ELOOP);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn file_when_in_the_way_of_a_path_is_an_error() {
        let (folder, root) = root("file");
        fs::write(folder.join("root/plain"), "").unwrap();

        assert_eq!(root.resolve(Path::new("/plain/x")), Err(Errno::ENOTDIR));
        fs::remove_dir_all(folder).unwrap();
    }
}
