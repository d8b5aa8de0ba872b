//! A thread of another process is made to do what an attacker would who has taken it over: through ptrace(2), as root.

use std::ffi::CStr;
use std::io;
use std::mem::zeroed;
use std::ptr::null_mut;

/// `syscall`, as the processor reads it.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Where the text goes, in bytes below the thread's stack pointer: beyond what the interrupted function uses.
const BELOW: u64 = 4096;

/// A system call: its number and first four arguments.
pub type Call = (libc::c_long, [u64; 4]);

/// Makes thread `tid` carry out the call of `make`, which is told the address of `text` in its process. False if the thread is
/// not in a system call just now: nothing has changed then.
///
/// # Errors
/// ptrace refuses.
pub fn inject(tid: i32, text: &CStr, make: impl Fn(u64) -> Call) -> io::Result<bool> {
    ptrace(libc::PTRACE_SEIZE, tid, 0, 0)?;
    let injected = stop(tid).and_then(|()| redirect(tid, text, make));
    ptrace(libc::PTRACE_DETACH, tid, 0, 0)?;
    injected
}

fn stop(tid: i32) -> io::Result<()> {
    ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0)?;
    let mut status = 0;
    // SAFETY: a place for the status.
    match unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Lets the stopped thread go on with another system call than the one it was interrupted in.
fn redirect(tid: i32, text: &CStr, make: impl Fn(u64) -> Call) -> io::Result<bool> {
    // SAFETY: zero is valid for registers.
    let mut registers: libc::user_regs_struct = unsafe { zeroed() };
    ptrace(libc::PTRACE_GETREGS, tid, 0, (&raw mut registers) as u64)?;
    let instruction = registers.rip - SYSCALL.len() as u64;
    if peek(tid, instruction)?.get(..SYSCALL.len()) != Some(&SYSCALL) {
        return Ok(false);
    }
    let at = (registers.rsp - BELOW) & !7;
    for (address, word) in (at..).step_by(8).zip(text.to_bytes_with_nul().chunks(8)) {
        let mut padded = [0; 8];
        for (to, from) in padded.iter_mut().zip(word) {
            *to = *from;
        }
        ptrace(libc::PTRACE_POKEDATA, tid, address, u64::from_ne_bytes(padded))?;
    }
    let (number, [first, second, third, fourth]) = make(at);
    registers.rip = instruction;
    registers.rax = number.cast_unsigned();
    // The interrupted call is not to be restarted.
    registers.orig_rax = u64::MAX;
    (registers.rdi, registers.rsi, registers.rdx, registers.r10) = (first, second, third, fourth);
    ptrace(libc::PTRACE_SETREGS, tid, 0, (&raw mut registers) as u64)?;
    Ok(true)
}

/// A word of the thread's memory.
fn peek(tid: i32, address: u64) -> io::Result<[u8; 8]> {
    // SAFETY: reads another process's memory, and errno of this thread.
    unsafe {
        *libc::__errno_location() = 0;
        let word = libc::ptrace(libc::PTRACE_PEEKDATA, tid, address, null_mut::<libc::c_void>());
        match *libc::__errno_location() {
            0 => Ok(word.to_ne_bytes()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

fn ptrace(request: libc::c_uint, tid: i32, address: u64, data: u64) -> io::Result<()> {
    // SAFETY: the requests above take numbers, or a pointer to registers that outlive the call.
    match unsafe { libc::ptrace(request, tid, address, data) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
