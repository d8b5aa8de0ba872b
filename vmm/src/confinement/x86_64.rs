//! The registers of a system call (Linux x86-64 ABI: number and result in rax, arguments in rdi, rsi, rdx, r10, r8, r9).

#![allow(unsafe_code)]

use std::marker::PhantomData;

/// The registers a signal handler returns to.
#[derive(Debug)]
pub(super) struct Registers<'c> {
    context: *mut libc::ucontext_t,
    _context: PhantomData<&'c mut libc::ucontext_t>,
}

impl Registers<'_> {
    /// # Safety
    /// `context` is what the kernel gave a handler with SA_SIGINFO, as long as that runs; nobody else refers to it.
    pub(super) unsafe fn of(context: *mut libc::c_void) -> Self {
        Self {
            context: context.cast(),
            _context: PhantomData,
        }
    }

    fn get(&self, register: libc::c_int) -> i64 {
        // SAFETY: as `of` was promised.
        let registers = unsafe { &(*self.context).uc_mcontext.gregs };
        registers.get(register as usize).copied().unwrap_or(0)
    }

    /// The system call. The kernel has put the number back into the register.
    pub(super) fn number(&self) -> libc::c_long {
        self.get(libc::REG_RAX)
    }

    /// Its arguments.
    pub(super) fn arguments(&self) -> [u64; 6] {
        use libc::{REG_R8, REG_R9, REG_R10, REG_RDI, REG_RDX, REG_RSI};
        [REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9]
            .map(|register| self.get(register).cast_unsigned())
    }

    /// Address after the instruction.
    pub(super) fn instruction(&self) -> u64 {
        self.get(libc::REG_RIP).cast_unsigned()
    }

    /// What the call will seem to have returned: a negative errno.
    pub(super) fn set_result(&mut self, result: i64) {
        // SAFETY: as `of` was promised.
        let registers = unsafe { &mut (*self.context).uc_mcontext.gregs };
        if let Some(register) = registers.get_mut(libc::REG_RAX as usize) {
            *register = result;
        }
    }
}
