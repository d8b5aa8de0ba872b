//! A macvtap on top of the link, in pass-through mode: it gets all of the link's frames and has its hardware address.

use std::os::fd::OwnedFd;

use rtnetlink::Handle;
use rtnetlink::packet_route::link::InfoKind;

use super::Work;
use crate::host::journal::Undo;
use crate::host::link;
use crate::resource::network::error::NetworkError;

pub(super) async fn connect(handle: &Handle, work: &mut Work<'_>) -> Result<Vec<OwnedFd>, NetworkError> {
    // The kernel puts a macvtap on a macvlan beside it instead, and the frames of others do not pass.
    if work.link.kind != Some(InfoKind::Veth) {
        return Err(NetworkError::Unsupported {
            link: work.link.name.clone(),
            kind: super::super::endpoint::kind(work.link),
            carries: "is the pod's".to_owned(),
            reason: "internetworking_model = \"macvtap\" is for veth only, \"tcfilter\" is for all",
        });
    }
    work.note(Undo::DeleteLink {
        netns: work.netns.clone(),
        link: work.tap.to_owned(),
    })?;
    link::add_macvtap(handle, work.tap, work.link.index)
        .await
        .map_err(work.failed())?;
    let index = work.take_into_use(handle).await?;
    link::open_macvtap(work.tap, index, work.queues).map_err(NetworkError::Link)
}
