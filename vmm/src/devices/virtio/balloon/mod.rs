//! virtio-balloon (virtio 1.2, section 5.5): the guest gives memory back to the host while it keeps its size.
//!
//! Three ways, independent of each other: the balloon, whose size the host chooses; free page reporting, by which the
//! guest tells of memory it does not use (and may use again at any time, without asking); and statistics, which help to
//! choose the balloon's size. What the guest gives is freed at once.

pub mod config;
mod device;
mod release;
mod state;
mod statistics;
#[cfg(test)]
mod tests;
mod worker;

pub use device::{Balloon, BalloonError, BalloonStatus};
pub use statistics::BalloonStatistics;
