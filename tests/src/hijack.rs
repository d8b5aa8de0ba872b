//! A thread of another process is made to do what an attacker would who has taken it over: through ptrace(2), as root.

use std::ffi::{CStr, c_void};

use nix::Result;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

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
pub fn inject(tid: i32, text: &CStr, make: impl Fn(u64) -> Call) -> Result<bool> {
    let thread = Pid::from_raw(tid);
    ptrace::seize(thread, Options::empty())?;
    let injected = stop(thread).and_then(|()| redirect(thread, text, make));
    ptrace::detach(thread, None)?;
    injected
}

fn stop(thread: Pid) -> Result<()> {
    ptrace::interrupt(thread)?;
    waitpid(thread, Some(WaitPidFlag::__WALL)).map(drop)
}

/// Lets the stopped thread go on with another system call than the one it was interrupted in.
fn redirect(thread: Pid, text: &CStr, make: impl Fn(u64) -> Call) -> Result<bool> {
    let mut registers = ptrace::getregs(thread)?;
    let instruction = registers.rip - SYSCALL.len() as u64;
    let word = ptrace::read(thread, instruction as *mut c_void)?;
    if !word.to_ne_bytes().starts_with(&SYSCALL) {
        return Ok(false);
    }
    let at = (registers.rsp - BELOW) & !7;
    for (address, word) in (at..).step_by(8).zip(text.to_bytes_with_nul().chunks(8)) {
        let mut padded = [0; 8];
        for (to, from) in padded.iter_mut().zip(word) {
            *to = *from;
        }
        ptrace::write(thread, address as *mut c_void, i64::from_ne_bytes(padded))?;
    }
    let (number, [first, second, third, fourth]) = make(at);
    registers.rip = instruction;
    registers.rax = number.cast_unsigned();
    // The interrupted call is not to be restarted.
    registers.orig_rax = u64::MAX;
    (registers.rdi, registers.rsi, registers.rdx, registers.r10) = (first, second, third, fourth);
    ptrace::setregs(thread, registers)?;
    Ok(true)
}
