//! A FUSE client over the fake ring: what a malicious or ordinary guest kernel can send.

mod bounds;
mod client;
mod confinement;
mod files;
mod hostile;
mod restore;
mod shares;
