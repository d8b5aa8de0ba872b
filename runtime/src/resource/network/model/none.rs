//! A TAP in the namespace, which somebody else connects to whatever they like.

use std::os::fd::OwnedFd;

use rtnetlink::Handle;

use super::Work;
use crate::resource::network::error::NetworkError;

pub(super) async fn connect(handle: &Handle, work: &mut Work<'_>) -> Result<Vec<OwnedFd>, NetworkError> {
    work.make_tap(handle).await.map(|(_, queues)| queues)
}
