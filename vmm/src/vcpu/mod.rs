//! Virtual processors: one thread each, parked at a [`gate`] or inside KVM_RUN.

pub mod cpuid;
pub mod factory;
pub mod gate;
pub mod kick;
pub mod metrics;
pub mod regs;
pub mod run;
pub mod state;
