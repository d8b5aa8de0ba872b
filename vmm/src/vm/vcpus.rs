//! The processors of a machine: who has a thread, who is kept for later.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use kvm_ioctls::{VcpuFd, VmFd};

use crate::devices::cpu_hotplug::CpuHotplug;
use crate::vcpu::create::{self, VcpuContext};
use crate::vcpu::kick;
use crate::vcpu::metrics::VcpuMetrics;
use crate::vcpu::run::{Vcpu, VcpuThread};
use crate::vm::error::{BuildError, ResizeVcpuError, StartVcpuError};
use crate::vm::lock;

/// The processors of a machine.
#[derive(Debug)]
pub struct Vcpus {
    /// Locked for as long as it takes to read or change it, and while all threads are stopped for a save; never while
    /// waiting for a guest or a file.
    list: Mutex<List>,
    /// What they have in common.
    pub context: VcpuContext,
    /// What the guest knows of them.
    pub hotplug: Arc<CpuHotplug>,
}

/// A vCPU was stopped, and the host refuses it another thread.
#[derive(Debug, thiserror::Error)]
#[error("vCPU {index}: {source}")]
pub struct NoThread {
    /// vCPU index.
    pub index: u8,
    /// Cause.
    pub source: io::Error,
}

#[derive(Debug, Default)]
struct List {
    /// At the gate or in the guest, by ascending index.
    threads: Vec<VcpuThread>,
    /// vCPUs the guest gave back: KVM keeps them as long as the VM, so they are used again.
    spare: Vec<Vcpu>,
    /// The machine ends: there will be no threads any more.
    ended: bool,
}

impl Vcpus {
    /// No processors yet.
    pub fn new(context: VcpuContext, hotplug: Arc<CpuHotplug>) -> Self {
        Self {
            list: Mutex::default(),
            context,
            hotplug,
        }
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        lock(&self.list)
    }

    /// Makes the threads of vCPUs given by ascending index.
    ///
    /// # Errors
    /// [`BuildError::Host`].
    pub fn start_all(&self, vcpus: impl IntoIterator<Item = (u8, VcpuFd)>) -> Result<(), BuildError> {
        let host = |what| move |source| BuildError::Host { what, source };
        kick::install_handler().map_err(host("signal handler"))?;
        for (index, fd) in vcpus {
            let thread = self.context.connect(index, fd).spawn();
            self.lock().threads.push(thread.map_err(host("vCPU thread"))?);
        }
        Ok(())
    }

    /// Makes the thread of vCPU `index` of `vm`, with a vCPU that was used before if there is one.
    ///
    /// # Errors
    /// [`ResizeVcpuError::Host`].
    pub fn start(&self, vm: &VmFd, index: u8) -> Result<(), ResizeVcpuError> {
        self.try_start(vm, index)
            .map_err(|source| ResizeVcpuError::Host { index, source })
    }

    fn try_start(&self, vm: &VmFd, index: u8) -> Result<(), StartVcpuError> {
        let mut list = self.lock();
        if list.ended {
            return Err(StartVcpuError::Ending);
        }
        let spare = list.spare.iter().position(|vcpu| vcpu.index == index);
        let vcpu = match spare {
            Some(position) => {
                let vcpu = list.spare.swap_remove(position);
                create::wait_for_init(&vcpu.fd, index)?;
                vcpu
            }
            None => {
                let fd = create::create(vm, &self.context.model, index, self.context.max)?;
                self.context.connect(index, fd)
            }
        };
        let thread = vcpu.spawn()?;
        let position = list.threads.partition_point(|thread| thread.index < index);
        list.threads.insert(position, thread);
        Ok(())
    }

    /// Ends the threads of vCPUs the guest does not have, and keeps the vCPUs.
    pub fn park(&self, indices: &[u8]) {
        let threads: Vec<_> = self
            .lock()
            .threads
            .extract_if(.., |thread| indices.contains(&thread.index))
            .collect();
        // Not locked: one may be in the middle of an exit.
        let spare: Vec<_> = threads.into_iter().filter_map(VcpuThread::retire).collect();
        let mut list = self.lock();
        if !list.ended {
            list.spare.extend(spare);
        }
    }

    /// Gets all threads out of KVM_RUN and to the gate.
    pub fn kick(&self) {
        for thread in &self.lock().threads {
            thread.kick();
        }
    }

    /// Runs `operation` on all vCPUs, whose threads end before and are made again after it (a vCPU belongs to its thread).
    /// They are parked, and wait at the gate again.
    ///
    /// # Errors
    /// The first vCPU whose thread cannot be made again.
    pub fn stopped<T>(&self, operation: impl FnOnce(&[Vcpu]) -> T) -> Result<T, NoThread> {
        let mut list = self.lock();
        let threads = std::mem::take(&mut list.threads);
        let vcpus: Vec<Vcpu> = threads.into_iter().filter_map(VcpuThread::retire).collect();
        let result = operation(&vcpus);
        for vcpu in vcpus {
            let index = vcpu.index;
            let thread = vcpu.spawn().map_err(|source| NoThread { index, source })?;
            list.threads.push(thread);
        }
        Ok(result)
    }

    /// Ends all threads; the gate must have been ended before. None runs any more when this returns, and there will be no
    /// others.
    pub fn end(&self) {
        let threads = {
            let mut list = self.lock();
            list.ended = true;
            std::mem::take(&mut list.threads)
        };
        for thread in &threads {
            thread.kick();
        }
        for thread in threads {
            thread.join();
        }
        // Those somebody else ends just now ([`Vcpus::park`]).
        self.context.lifecycle.gate().wait_left();
    }

    /// Indices and kernel thread ids.
    pub fn thread_ids(&self) -> Vec<(u8, i32)> {
        let list = self.lock();
        list.threads.iter().map(|vcpu| (vcpu.index, vcpu.tid())).collect()
    }

    /// Number of threads.
    pub fn count(&self) -> usize {
        self.lock().threads.len()
    }

    /// Exits, by ascending index.
    pub fn metrics(&self) -> Vec<VcpuMetrics> {
        let list = self.lock();
        list.threads.iter().map(|vcpu| vcpu.counters.snapshot()).collect()
    }
}
