//! Primitives of the host: what the kernel offers, without knowing what a sandbox does with it.
//!
//! Everything that outlives a crash is written into the [`journal`] before it is made; an [`Undo`](journal::Undo)
//! names a primitive of this module, never a resource. So nothing here imports `resource`, `sandbox` or anything else
//! above it.

pub mod bind;
pub mod cgroup;
pub mod journal;
pub mod link;
pub mod mkdir;
pub mod mountinfo;
pub mod mounts;
pub mod netns;
mod overlay;
pub mod sk_lookup;

use crate::error::{Error, ErrorKind, Result};

/// Runs `call`, which may block, on a thread where it holds nobody up. It runs to its end even if the caller goes away.
///
/// # Errors
/// Those of `call`; `Internal` naming `what` when it panics.
pub async fn blocking<T: Send + 'static>(
    what: &'static str,
    call: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let result = tokio::task::spawn_blocking(call).await;
    result.unwrap_or_else(|error| Err(Error::new(ErrorKind::Internal, format!("{what}: {error}"))))
}
