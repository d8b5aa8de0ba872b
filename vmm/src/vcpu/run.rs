//! The vCPU thread: gate, KVM_RUN, dispatch, again.

#![allow(unsafe_code)]

use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Bus;
use crate::confinement::{Confinement, Role, Thread};
use crate::lifecycle::gate::Passage;
use crate::lifecycle::{ExitReason, Failure, Lifecycle, VcpuFailure, errno_of};
use crate::vcpu::kick;
use crate::vcpu::metrics::VcpuCounters;

/// KVM_SYSTEM_EVENT_SHUTDOWN, _RESET and _CRASH (linux/kvm.h).
const SYSTEM_EVENT_SHUTDOWN: u32 = 1;
const SYSTEM_EVENT_RESET: u32 = 2;
const SYSTEM_EVENT_CRASH: u32 = 3;

/// A vCPU about to get its thread.
#[derive(Debug)]
pub struct Vcpu {
    /// Index and APIC id.
    pub index: u8,
    /// KVM's side of it.
    pub fd: VcpuFd,
    /// Port I/O.
    pub pio: Arc<Bus>,
    /// Memory-mapped I/O.
    pub mmio: Arc<Bus>,
    /// Where the machine's end is reported.
    pub lifecycle: Arc<Lifecycle>,
    /// Exits.
    pub counters: Arc<VcpuCounters>,
    /// What its thread gives up.
    pub confinement: Confinement,
    /// A port or memory access was answered, and KVM has not finished its instruction.
    pub unfinished: bool,
}

/// A running vCPU thread.
#[derive(Debug)]
pub struct VcpuThread {
    /// vCPU index.
    pub index: u8,
    /// Set by the thread itself; nobody waits for it to start.
    tid: Arc<OnceLock<i32>>,
    /// Its counters.
    pub counters: Arc<VcpuCounters>,
    leaving: Arc<AtomicBool>,
    lifecycle: Arc<Lifecycle>,
    thread: Thread<Vcpu>,
}

impl VcpuThread {
    /// Kernel thread id, for cgroups and scheduling; waits until the thread has started.
    pub fn tid(&self) -> i32 {
        *self.tid.wait()
    }

    /// Gets the thread out of KVM_RUN and to the gate.
    pub fn kick(&self) {
        // SAFETY: the thread is not joined while `self` exists, so its pthread_t is valid; the handler is installed
        // before any vCPU thread is made.
        let error = unsafe { libc::pthread_kill(self.thread.pthread(), kick::signal()) };
        if error != 0 {
            tracing::debug!(vcpu = self.index, error, "vCPU thread has already ended");
        }
    }

    /// Waits for the thread to end; gives its vCPU back unless the thread panicked.
    pub fn join(self) -> Option<Vcpu> {
        let vcpu = self.thread.join();
        if vcpu.is_none() {
            tracing::error!(vcpu = self.index, "vCPU thread panicked");
        }
        vcpu
    }

    /// Ends this one thread, whatever the others do.
    pub fn retire(self) -> Option<Vcpu> {
        self.leaving.store(true, Ordering::Release);
        self.lifecycle.gate().nudge();
        self.kick();
        self.join()
    }
}

/// Tells the lifecycle that a vCPU thread is gone, also when it unwinds.
struct Leaving(Arc<Lifecycle>);

impl Drop for Leaving {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.finish(ExitReason::Failure(Failure::VcpuPanicked));
        }
        self.0.gate().leave();
    }
}

impl Vcpu {
    /// Starts the thread, which gives up what it does not need and passes the gate.
    ///
    /// # Errors
    /// The host refuses the thread, or its confinement; the vCPU is lost with it.
    pub fn spawn(self) -> io::Result<VcpuThread> {
        let (index, counters, lifecycle) = (self.index, self.counters.clone(), self.lifecycle.clone());
        let leaving = Arc::new(AtomicBool::new(false));
        let tid = Arc::new(OnceLock::new());
        let own_tid = tid.clone();
        lifecycle.gate().join();
        let told = leaving.clone();
        let thread = self
            .confinement
            .spawn(Role::Vcpu, &format!("vcpu{index}"), move || {
                let leaving = Leaving(self.lifecycle.clone());
                // SAFETY: gettid has no arguments and cannot fail.
                own_tid.get_or_init(|| unsafe { libc::gettid() });
                let vcpu = self.run(&told);
                drop(leaving);
                vcpu
            })
            .inspect_err(|_| lifecycle.gate().leave())?;
        Ok(VcpuThread {
            index,
            tid,
            counters,
            leaving,
            lifecycle,
            thread,
        })
    }

    fn run(mut self, leaving: &AtomicBool) -> Self {
        let registration = kick::Registration::new(&mut self.fd);
        let lifecycle = self.lifecycle.clone();
        if let Err(error) = kick::unblock() {
            let failure = VcpuFailure::Signal(errno_of(&error));
            lifecycle.finish(self.failed(failure));
        }
        loop {
            match lifecycle.gate().pass(leaving, || self.finish_instruction()) {
                Passage::Open => {}
                Passage::Reopened => self.tell_kvmclock(),
                Passage::End => break,
            }
            self.step();
        }
        drop(registration);
        self
    }

    /// One KVM_RUN and what it came back for.
    fn step(&mut self) {
        if let ControlFlow::Break(reason) = self.run_once() {
            tracing::info!(vcpu = self.index, %reason, "machine ends");
            self.lifecycle.finish(reason);
        }
    }

    /// Lets KVM finish the instruction whose port or memory access was answered last. Until it has, registers are those from
    /// before the instruction, and a vCPU that gets them would execute it again (Documentation/virt/kvm/api.rst, KVM_RUN:
    /// operations are complete only after KVM_RUN is called again; with `immediate_exit` it does nothing else).
    fn finish_instruction(&mut self) {
        // More than once for an instruction with several accesses: wide operands, strings.
        while self.unfinished {
            self.fd.set_kvm_immediate_exit(1);
            self.step();
        }
    }

    /// Tells the guest's watchdogs that it was not running. The guest may not use kvmclock (yet): EINVAL.
    fn tell_kvmclock(&self) {
        if let Err(error) = self.fd.kvmclock_ctrl()
            && error.errno() != libc::EINVAL
        {
            tracing::debug!(vcpu = self.index, %error, "KVM_KVMCLOCK_CTRL failed");
        }
    }

    fn run_once(&mut self) -> ControlFlow<ExitReason> {
        let exit = self.fd.run();
        self.unfinished = matches!(
            exit,
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..) | VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..))
        );
        let failure = match exit {
            Ok(VcpuExit::IoIn(port, data)) => {
                VcpuCounters::count(&self.counters.pio_in);
                self.pio.read(u64::from(port), data);
                return ControlFlow::Continue(());
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                VcpuCounters::count(&self.counters.pio_out);
                return self.pio.write(u64::from(port), data);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                VcpuCounters::count(&self.counters.mmio_read);
                self.mmio.read(address, data);
                return ControlFlow::Continue(());
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                VcpuCounters::count(&self.counters.mmio_write);
                return self.mmio.write(address, data);
            }
            Ok(VcpuExit::Shutdown) => return ControlFlow::Break(ExitReason::TripleFault),
            Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_SHUTDOWN, _)) => {
                return ControlFlow::Break(ExitReason::PowerOff);
            }
            Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_RESET, _)) => {
                return ControlFlow::Break(ExitReason::Reboot);
            }
            Ok(VcpuExit::SystemEvent(SYSTEM_EVENT_CRASH, _)) => return ControlFlow::Break(ExitReason::Panic),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => return ControlFlow::Continue(()),
            Ok(VcpuExit::InternalError) => self.internal_error(),
            Ok(VcpuExit::FailEntry(reason, _)) => VcpuFailure::Entry(reason),
            Ok(other) => VcpuFailure::Exit(format!("{other:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                VcpuCounters::count(&self.counters.interrupted);
                self.fd.set_kvm_immediate_exit(0);
                return ControlFlow::Continue(());
            }
            Err(error) => VcpuFailure::Run(error),
        };
        let index = self.index;
        match self.fd.get_regs() {
            Ok(regs) => tracing::error!(vcpu = index, %failure, ?regs, "vCPU failed"),
            Err(error) => {
                tracing::error!(vcpu = index, %failure, %error, "vCPU failed, registers unreadable");
            }
        }
        ControlFlow::Break(self.failed(failure))
    }

    fn failed(&self, failure: VcpuFailure) -> ExitReason {
        let index = self.index;
        ExitReason::Failure(Failure::Vcpu { index, failure })
    }

    fn internal_error(&mut self) -> VcpuFailure {
        // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, for which KVM fills this member of the union.
        let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        VcpuFailure::Internal { suberror, rip }
    }
}
