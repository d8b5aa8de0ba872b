//! virtio-fs (virtio 1.2, section 5.11): a host directory in the guest, FUSE requests over virtqueues.
//!
//! Messages (`message`), operations (`server`) and the file system behind them (`share::Share`) are ours, over the types
//! of fuse-backend-rs. The share is served inside the process that also holds KVM, the containerd socket and the agent's
//! streams, and the crate's `Server` and `PassthroughFs` (0.14) trust their client more than that allows:
//! - `Server` reads a request's header from memory the guest can still change, allocates what it says (IOCTL: up to
//!   4 GiB), logs whole requests, and makes an enum of any number below 50;
//! - an error of F_SETFL in its `read` and `write` closes a descriptor that the handle table still owns, and a guest
//!   can cause that (open with O_PATH, then read), i.e. read and write whatever the number is used for next;
//! - `..` is resolved, symbolic links are followed when a create request carries O_PATH;
//! - a mapping is kept for ever for every inode number ever seen, descriptors have no limit;
//! - it negotiates no MAX_PAGES, so a write carries 4 KiB.
//!
//! | thread | works on |
//! |---|---|
//! | `fs-<id>-0..n` | all queues, in parallel; own mount namespace with nothing in it, own umask and directory; confined as `Role::Fs` |

mod additions;
pub mod config;
mod credentials;
mod descriptors;
mod device;
mod device_nodes;
mod directory;
mod filesystem;
mod handle;
mod inodes;
mod jail;
mod locks;
mod message;
mod mounts;
mod open_files;
mod reach;
mod server;
mod share;
mod state;
mod sys;
#[cfg(test)]
mod tests;
mod waiting;
mod worker;

pub use device::{Fs, FsError};
pub use handle::{FsHandle, FsMountError, Unmount};
