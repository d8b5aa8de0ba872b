//! Virtual processors: one thread each, parked at a [`gate`](crate::lifecycle::gate) or inside KVM_RUN.

pub mod cpuid;
pub mod create;
pub mod kick;
pub mod metrics;
pub mod regs;
pub mod run;
pub mod state;
