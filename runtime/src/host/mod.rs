//! Primitives of the host: what the kernel offers, without knowing what a sandbox does with it.
//!
//! Everything that outlives a crash is written into the [`journal`] before it is made; an [`Undo`](journal::Undo)
//! names a primitive of this module, never a resource. So nothing here imports `resource`, `sandbox` or anything else
//! above it.

pub mod bind;
pub mod cgroup;
pub mod journal;
pub mod mountinfo;
pub mod mounts;
pub mod netns;
mod overlay;
