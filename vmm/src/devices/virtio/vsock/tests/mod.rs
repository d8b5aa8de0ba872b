//! The device against a fake guest, over real rings in guest memory and the real I/O loop.

mod attach;
mod driver;
mod endpoint;
mod flow;
mod hostile;
mod lifecycle;
mod restore;
mod stack;
mod streams;
