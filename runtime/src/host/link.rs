//! Network links of a namespace: what is made of them for a guest, and how that is undone.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use futures::TryStreamExt;
use rtnetlink::packet_route::link::{LinkMessage, MacVtapMode};
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle};
use rtnetlink::{Handle, LinkMacVtap, LinkUnspec};

use super::netns::{Netns, NetnsError};

/// Parent of the filters of an ingress qdisc: `TC_H_INGRESS`, or `ffff:`.
const INGRESS: u32 = 0xffff_0000;
/// `ETH_P_ALL`, as the kernel wants it: in network byte order.
const ALL_PROTOCOLS: u16 = (libc::ETH_P_ALL as u16).to_be();

/// A link that could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The kernel refused.
    #[error("interface {link}: {what}: {source}")]
    Host {
        /// Name of the link.
        link: String,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

impl LinkError {
    fn new(link: &str, what: &'static str, source: io::Error) -> Self {
        Self::Host {
            link: link.to_owned(),
            what,
            source,
        }
    }

    /// Whether the link, or its namespace, does not exist (any more).
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Netns(error) => error.is_gone(),
            Self::Host { source, .. } => matches!(source.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)),
        }
    }
}

/// Result of an operation on a link.
pub type Result<T> = std::result::Result<T, LinkError>;

/// What a netlink call says, as an I/O error.
pub fn io_error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

fn failed(link: &str, what: &'static str) -> impl FnOnce(rtnetlink::Error) -> LinkError {
    move |error| LinkError::new(link, what, io_error(error))
}

/// The link called `name`; `None` when there is none.
///
/// # Errors
/// What the kernel says.
pub async fn find(handle: &Handle, name: &str) -> Result<Option<LinkMessage>> {
    let mut found = handle.link().get().match_name(name.to_owned()).execute();
    match found.try_next().await {
        Ok(link) => Ok(link),
        Err(error) => match io_error(error) {
            error if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            error => Err(LinkError::new(name, "look for it", error)),
        },
    }
}

/// Index of the link called `name`.
///
/// # Errors
/// `ENODEV` when there is none.
pub async fn index(handle: &Handle, name: &str) -> Result<u32> {
    let link = find(handle, name).await?;
    link.map(|link| link.header.index)
        .ok_or_else(|| LinkError::new(name, "look for it", io::Error::from_raw_os_error(libc::ENODEV)))
}

/// Gives link `index` its MTU and takes it into use.
///
/// # Errors
/// What the kernel says.
pub async fn set_up(handle: &Handle, name: &str, index: u32, mtu: u32) -> Result<()> {
    let change = LinkUnspec::new_with_index(index).mtu(mtu).up().build();
    let changed = handle.link().set(change).execute().await;
    changed.map_err(failed(name, "set its MTU and take it into use"))
}

/// Kind of the qdisc on the way into link `index`; `None` when there is none.
///
/// # Errors
/// What the kernel says.
pub async fn ingress(handle: &Handle, name: &str, index: u32) -> Result<Option<String>> {
    let index = i32::try_from(index).unwrap_or(i32::MAX);
    // The kernel lists those of every link all the same.
    let qdiscs: Vec<_> = handle
        .qdisc()
        .get()
        .index(index)
        .execute()
        .try_collect()
        .await
        .map_err(failed(name, "list its qdiscs"))?;
    let ours = qdiscs
        .into_iter()
        .find(|qdisc| qdisc.header.index == index && qdisc.header.parent == TcHandle::INGRESS);
    Ok(ours.map(|qdisc| {
        let kind = qdisc
            .attributes
            .into_iter()
            .find_map(|attribute| match attribute {
                TcAttribute::Kind(kind) => Some(kind),
                _ => None,
            });
        kind.unwrap_or_default()
    }))
}

/// Puts an ingress qdisc on link `index`.
///
/// # Errors
/// `EEXIST` when something is there already.
pub async fn add_ingress(handle: &Handle, name: &str, index: u32) -> Result<()> {
    let index = i32::try_from(index).unwrap_or(i32::MAX);
    let added = handle.qdisc().add(index).ingress().execute().await;
    added.map_err(failed(name, "add an ingress qdisc"))
}

/// Takes the ingress qdisc, with its filters, off link `index`.
///
/// # Errors
/// What the kernel says; `EINVAL` or `ENOENT` when there is none.
pub async fn remove_ingress(handle: &Handle, name: &str, index: u32) -> Result<()> {
    let index = i32::try_from(index).unwrap_or(i32::MAX);
    let mut removal = handle.qdisc().del(index);
    removal.message_mut().header.parent = TcHandle::INGRESS;
    let removed = removal.execute().await;
    removed.map_err(failed(name, "remove its ingress qdisc"))
}

/// Sends everything that comes into link `from` out of link `to`: a u32 filter that matches all, which every kernel with
/// traffic control has.
///
/// # Errors
/// What the kernel says.
pub async fn redirect(handle: &Handle, name: &str, from: u32, to: u32) -> Result<()> {
    let index = i32::try_from(from).unwrap_or(i32::MAX);
    let filter = handle
        .traffic_filter(index)
        .add()
        .parent(INGRESS)
        .priority(1)
        .protocol(ALL_PROTOCOLS)
        .redirect(to)
        .map_err(failed(name, "describe a filter"))?;
    filter.execute().await.map_err(failed(name, "add a filter"))
}

/// Opens `queues` queues of the TAP `name`, which is made if need be, in the namespace of the calling thread. It goes with
/// its last descriptor.
///
/// # Errors
/// What the kernel says: `EBUSY` when somebody else has it.
pub fn open_tap(name: &str, queues: usize) -> Result<Vec<OwnedFd>> {
    (0..queues)
        .map(|_| queue(Path::new("/dev/net/tun"), name, flags(queues)))
        .collect::<io::Result<_>>()
        .map_err(|source| LinkError::new(name, "open the TAP (/dev/net/tun)", source))
}

/// Makes the macvtap `name` on link `below`, which gives it every frame it gets and keeps its hardware address.
///
/// # Errors
/// `EBUSY` when something else takes that link's frames already.
pub async fn add_macvtap(handle: &Handle, name: &str, below: u32) -> Result<()> {
    let link = LinkMacVtap::new(name, below, MacVtapMode::Passthrough).build();
    let added = handle.link().add(link).execute().await;
    added.map_err(failed(name, "make it"))
}

/// Opens `queues` queues of the macvtap `name` with `index`. The calling thread is in its network namespace, and gets a
/// mount namespace of its own.
///
/// # Errors
/// What the kernel says.
pub fn open_macvtap(name: &str, index: u32, queues: usize) -> Result<Vec<OwnedFd>> {
    let error = |what| move |source: io::Error| LinkError::new(name, what, source);
    // A macvtap's device node is made by the host's udev, if at all, by the link's index, which is not unique among
    // namespaces. Its number is in a sysfs of the network namespace: mounted where nobody else sees it.
    let node = private_node(name, index).map_err(error("find its device"))?;
    (0..queues)
        .map(|_| queue(&node, name, flags(queues)))
        .collect::<io::Result<_>>()
        .map_err(error("open a queue of the macvtap"))
}

/// A device node of the macvtap in a file system that goes with the calling thread.
fn private_node(name: &str, index: u32) -> io::Result<PathBuf> {
    use nix::mount::{MsFlags, mount};
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    const SYS: &str = "/sys";
    let mount = |kind: Option<&str>, target: &str, flags| {
        mount(kind, target, kind, flags, None::<&str>).map_err(io::Error::from)
    };
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
    mount(None, "/", MsFlags::MS_REC | MsFlags::MS_SLAVE)?;
    mount(Some("sysfs"), SYS, MsFlags::empty())?;
    let number = std::fs::read_to_string(format!("{SYS}/class/net/{name}/macvtap/tap{index}/dev"))?;
    let parts = number.trim().split_once(':');
    let parts = parts.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let (major, minor) = parts.ok_or_else(|| io::Error::other(format!("device number {number:?}")))?;
    mount(Some("tmpfs"), SYS, MsFlags::empty())?;
    let node = PathBuf::from(SYS).join(name);
    mknod(
        &node,
        SFlag::S_IFCHR,
        Mode::S_IRUSR | Mode::S_IWUSR,
        makedev(major, minor),
    )?;
    Ok(node)
}

fn flags(queues: usize) -> libc::c_int {
    let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several
}

fn queue(node: &Path, name: &str, flags: libc::c_int) -> io::Result<OwnedFd> {
    let file: File = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(node)?;
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0.
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .take(libc::IFNAMSIZ - 1)
        .zip(name.bytes())
    {
        *to = from.cast_signed();
    }
    // All flags fit 16 bits.
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: `request` is an ifreq that outlives the call.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } {
        0.. => Ok(file.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Removes the link `name` from `netns`. Fine when either is gone. Blocks.
///
/// # Errors
/// What the kernel says.
pub fn delete(netns: &Netns, name: &str) -> Result<()> {
    gone_is_fine(netns.netlink(async |handle| {
        let index = index(&handle, name).await?;
        let deleted = handle.link().del(index).execute().await;
        deleted.map_err(failed(name, "delete it"))
    }))
}

/// Removes the ingress qdisc of the link `name` with `index` from `netns`. Fine when any of them is gone. Blocks.
///
/// # Errors
/// What the kernel says.
pub fn delete_ingress(netns: &Netns, name: &str, index: u32) -> Result<()> {
    gone_is_fine(netns.netlink(async |handle| {
        // A link that took its name later is somebody else's.
        if self::index(&handle, name).await? != index || ingress(&handle, name, index).await?.is_none() {
            return Ok(());
        }
        remove_ingress(&handle, name, index).await
    }))
}

fn gone_is_fine(result: Result<()>) -> Result<()> {
    match result {
        Err(error) if error.is_gone() => Ok(()),
        result => result,
    }
}
