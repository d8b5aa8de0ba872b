//! What the end-to-end tests share: a private containerd, a busybox image built on the spot, `ctr` with a
//! time limit on every call, the event stream, and the comparison of the host before and after.
//!
//! `make e2e` builds everything and runs them in the right place; a part of them with
//! `make e2e BINARIES=e2e TEST_ARGS=hello`. The suite itself is checked against Debian's runc, without
//! anything of ours: `E2E_RUNTIME=io.containerd.runc.v2 cargo test -p tests --features e2e --test e2e`.
//!
//! The tests use only what a user uses: containerd, `ctr` and the installed runtime. They are ordinary Rust
//! test binaries, run as root wherever KVM runs Linux, and inside the lab everywhere else. The environment
//! variables that steer them are listed in [`settings`].

pub mod case;
pub mod command;
pub mod containerd;
pub mod cri;
pub mod diagnosis;
pub mod events;
pub mod grpc;
pub mod hijack;
pub mod hvsock;
pub mod image;
pub mod leftovers;
pub mod settings;
pub mod spec;
pub mod task_api;
pub mod terminal;
pub mod timeline;

pub use case::{Case, Container};
pub use command::{Finished, Running};
pub use settings::Settings;
