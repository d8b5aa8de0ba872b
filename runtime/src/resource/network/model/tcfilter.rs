//! A TAP beside the link, and a filter on each that sends what comes in out of the other (`tc … mirred egress redirect`).

use std::os::fd::OwnedFd;

use rtnetlink::Handle;

use super::Work;
use crate::host::journal::Undo;
use crate::host::link;
use crate::resource::network::error::NetworkError;

pub(super) async fn connect(handle: &Handle, work: &mut Work<'_>) -> Result<Vec<OwnedFd>, NetworkError> {
    let (tap, queues) = work.make_tap(handle).await?;
    let (name, index, failed) = (work.link.name.clone(), work.link.index, work.failed());
    let taken = link::ingress(handle, &name, index).await.map_err(&failed)?;
    if let Some(qdisc) = taken {
        return Err(NetworkError::Taken { link: name, qdisc });
    }
    work.note(Undo::DeleteIngress {
        netns: work.netns.clone(),
        link: name.clone(),
        index,
    })?;
    link::add_ingress(handle, &name, index).await.map_err(&failed)?;
    // What is on the TAP goes with it.
    link::add_ingress(handle, work.tap, tap)
        .await
        .map_err(NetworkError::Link)?;
    link::redirect(handle, work.tap, tap, index)
        .await
        .map_err(NetworkError::Link)?;
    // From here on the namespace itself hears nothing any more.
    link::redirect(handle, &name, index, tap).await.map_err(&failed)?;
    Ok(queues)
}
