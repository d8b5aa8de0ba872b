//! The agent as the runtime sees it: every test starts one in namespaces of its own and drives it over ttrpc.
//! Needs root and busybox-static.

mod errors;
mod exec;
mod harness;
mod hooks;
mod lifecycle;
mod mounts;
mod stdio;
