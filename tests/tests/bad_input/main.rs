//! Wrong configurations and hosts: one clear line that names the object, a code, and nothing left behind.

mod cli;
mod configuration;
mod hooks;
mod host;
mod refusal;
