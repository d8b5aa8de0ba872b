//! vCPUs that come and go while the guest runs.

use std::time::{Duration, Instant};

use crate::devices::cpu_hotplug::Cpu;
use crate::devices::ged::Event;
use crate::vcpu::create;
use crate::vcpu::run::VcpuThread;
use crate::vm::error::ResizeVcpuError;
use crate::vm::machine::{Machine, Vcpus};
use crate::vm::{Vm, VmState, lock};

impl Vm {
    /// Gives the guest `count` vCPUs: 1 to the maximum of the configuration. Returns how many it had and how many it has.
    ///
    /// New vCPUs are known to the guest when this returns; it is for the guest's user space to put them online. vCPUs are
    /// taken from the end, and the guest's kernel takes them offline itself. A resize waits for the one before it.
    ///
    /// # Errors
    /// [`ResizeVcpuError`]. After [`ResizeVcpuError::Guest`] the machine has the vCPUs the guest agreed to, and any number may be
    /// asked for again.
    pub fn resize_vcpu(&self, count: u8, timeout: Duration) -> Result<(u8, u8), ResizeVcpuError> {
        let _resize = lock(&self.resize);
        let started = Instant::now();
        let deadline = started.checked_add(timeout).unwrap_or(started);
        let hotplug = self.with_running(|machine| Ok(machine.vcpus.hotplug.clone()))?;
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
        let asked = self.with_running(|machine| machine.ask(&missing, &surplus));
        if let Err(error) = asked {
            for index in &changed {
                hotplug.settle(*index, before(missing.contains(index)));
            }
            self.park(&missing);
            return Err(error);
        }
        let answers = hotplug.wait(&changed, deadline);
        let (mut failures, mut gone) = (Vec::new(), Vec::new());
        for (index, answer) in changed.iter().zip(answers) {
            let inserted = missing.contains(index);
            let (settled, failure) = match answer {
                Cpu::Present | Cpu::Absent => (answer, None),
                Cpu::Refused(status) => (
                    before(inserted),
                    Some(format!("vCPU {index}: _OST status {status:#x}")),
                ),
                Cpu::Inserting | Cpu::Ejecting => {
                    (before(inserted), Some(format!("vCPU {index}: no answer")))
                }
            };
            hotplug.settle(*index, settled);
            failures.extend(failure);
            if settled == Cpu::Absent {
                gone.push(*index);
            }
        }
        self.park(&gone);
        let reached = present(&hotplug.cpus());
        tracing::info!(old, requested = count, reached, "vCPUs resized");
        if failures.is_empty() {
            return Ok((old, reached));
        }
        Err(ResizeVcpuError::Guest {
            requested: count,
            reached,
            waited: started.elapsed(),
            reason: failures.join(", "),
        })
    }

    /// Ends the threads of vCPUs the guest does not have. They may be at the closed gate, so not only while running.
    fn park(&self, indices: &[u8]) {
        let threads = match &mut *lock(&self.machine) {
            Some(machine) => machine.vcpus.take_threads(indices),
            None => return,
        };
        // A thread may be in the middle of an exit that takes the machine's lock.
        let spare: Vec<_> = threads.into_iter().filter_map(VcpuThread::retire).collect();
        if let Some(machine) = &mut *lock(&self.machine) {
            machine.vcpus.spare.extend(spare);
        }
    }

    fn with_running<T>(
        &self,
        operation: impl FnOnce(&mut Machine) -> Result<T, ResizeVcpuError>,
    ) -> Result<T, ResizeVcpuError> {
        match (self.state(), &mut *lock(&self.machine)) {
            (VmState::Running, Some(machine)) => operation(machine),
            (state, _) => Err(ResizeVcpuError::State(state)),
        }
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
    /// Makes the thread of vCPU `index`, with a vCPU that was used before if there is one.
    fn start_vcpu(&mut self, index: u8) -> Result<(), ResizeVcpuError> {
        let host = |reason: String| ResizeVcpuError::Host { index, reason };
        let vcpus = &mut self.vcpus;
        let spare = vcpus.spare.iter().position(|vcpu| vcpu.index == index);
        let vcpu = match spare {
            Some(position) => {
                let vcpu = vcpus.spare.swap_remove(position);
                create::wait_for_init(&vcpu.fd, index).map_err(|e| host(e.to_string()))?;
                vcpu
            }
            None => {
                let fd = create::create(&self.vm, &vcpus.context.model, index, vcpus.context.max)
                    .map_err(|e| host(e.to_string()))?;
                vcpus.context.connect(index, fd)
            }
        };
        let thread = vcpu.spawn().map_err(|e| host(e.to_string()))?;
        let position = vcpus.threads.partition_point(|thread| thread.index < index);
        vcpus.threads.insert(position, thread);
        Ok(())
    }

    /// Makes the threads of `missing` and asks the guest to take them and to give `surplus` back.
    fn ask(&mut self, missing: &[u8], surplus: &[u8]) -> Result<(), ResizeVcpuError> {
        for index in missing {
            self.start_vcpu(*index)?;
        }
        for index in missing {
            self.vcpus.hotplug.insert(*index);
        }
        for index in surplus {
            self.vcpus.hotplug.eject(*index);
        }
        let notified = self.board.ged.notify(Event::Processors);
        notified.map_err(|error| ResizeVcpuError::Host {
            index: missing.iter().chain(surplus).copied().next().unwrap_or(0),
            reason: format!("interrupt of the generic event device: {error}"),
        })
    }
}

impl Vcpus {
    fn take_threads(&mut self, indices: &[u8]) -> Vec<VcpuThread> {
        self.threads
            .extract_if(.., |thread| indices.contains(&thread.index))
            .collect()
    }
}
