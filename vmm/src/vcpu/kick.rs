//! Getting a vCPU thread out of KVM_RUN.
//!
//! A real-time signal interrupts the ioctl. One that arrives just before the ioctl would be lost, so its handler sets
//! `kvm_run.immediate_exit` of the thread it runs on: the next KVM_RUN returns at once (Linux
//! Documentation/virt/kvm/api.rst, "immediate_exit").

#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::ptr;
use std::sync::OnceLock;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    /// `kvm_run` of the vCPU this thread runs. Constant initialisation and no destructor: safe to read in a handler.
    static CURRENT: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that kicks vCPU threads.
pub fn signal() -> c_int {
    SIGRTMIN()
}

extern "C" fn handler(_signal: c_int, _info: *mut siginfo_t, _context: *mut c_void) {
    let run = CURRENT.get();
    if !run.is_null() {
        // SAFETY: `CURRENT` is non-null only while a `Registration` of this thread keeps its vCPU's kvm_run mapping alive.
        // The byte is written volatile because the kernel reads it; nothing else on this thread runs meanwhile.
        unsafe { ptr::write_volatile(&raw mut (*run).immediate_exit, 1) };
    }
}

/// Installs the handler, once per process.
///
/// # Errors
/// sigaction failed.
pub fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    INSTALLED
        .get_or_init(|| register_signal_handler(signal(), handler).map_err(|e| e.errno()))
        .map_err(io::Error::from_raw_os_error)
}

/// Lets kicks reach the calling thread, whatever the thread that made it had blocked: a mask is inherited.
///
/// # Errors
/// pthread_sigmask failed.
pub fn unblock() -> io::Result<()> {
    vmm_sys_util::signal::unblock_signal(signal()).map_err(|error| match error {
        // How vmm-sys-util says it: with the error number inside.
        vmm_sys_util::signal::Error::UnblockSignal(errno) => io::Error::from_raw_os_error(errno.errno()),
        other => io::Error::other(other.to_string()),
    })
}

/// While it lives, kicks reach the vCPU. Bound to the thread that made it.
pub struct Registration {
    /// Keeps the type on its thread.
    _thread: PhantomData<*mut ()>,
}

impl Registration {
    /// Registers `vcpu` as the one this thread runs. It must be dropped before `vcpu`.
    pub fn new(vcpu: &mut VcpuFd) -> Self {
        CURRENT.set(ptr::from_mut(vcpu.get_kvm_run()));
        Self { _thread: PhantomData }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        CURRENT.set(ptr::null_mut());
    }
}
