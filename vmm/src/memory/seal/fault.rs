//! The handler of SIGSEGV.

#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::sync::{Mutex, OnceLock, PoisonError};

use super::{PAGE, table};

/// siginfo.h: the access was not permitted, rather than nothing was mapped.
const SEGV_ACCERR: libc::c_int = 2;

/// The handler there was before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Puts the handler in place, once.
///
/// # Errors
/// The kernel refused.
pub(super) fn watch() -> io::Result<()> {
    static PLACING: Mutex<()> = Mutex::new(());
    let _one = PLACING.lock().unwrap_or_else(PoisonError::into_inner);
    if BEFORE.get().is_some() {
        return Ok(());
    }
    // SAFETY: all-zero is a valid `sigaction`: the default action, no flags, an empty mask.
    let (mut action, mut before): (libc::sigaction, libc::sigaction) =
        unsafe { (mem::zeroed(), mem::zeroed()) };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_fault;
    action.sa_sigaction = handler as usize;
    // On the alternate stack, where Rust's threads have one: the fault may be an overflow of the stack, for the handler before.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: both structures outlive the call, and the handler does nothing that is not allowed in one.
    if unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, &raw mut before) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let _ = BEFORE.set(before);
    Ok(())
}

extern "C" fn on_fault(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo_t; for SIGSEGV it has an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // SAFETY: errno of this thread, which the interrupted code may be about to read.
    let errno = unsafe { *libc::__errno_location() };
    let lent = code == SEGV_ACCERR && lend(address);
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    if !lent {
        pass_on(signal, info, context);
    }
}

/// Lets the faulting access go on, if it is to a sealed block.
fn lend(address: usize) -> bool {
    let _lock = table::lock();
    let mut lent = false;
    table::each(|area| {
        if address.wrapping_sub(area.start) < area.len {
            lent = area.lend(address & !(PAGE - 1));
        }
    });
    lent
}

/// Does what would have been done without this handler.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    match BEFORE.get() {
        Some(before) if !matches!(before.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN) => {
            if before.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: with SA_SIGINFO the address is of such a function.
                let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    unsafe { mem::transmute(before.sa_sigaction) };
                handler(signal, info, context);
            } else {
                // SAFETY: without SA_SIGINFO the address is of such a function.
                let handler: extern "C" fn(libc::c_int) = unsafe { mem::transmute(before.sa_sigaction) };
                handler(signal);
            }
        }
        _ => {
            // SAFETY: all-zero is the default action, which ends the process when the access is tried again.
            unsafe {
                let action: libc::sigaction = mem::zeroed();
                libc::sigaction(signal, &raw const action, std::ptr::null_mut());
            }
        }
    }
}
