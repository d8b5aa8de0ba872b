//! How a link of the namespace and the guest's interface are connected.

mod macvtap;
mod none;
mod tcfilter;

use std::os::fd::OwnedFd;

use rtnetlink::Handle;
use rtnetlink::packet_route::link::InfoKind;

use super::error::NetworkError;
use super::scan::Link;
use crate::config::InternetworkingModel;
use crate::host::journal::{Journal, Undo};
use crate::host::link;
use crate::host::netns::Netns;

/// What is made for one link, and how to undo it: noted in the journal before it is made.
pub struct Work<'a> {
    /// The namespace.
    pub netns: &'a Netns,
    /// Where it is noted.
    pub journal: &'a Journal,
    /// The link.
    pub link: &'a Link,
    /// Name of the TAP or macvtap to be made.
    pub tap: &'a str,
    /// Its queues.
    pub queues: usize,
    /// What has been noted.
    pub undo: Vec<Undo>,
}

impl Work<'_> {
    fn note(&mut self, undo: Undo) -> Result<(), NetworkError> {
        self.journal.record(&undo)?;
        self.undo.push(undo);
        Ok(())
    }

    fn failed(&self) -> impl Fn(link::LinkError) -> NetworkError + use<> {
        let name = self.link.name.clone();
        move |source| NetworkError::link(&name, source)
    }

    /// Makes the TAP, with the link's MTU. It is nobody's but the guest's: the namespace has no business on it.
    async fn make_tap(&mut self, handle: &Handle) -> Result<(u32, Vec<OwnedFd>), NetworkError> {
        self.note(Undo::DeleteLink {
            netns: self.netns.clone(),
            link: self.tap.to_owned(),
        })?;
        let queues = link::open_tap(self.tap, self.queues).map_err(NetworkError::Link)?;
        self.take_into_use(handle).await.map(|index| (index, queues))
    }

    async fn take_into_use(&self, handle: &Handle) -> Result<u32, NetworkError> {
        let index = link::index(handle, self.tap).await.map_err(NetworkError::Link)?;
        super::sysctl::disable_ipv6(self.tap);
        link::set_up(handle, self.tap, index, self.link.mtu)
            .await
            .map_err(NetworkError::Link)?;
        Ok(index)
    }
}

/// Whether it is a TAP that nobody has open: it has been made for the guest, whose frames are the namespace's on it.
pub fn is_guests(link: &Link) -> bool {
    link.kind == Some(InfoKind::Tun) && !link.running
}

/// Connects the link and returns the queues for the guest's interface. The calling thread is in the namespace.
///
/// # Errors
/// [`NetworkError`]; what was made until then is in [`Work::undo`].
pub async fn connect(
    model: InternetworkingModel,
    handle: &Handle,
    work: &mut Work<'_>,
) -> Result<Vec<OwnedFd>, NetworkError> {
    if is_guests(work.link) {
        return link::open_tap(&work.link.name, work.queues).map_err(work.failed());
    }
    match model {
        InternetworkingModel::TcFilter => tcfilter::connect(handle, work).await,
        InternetworkingModel::MacVtap => macvtap::connect(handle, work).await,
        InternetworkingModel::None => none::connect(handle, work).await,
    }
}
