//! Virtqueues: chains of descriptors, a queue that is served, and when the driver hears of it.

pub mod chain;
pub mod moderation;
pub mod ring;
pub mod served_queue;
