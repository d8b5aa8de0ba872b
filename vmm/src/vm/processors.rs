//! vCPUs that come and go while the guest runs.

use std::time::{Duration, Instant};

use crate::devices::cpu_hotplug::Cpu;
use crate::devices::ged::Event;
use crate::vm::error::{ResizeVcpuError, VcpuRefusal};
use crate::vm::machine::Machine;
use crate::vm::{Vm, VmState, lock};

impl Vm {
    /// Gives the guest `count` vCPUs: 1 to the maximum of the configuration. Returns how many it had and how many it has.
    ///
    /// New vCPUs are known to the guest when this returns; it is for the guest's user space to put them online. vCPUs are
    /// taken from the end, and the guest's kernel takes them offline itself. It waits for other resizes, hotplug and saves.
    ///
    /// # Errors
    /// [`ResizeVcpuError`]. After [`ResizeVcpuError::Guest`] the machine has the vCPUs the guest agreed to, and any number may be
    /// asked for again.
    pub fn resize_vcpu(&self, count: u8, timeout: Duration) -> Result<(u8, u8), ResizeVcpuError> {
        let _operation = lock(&self.operation);
        let started = Instant::now();
        let deadline = started.checked_add(timeout).unwrap_or(started);
        let machine = match (self.state(), self.machine.get()) {
            (VmState::Running, Some(machine)) => machine,
            (state, _) => return Err(ResizeVcpuError::State(state)),
        };
        let hotplug = &machine.vcpus.hotplug;
        let cpus = hotplug.cpus();
        let max = u8::try_from(cpus.len()).unwrap_or(u8::MAX);
        if count == 0 || count > max {
            return Err(ResizeVcpuError::Vcpus {
                requested: count,
                max,
            });
        }
        let old = present(&cpus);
        let with = |wanted: Cpu| {
            (0u8..)
                .zip(&cpus)
                .filter(move |(_, cpu)| **cpu == wanted)
                .map(|(i, _)| i)
        };
        let missing: Vec<u8> = with(Cpu::Absent).filter(|index| *index < count).collect();
        let surplus: Vec<u8> = with(Cpu::Present).filter(|index| *index >= count).collect();
        let changed = [&missing[..], &surplus].concat();
        if changed.is_empty() {
            return Ok((old, old));
        }
        if let Err(error) = machine.ask(count, &missing, &surplus) {
            for index in &changed {
                hotplug.settle(*index, before(missing.contains(index)));
            }
            machine.vcpus.park(&missing);
            return Err(error);
        }
        let answers = hotplug.wait(&changed, deadline);
        let (mut refusals, mut gone) = (Vec::new(), Vec::new());
        for (index, answer) in changed.iter().zip(answers) {
            let inserted = missing.contains(index);
            let (settled, refusal) = match answer {
                Cpu::Present | Cpu::Absent => (answer, None),
                Cpu::Refused(status) => (
                    before(inserted),
                    Some(VcpuRefusal::Refused {
                        index: *index,
                        status,
                    }),
                ),
                Cpu::Inserting | Cpu::Ejecting => {
                    (before(inserted), Some(VcpuRefusal::Silent { index: *index }))
                }
            };
            hotplug.settle(*index, settled);
            refusals.extend(refusal);
            if settled == Cpu::Absent {
                gone.push(*index);
            }
        }
        machine.vcpus.park(&gone);
        let reached = present(&hotplug.cpus());
        tracing::info!(old, requested = count, reached, "vCPUs resized");
        if refusals.is_empty() {
            return Ok((old, reached));
        }
        Err(ResizeVcpuError::Guest {
            requested: count,
            reached,
            waited: started.elapsed(),
            refusals,
        })
    }
}

/// Where a processor stays when the guest does not agree.
fn before(inserted: bool) -> Cpu {
    if inserted { Cpu::Absent } else { Cpu::Present }
}

fn present(cpus: &[Cpu]) -> u8 {
    let count = cpus.iter().filter(|cpu| **cpu != Cpu::Absent).count();
    u8::try_from(count).unwrap_or(u8::MAX)
}

impl Machine {
    /// Makes the threads of `missing` and asks the guest to take them and to give `surplus` back.
    fn ask(&self, requested: u8, missing: &[u8], surplus: &[u8]) -> Result<(), ResizeVcpuError> {
        for index in missing {
            self.vcpus.start(&self.vm, *index)?;
        }
        for index in missing {
            self.vcpus.hotplug.insert(*index);
        }
        for index in surplus {
            self.vcpus.hotplug.eject(*index);
        }
        let notified = self.board.ged.notify(Event::Processors);
        notified.map_err(|source| ResizeVcpuError::Interrupt { requested, source })
    }
}
