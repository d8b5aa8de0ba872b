//! What becomes of a thread that makes a forbidden system call: a line, and the end of the process.
//!
//! The kernel does not carry the call out and raises SIGSYS on the thread (SECCOMP_RET_TRAP). The handler writes one line and
//! ends the process with status [`STATUS`]. For a shim that means: containerd finds the connection closed, calls `delete`,
//! which undoes what the journal lists, and publishes the exit.
//!
//! The handler is all that runs on a thread nobody trusts any more: no lock, no allocation, nothing read but registers.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::CStr;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use super::names;
use super::role::Role;
use super::x86_64::Registers;

/// Exit status of a process one of whose threads made a forbidden system call: 128 and SIGSYS.
pub const STATUS: i32 = 128 + libc::SIGSYS;

/// siginfo.h: a filter raised it.
const SYS_SECCOMP: libc::c_int = 1;
/// Longest wait for room in the log, in milliseconds: a reader that is gone must not keep the process alive.
const PATIENCE_MS: libc::c_int = 1000;

/// What malloc looks at once in a process, on whatever thread happens to come first (glibc: `check_may_shrink_heap`,
/// `get_nprocs`), and does without when it cannot. Refused without the end of the process.
const OF_MALLOC: [&CStr; 3] = [
    c"/proc/sys/vm/overcommit_memory",
    c"/sys/devices/system/cpu/online",
    c"/proc/stat",
];

/// Where the line goes.
static LOG: AtomicI32 = AtomicI32::new(libc::STDERR_FILENO);

thread_local! {
    /// Who the thread is. No destructor and constant initialisation: safe to read in a handler.
    static WHO: Cell<Option<(Role, [u8; 15])>> = const { Cell::new(None) };
}

/// Makes violations be told on `fd` instead of on stderr. It has to stay open as long as the process lives.
pub fn report_to(fd: BorrowedFd<'static>) {
    LOG.store(fd.as_raw_fd(), Ordering::Relaxed);
}

/// Whether the calling thread has a filter. No system call.
pub fn is_confined() -> bool {
    WHO.get().is_some()
}

/// Notes who the calling thread is, and puts the handler in place.
///
/// # Errors
/// The kernel refuses the handler.
pub(super) fn prepare(role: Role) -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let mut name = [0; 15];
    if let Some(own) = std::thread::current().name() {
        for (to, from) in name.iter_mut().zip(own.bytes()) {
            *to = from;
        }
    }
    WHO.set(Some((role, name)));
    let installed = INSTALLED.get_or_init(|| install().map_err(|e| e.raw_os_error().unwrap_or(libc::EINVAL)));
    installed.map_err(io::Error::from_raw_os_error)
}

fn install() -> io::Result<()> {
    // SAFETY: all-zero is a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigsys;
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the structure outlives the call; the handler does nothing that is not allowed in one.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn on_sigsys(_signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo_t.
    let code = unsafe { (*info).si_code };
    // SAFETY: the kernel gives the context of the interrupted code, which nobody else refers to.
    let mut registers = unsafe { Registers::of(context) };
    if code == SYS_SECCOMP && (is_of_malloc(&registers) || is_of_backtrace()) {
        registers.set_result(-i64::from(libc::EACCES));
        return;
    }
    let mut line = Line::default();
    line.tell(&registers);
    line.write(LOG.load(Ordering::Relaxed));
    // SAFETY: ends the process, without anything that might depend on its state.
    unsafe { libc::_exit(STATUS) };
}

/// Whether it is one of [`OF_MALLOC`].
fn is_of_malloc(registers: &Registers<'_>) -> bool {
    let [directory, path, ..] = registers.arguments();
    if registers.number() != libc::SYS_openat || directory as i32 != libc::AT_FDCWD || path == 0 {
        return false;
    }
    let is = |known: &CStr| {
        let bytes = known.to_bytes_with_nul().iter().enumerate();
        bytes.into_iter().all(|(at, byte)| {
            // SAFETY: a name for openat, read up to its end. An address that is none ends the process, which is about to
            // happen anyway.
            unsafe { std::ptr::read_volatile((path as *const u8).wrapping_add(at)) == *byte }
        })
    };
    OF_MALLOC.iter().any(|known| is(known))
}

/// Whether it is of a panic's report, which looks at the program for names. In a debug build, whose tests panic and go on; a
/// release aborts, and has none to look at.
fn is_of_backtrace() -> bool {
    cfg!(debug_assertions) && std::thread::panicking()
}

/// One line of the log, in the form of the others.
struct Line {
    bytes: [u8; 512],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 512],
            len: 0,
        }
    }
}

impl Line {
    fn tell(&mut self, registers: &Registers<'_>) {
        self.text(b"level=fatal msg=\"forbidden system call: the process ends\" thread=");
        match WHO.get() {
            Some((role, name)) => {
                let len = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
                self.text(name.get(..len).unwrap_or_default());
                self.text(b" role=");
                self.text(role.name().as_bytes());
            }
            None => self.text(b"unknown"),
        }
        let number = registers.number();
        self.text(b" syscall=");
        self.text(names::name(number).unwrap_or("unknown").as_bytes());
        self.text(b" number=");
        self.decimal(number.cast_unsigned());
        self.text(b" arguments=\"");
        for (index, argument) in registers.arguments().into_iter().enumerate() {
            if index > 0 {
                self.text(b" ");
            }
            self.hexadecimal(argument);
        }
        self.text(b"\" instruction=");
        self.hexadecimal(registers.instruction());
        self.text(b"\n");
    }

    fn text(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(to) = self.bytes.get_mut(self.len) {
                *to = *byte;
                self.len += 1;
            }
        }
    }

    fn decimal(&mut self, value: u64) {
        if value >= 10 {
            self.decimal(value / 10);
        }
        self.text(&[b'0' + (value % 10) as u8]);
    }

    fn hexadecimal(&mut self, value: u64) {
        self.text(b"0x");
        let digits = (64 - value.leading_zeros()).div_ceil(4).max(1);
        for digit in (0..digits).rev() {
            let nibble = (value >> (4 * digit) & 0xf) as u8;
            self.text(&[if nibble < 10 {
                b'0' + nibble
            } else {
                b'a' + nibble - 10
            }]);
        }
    }

    fn write(&self, fd: libc::c_int) {
        let mut poll = libc::pollfd {
            fd,
            events: libc::POLLOUT,
            revents: 0,
        };
        // SAFETY: one pollfd that outlives the call; then bytes of ours, of which a pipe that has room takes all.
        unsafe {
            if libc::poll(&raw mut poll, 1, PATIENCE_MS) == 1 {
                libc::write(fd, self.bytes.as_ptr().cast(), self.len);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_when_written_without_a_library_are_those_of_the_library() {
        for value in [0, 1, 9, 10, 255, 256, 0x1000, u64::from(u32::MAX), u64::MAX] {
            let mut line = Line::default();
            line.decimal(value);
            line.text(b" ");
            line.hexadecimal(value);
            let written = String::from_utf8_lossy(&line.bytes[..line.len]).into_owned();
            assert_eq!(written, format!("{value} {value:#x}"));
        }
    }

    #[test]
    fn line_when_too_long_is_cut() {
        let mut line = Line::default();
        line.text(&[b'x'; 1000]);
        assert_eq!(line.len, 512);
    }

    #[test]
    fn names_when_asked_for_are_those_of_the_calls() {
        assert_eq!(names::name(libc::SYS_read), Some("read"));
        assert_eq!(names::name(libc::SYS_openat2), Some("openat2"));
        assert_eq!(names::name(-1), None);
        assert_eq!(names::name(1 << 20), None);
    }
}
