//! Network namespaces of the host. No thread of this process enters one but those that [`Netns::run`] makes for it: they do
//! one piece of work there and end.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use futures::StreamExt;
use nix::sched::{CloneFlags, setns};
use rtnetlink::MulticastGroup;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::error::{Error, ErrorKind};

/// The namespace of the calling thread: the host's, for every thread that was not made for another one.
pub const OWN: &str = "/proc/thread-self/ns/net";

/// A namespace that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// Nothing is at the path.
    #[error("network namespace {}: no such file", .0.display())]
    Missing(PathBuf),
    /// Something else is at the path.
    #[error("network namespace {}: this is no network namespace (any more)", .0.display())]
    NotOne(PathBuf),
    /// Another namespace is at the path than the one that was opened.
    #[error("network namespace {}: it has been replaced by another one", .0.display())]
    Replaced(PathBuf),
    /// The kernel refused something else.
    #[error("network namespace {}: {what}: {source}", path.display())]
    Host {
        /// The path.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl NetnsError {
    /// Whether there is no such namespace any more, or never was.
    pub fn is_gone(&self) -> bool {
        !matches!(self, Self::Host { .. })
    }
}

impl From<NetnsError> for Error {
    fn from(error: NetnsError) -> Self {
        let kind = match &error {
            NetnsError::Missing(_) => ErrorKind::NotFound,
            NetnsError::NotOne(_) => ErrorKind::InvalidArgument,
            NetnsError::Replaced(_) => ErrorKind::FailedPrecondition,
            NetnsError::Host { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                ErrorKind::PermissionDenied
            }
            NetnsError::Host { .. } => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

/// A network namespace by its path, and what makes sure that it is still the same one: paths below /proc are reused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Netns {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Netns {
    /// The namespace at `path`.
    ///
    /// # Errors
    /// [`NetnsError::Missing`], [`NetnsError::NotOne`].
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        let file = open(path)?;
        let id = identity(path, &file)?;
        let netns = Self {
            path: path.to_owned(),
            device: id.0,
            inode: id.1,
        };
        // Only entering tells a namespace of another type, or a plain file, from a network namespace.
        netns.run(|| ())?;
        Ok(netns)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is the host's: that of this process, or of process 1.
    pub fn is_hosts(&self) -> bool {
        [OWN, "/proc/1/ns/net"]
            .iter()
            .any(|own| fs::metadata(own).is_ok_and(|own| (own.dev(), own.ino()) == (self.device, self.inode)))
    }

    /// Runs `work` on a thread in the namespace, to its end. Blocks.
    ///
    /// # Errors
    /// [`NetnsError`] when it cannot be entered; `work` has not run then.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        let file = open(&self.path)?;
        if identity(&self.path, &file)? != (self.device, self.inode) {
            return Err(NetnsError::Replaced(self.path.clone()));
        }
        let enter_and_work = || {
            setns(file, CloneFlags::CLONE_NEWNET).map_err(|errno| match errno {
                nix::errno::Errno::EINVAL => NetnsError::NotOne(self.path.clone()),
                errno => self.failed("enter", errno.into()),
            })?;
            Ok(work())
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .name("netns".into())
                .spawn_scoped(scope, enter_and_work)
                .map_err(|source| self.failed("thread", source))?;
            thread
                .join()
                .unwrap_or_else(|_| Err(self.failed("thread", io::Error::other("it panicked"))))
        })
    }

    /// Runs `work` with a netlink connection to the namespace, on a thread that is in it. Blocks.
    ///
    /// # Errors
    /// Those of `work`, and [`NetnsError`].
    pub fn netlink<T: Send, E: From<NetnsError> + Send>(
        &self,
        work: impl AsyncFnOnce(rtnetlink::Handle) -> Result<T, E> + Send,
    ) -> Result<T, E> {
        let failed = |what| move |source| E::from(self.failed(what, source));
        self.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_io()
                .build()
                .map_err(failed("event loop"))?;
            runtime.block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection().map_err(failed("netlink"))?;
                tokio::spawn(connection);
                work(handle).await
            })
        })?
    }

    /// Tells from now on that links, addresses or routes of the namespace change. Blocks; the calling thread is in a tokio
    /// runtime.
    ///
    /// # Errors
    /// [`NetnsError`].
    pub fn changes(&self) -> Result<Changes, NetnsError> {
        let runtime = tokio::runtime::Handle::current();
        let opened = self.run(|| {
            // A socket belongs to the namespace it was made in, whichever thread reads it.
            let _runtime = runtime.enter();
            rtnetlink::new_multicast_connection(&[
                MulticastGroup::Link,
                MulticastGroup::Ipv4Ifaddr,
                MulticastGroup::Ipv6Ifaddr,
                MulticastGroup::Ipv4Route,
                MulticastGroup::Ipv6Route,
            ])
        });
        let (connection, _, mut messages) = opened?.map_err(|source| self.failed("netlink", source))?;
        let (tell, told) = watch::channel(());
        let mut tasks = JoinSet::new();
        tasks.spawn_on(connection, &runtime);
        // However many there are, and however long the listener takes: there has been a change, or none.
        let count = async move {
            while messages.next().await.is_some() {
                tell.send_replace(());
            }
        };
        tasks.spawn_on(count, &runtime);
        Ok(Changes { told, _tasks: tasks })
    }

    fn failed(&self, what: &'static str, source: io::Error) -> NetnsError {
        NetnsError::Host {
            path: self.path.clone(),
            what,
            source,
        }
    }
}

/// Changes of a namespace: see [`Netns::changes`]. They end with this.
#[derive(Debug)]
pub struct Changes {
    told: watch::Receiver<()>,
    _tasks: JoinSet<()>,
}

impl Changes {
    /// Waits until something has changed since the last call; false when no more can be learned.
    pub async fn next(&mut self) -> bool {
        self.told.changed().await.is_ok()
    }
}

fn open(path: &Path) -> Result<File, NetnsError> {
    File::open(path).map_err(|source| match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR | libc::ESRCH) => NetnsError::Missing(path.to_owned()),
        _ => NetnsError::Host {
            path: path.to_owned(),
            what: "open",
            source,
        },
    })
}

fn identity(path: &Path, file: &File) -> Result<(u64, u64), NetnsError> {
    let metadata = file.metadata().map_err(|source| NetnsError::Host {
        path: path.to_owned(),
        what: "look at",
        source,
    })?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A network namespace of the test's own, at a path of its own as `ip netns` makes it.
    pub(crate) struct TestNetns {
        folder: tempfile::TempDir,
        pub(crate) netns: Netns,
    }

    impl TestNetns {
        pub(crate) fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("netns");
            fs::write(&path, "").unwrap();
            let mounted = path.clone();
            std::thread::spawn(move || {
                nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
                let own = Path::new("/proc/thread-self/ns/net");
                crate::host::bind::bind(own, &mounted, crate::host::bind::Bind::tree()).unwrap();
            })
            .join()
            .unwrap();
            let netns = Netns::open(&path).unwrap();
            Self { folder, netns }
        }

        /// Removes it, as `ip netns delete` does.
        pub(crate) fn delete(&self) {
            crate::host::mounts::unmount(self.netns.path()).unwrap();
            fs::remove_file(self.netns.path()).unwrap();
        }
    }

    impl Drop for TestNetns {
        fn drop(&mut self) {
            if self.folder.path().join("netns").exists() {
                self.delete();
            }
        }
    }

    #[test]
    fn thread_when_it_works_in_a_namespace_leaves_the_others_where_they_are() {
        let own = fs::read_link("/proc/thread-self/ns/net").unwrap();
        let test = TestNetns::new();

        let inside = test
            .netns
            .run(|| fs::read_link("/proc/thread-self/ns/net").unwrap());

        assert_ne!(inside.unwrap(), own);
        assert_eq!(fs::read_link("/proc/thread-self/ns/net").unwrap(), own);
        assert!(!test.netns.is_hosts());
        assert!(
            Netns::open(Path::new("/proc/thread-self/ns/net"))
                .unwrap()
                .is_hosts()
        );
    }

    #[test]
    fn netns_when_it_is_none_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();

        let missing = Netns::open(&folder.path().join("missing")).unwrap_err();
        let plain = Netns::open(&file).unwrap_err();
        let other = Netns::open(Path::new("/proc/self/ns/uts")).unwrap_err();

        assert!(
            matches!(&missing, NetnsError::Missing(path) if path.ends_with("missing")),
            "{missing}"
        );
        assert!(
            matches!(&plain, NetnsError::NotOne(path) if *path == file),
            "{plain}"
        );
        assert!(matches!(other, NetnsError::NotOne(_)), "{other}");
        assert_eq!(Error::from(plain).kind, ErrorKind::InvalidArgument);
        assert_eq!(Error::from(missing).kind, ErrorKind::NotFound);
    }

    #[test]
    fn netns_when_another_took_its_path_is_not_entered() {
        let (one, two) = (TestNetns::new(), TestNetns::new());
        let moved = Netns {
            path: two.netns.path.clone(),
            ..one.netns.clone()
        };

        assert!(matches!(moved.run(|| ()), Err(NetnsError::Replaced(_))));

        one.delete();
        assert!(one.netns.run(|| ()).unwrap_err().is_gone());
    }

    #[test]
    fn netlink_when_it_answers_tells_of_the_namespace() {
        use futures::TryStreamExt;
        let test = TestNetns::new();

        let links = test.netns.netlink(async |handle| {
            let links: Vec<_> = handle.link().get().execute().try_collect().await.unwrap();
            Ok::<_, NetnsError>(links.len())
        });

        // The loopback, and what the kernel makes in every namespace.
        assert!(links.unwrap() >= 1);
    }
}
