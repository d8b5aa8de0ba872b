//! Wrong configurations and hosts: one clear line that names the object, a code, and nothing left behind.

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod cli;
mod configuration;
mod hooks;
mod host;
mod refusal;
