//! A FUSE client over the fake ring: what a malicious or ordinary guest kernel can send.

mod additions;
mod bounds;
mod client;
mod confinement;
mod files;
mod hostile;
mod locks;
mod reach;
mod restore;
mod shares;
