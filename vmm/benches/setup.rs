//! How long a machine takes from `Vm::new` to its first instruction's effect (1 vCPU, 512 MiB, a guest of a few bytes): the
//! first of the process, and the distribution over the following ones. Needs no KVM that runs Linux.
//!
//! `cargo bench -p dragonball --bench setup`

// All of it is a benchmark; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]

#[path = "../tests/guest/mod.rs"]
mod guest;

use std::time::{Duration, Instant};

use dragonball::Vm;
use dragonball::config::MemoryConfig;
use guest::{Code, LONG, Scratch};

const ROUNDS: usize = 200;
const MEMORY_MIB: u64 = 512;

/// One machine: time of `Vm::new` (its vCPU thread is ready to call KVM_RUN) and until its guest has ended itself.
fn once(scratch: &Scratch, code: &Code) -> (Duration, Duration) {
    let mut config = guest::config(scratch, code);
    config.memory = MemoryConfig::fixed(MEMORY_MIB);
    let started = Instant::now();
    let vm = Vm::new(config).unwrap();
    let built = started.elapsed();
    vm.start().unwrap();
    vm.wait_timeout(LONG).expect("the guest ends by itself");
    (built, started.elapsed())
}

fn report(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    println!(
        "{what}: p50 {:?} p99 {:?} max {:?} (n = {})",
        at(50),
        at(99),
        at(100),
        times.len()
    );
}

fn main() {
    let scratch = Scratch::new();
    let code = Code::default().power_off();
    let (first, first_end) = once(&scratch, &code);
    println!("first of the process: Vm::new {first:?}, to the end of the guest {first_end:?}");
    let rounds: Vec<_> = (0..ROUNDS).map(|_| once(&scratch, &code)).collect();
    report("following: Vm::new", rounds.iter().map(|r| r.0).collect());
    report(
        "following: to the end of the guest",
        rounds.iter().map(|r| r.1).collect(),
    );
}
