//! The system calls of each thread, with the reason for each. `build.rs` makes the filters of it.
//!
//! A call that is not here ends the process (`Role::Fs`: fails with EPERM). A feature that needs a new one adds it to its
//! role, with arguments as narrow as they are in use and the reason. Rarely used paths count: errors, logs, a thread's end,
//! `malloc`, interrupted calls that go on.
//!
//! What is in no list on purpose: opening anything by name (but in a share), new processes and threads, sockets of other
//! families than Unix, executable memory, new namespaces, ptrace, signals to others, io_uring_setup, bpf, userfaultfd. Threads
//! are started, rings made and sockets connected by threads outside of these lists (`confinement`).

use super::role::Role;

/// When a call may be made: one of these, each with all of its conditions.
pub type When = &'static [&'static [Arg]];

/// A condition on an argument: `value` under `mask`.
#[derive(Debug, Clone, Copy)]
pub struct Arg {
    /// 0 to 5.
    pub index: u8,
    /// Bits that are looked at.
    pub mask: u32,
    /// What they are.
    pub value: u32,
    /// The upper 32 bits, which the kernel does not look at in a number, are zero: for pointers.
    pub wide: bool,
}

/// A system call and why it is needed.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// `SYS_…`
    pub number: libc::c_long,
    /// Empty: always.
    pub when: When,
    /// What needs it.
    pub reason: &'static str,
}

/// In place of the process id, which is put in when the filter is installed: no process has this one (PID_MAX_LIMIT).
pub const OWN_PID: u32 = 0x4f57_4e50;

const ANY: When = &[];

const fn is(index: u8, value: u32) -> Arg {
    arg(index, u32::MAX, value, false)
}

const fn null(index: u8) -> Arg {
    arg(index, u32::MAX, 0, true)
}

const fn without(index: u8, bits: u32) -> Arg {
    arg(index, bits, 0, false)
}

const fn arg(index: u8, mask: u32, value: u32, wide: bool) -> Arg {
    Arg {
        index,
        mask,
        value,
        wide,
    }
}

const fn any(number: libc::c_long, reason: &'static str) -> Call {
    call(number, ANY, reason)
}

const fn call(number: libc::c_long, when: When, reason: &'static str) -> Call {
    Call { number, when, reason }
}

const AF_UNIX: u32 = libc::AF_UNIX as u32;
const STREAM: u32 = (libc::SOCK_STREAM | libc::SOCK_CLOEXEC) as u32;
const PROT_EXEC: u32 = libc::PROT_EXEC as u32;

// linux/kvm.h
const KVM_RUN: u32 = 0xae80;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;
const KVM_SET_GSI_ROUTING: u32 = 0x4008_ae6a;
const KVM_SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
// linux/userfaultfd.h
const UFFDIO_COPY: u32 = 0xc028_aa03;
const UFFDIO_ZEROPAGE: u32 = 0xc020_aa04;
const UFFDIO_WAKE: u32 = 0x8010_aa02;
// linux/io_uring.h
const IORING_UNREGISTER_FILES: u32 = 3;

/// What every thread does.
#[rustfmt::skip]
const EVERY: &[Call] = &[
    any(libc::SYS_read, "eventfds, timerfds and open files"),
    any(libc::SYS_write, "eventfds, open files, the log, the last words of a violation"),
    any(libc::SYS_writev, "as write; frames to a TAP, bytes to pipes and files from guest memory"),
    any(libc::SYS_close, "a descriptor whose last owner the thread was"),
    call(libc::SYS_fcntl, &[&[is(1, libc::F_GETFD as u32)]], "Rust looks at descriptors it closes, in debug builds"),
    any(libc::SYS_futex, "locks, channels, the gate, joining"),
    any(libc::SYS_poll, "kicks and page faults; room in a console's sink, or in the log for a violation"),
    call(libc::SYS_mmap, &[&[without(2, PROT_EXEC)]], "malloc; memory put in a window's place"),
    call(libc::SYS_mprotect, &[&[without(2, PROT_EXEC)]], "malloc's arenas; pages lent to a device (memory::seal)"),
    any(libc::SYS_munmap, "malloc; the alternate stack when a thread ends"),
    any(libc::SYS_mremap, "realloc"),
    any(libc::SYS_brk, "malloc"),
    call(libc::SYS_madvise, &[
        &[is(2, libc::MADV_DONTNEED as u32)],
        &[is(2, libc::MADV_FREE as u32)],
        &[is(2, libc::MADV_HUGEPAGE as u32)],
        &[is(2, libc::MADV_DONTDUMP as u32)],
    ], "malloc; a thread's stack when it ends; memory given back, kept out of dumps"),
    any(libc::SYS_clock_gettime, "clocks the vDSO does not read: a clocksource that is no TSC"),
    any(libc::SYS_gettimeofday, "as clock_gettime"),
    any(libc::SYS_clock_nanosleep, "pauses"),
    any(libc::SYS_nanosleep, "pauses, with another libc"),
    any(libc::SYS_restart_syscall, "the kernel goes on with a pause that a signal or SIGSTOP interrupted"),
    any(libc::SYS_rt_sigreturn, "the end of every signal handler"),
    any(libc::SYS_rt_sigprocmask, "abort; kicks let through to a vCPU"),
    any(libc::SYS_sigaltstack, "Rust takes a thread's alternate stack away when it ends"),
    call(libc::SYS_rt_sigaction, &[
        &[is(0, libc::SIGABRT as u32)],
        &[is(0, libc::SIGSEGV as u32)],
        &[is(0, libc::SIGBUS as u32)],
    ], "abort; the handlers of faults give up (Rust's, memory::seal)"),
    any(libc::SYS_getpid, "abort"),
    any(libc::SYS_gettid, "abort"),
    call(libc::SYS_tgkill, &[&[is(0, OWN_PID), is(2, libc::SIGABRT as u32)]], "abort, of this process only"),
    any(libc::SYS_sched_yield, "spinning with manners"),
    call(libc::SYS_sched_getaffinity, &[&[is(0, 0)]], "malloc counts processors to limit its arenas"),
    any(libc::SYS_getrandom, "keys of hash maps; the guest's entropy"),
    any(libc::SYS_exit, "the end of the thread"),
    any(libc::SYS_exit_group, "the end of the process after a violation"),
];

#[rustfmt::skip]
const VCPU: &[Call] = &[
    call(libc::SYS_ioctl, &[
        &[is(1, KVM_RUN)],
        &[is(1, KVM_SET_GSI_ROUTING)],
        &[is(1, KVM_KVMCLOCK_CTRL)],
        &[is(1, KVM_GET_REGS)],
    ], "the guest; its I/O APIC; its clock after a pause; the report of a failure"),
    call(libc::SYS_sendto, &[&[null(4)]], "COM1's output, when the console goes to a connected socket"),
];

#[rustfmt::skip]
const IO: &[Call] = &[
    any(libc::SYS_epoll_wait, "the loop; the muxer's own epoll"),
    any(libc::SYS_epoll_pwait, "as epoll_wait, with another libc"),
    any(libc::SYS_epoll_ctl, "what is watched"),
    any(libc::SYS_timerfd_settime, "rate limiters, moderation, the muxer's deadlines"),
    any(libc::SYS_readv, "frames of a TAP, bytes of a connection into guest memory"),
    any(libc::SYS_sendmsg, "bytes to a connected socket from guest memory"),
    call(libc::SYS_sendto, &[&[null(4)]], "the console's output to a connected socket; TAPs in tests"),
    call(libc::SYS_recvfrom, &[&[null(4)]], "the line of a client of kata.hvsock; TAPs in tests"),
    any(libc::SYS_ppoll, "whether the host side of a connection hung up"),
    any(libc::SYS_shutdown, "half-closed connections"),
    call(libc::SYS_socketpair, &[&[is(0, AF_UNIX), is(1, STREAM), is(2, 0)]],
        "the two ends of a connection inside of the process"),
    any(libc::SYS_accept4, "clients of kata.hvsock"),
    any(libc::SYS_fstat, "what a connection's descriptor is"),
    call(libc::SYS_fcntl, &[&[is(1, libc::F_GETFL as u32)], &[is(1, libc::F_SETFL as u32)]],
        "a connection's descriptor does not block"),
    call(libc::SYS_ioctl, &[&[is(1, libc::FIONBIO as u32)]], "a connection's descriptor does not block"),
    any(libc::SYS_io_uring_enter, "requests of a disk, on a ring that can do nothing else (block::ring)"),
    UNREGISTER_FILES,
];

#[rustfmt::skip]
const BLOCK: &[Call] = &[
    any(libc::SYS_ppoll, "kicks, and the end of a moderated pause"),
    any(libc::SYS_preadv, "reads into guest memory"),
    any(libc::SYS_pwritev, "writes from guest memory"),
    any(libc::SYS_timerfd_settime, "the rate limiter of the disk"),
    any(libc::SYS_fdatasync, "FLUSH"),
    any(libc::SYS_fallocate, "DISCARD and WRITE_ZEROES"),
];

const UNREGISTER_FILES: Call = call(
    libc::SYS_io_uring_register,
    &[&[is(1, IORING_UNREGISTER_FILES)]],
    "a ring whose last owner the thread was lets go of its disk",
);

// linux/if_tun.h
const TAP: &[Call] = &[call(
    libc::SYS_ioctl,
    &[&[is(1, libc::TUNSETQUEUE as u32)]],
    "queues attached and detached as the guest asks",
)];

#[rustfmt::skip]
const MEM: &[Call] = &[
    call(libc::SYS_ioctl, &[&[is(1, KVM_SET_USER_MEMORY_REGION)]], "memory shown to, and hidden from, the guest"),
    any(libc::SYS_fallocate, "memory in a file given back"),
];

#[rustfmt::skip]
const BALLOON: &[Call] = &[
    any(libc::SYS_timerfd_settime, "the next statistics"),
    any(libc::SYS_fallocate, "memory in a file given back"),
];

const PMEM: &[Call] = &[call(libc::SYS_fdatasync, ANY, "the guest's flush")];

const PAGER: &[Call] = &[call(
    libc::SYS_ioctl,
    &[
        &[is(1, UFFDIO_COPY)],
        &[is(1, UFFDIO_ZEROPAGE)],
        &[is(1, UFFDIO_WAKE)],
    ],
    "a page for whoever waits for it",
)];

#[rustfmt::skip]
const CONNECTOR: &[Call] = &[
    call(libc::SYS_socket, &[&[is(0, AF_UNIX), is(1, STREAM | libc::SOCK_NONBLOCK as u32), is(2, 0)]],
        "the host's end of a connection of the guest"),
    any(libc::SYS_connect, "`<kata.hvsock>_<port>`, a name the thread was made with"),
];

#[rustfmt::skip]
const FS: &[Call] = &[
    any(libc::SYS_epoll_wait, "queues, the limiter's timer, the end"),
    any(libc::SYS_epoll_pwait, "as epoll_wait, with another libc"),
    any(libc::SYS_timerfd_settime, "the rate limiter"),
    any(libc::SYS_ppoll, "as poll, with another libc"),
    any(libc::SYS_openat2, "LOOKUP, beneath the share; the namespace has nothing else"),
    any(libc::SYS_openat, "OPEN and CREATE, and malloc: the namespace has nothing but the share"),
    any(libc::SYS_statx, "GETATTR, LOOKUP"),
    any(libc::SYS_fstat, "GETATTR of an open file"),
    any(libc::SYS_newfstatat, "as fstat, with another libc"),
    any(libc::SYS_fstatfs, "STATFS"),
    any(libc::SYS_readlinkat, "READLINK"),
    any(libc::SYS_getdents64, "READDIR"),
    any(libc::SYS_lseek, "LSEEK, and where READDIR goes on"),
    any(libc::SYS_readv, "READ"),
    any(libc::SYS_preadv, "READ"),
    any(libc::SYS_preadv2, "READ"),
    any(libc::SYS_pread64, "READ"),
    any(libc::SYS_pwritev, "WRITE"),
    any(libc::SYS_pwritev2, "WRITE"),
    any(libc::SYS_pwrite64, "WRITE"),
    any(libc::SYS_copy_file_range, "COPY_FILE_RANGE"),
    any(libc::SYS_fallocate, "FALLOCATE"),
    any(libc::SYS_ftruncate, "SETATTR of the size"),
    any(libc::SYS_fsync, "FSYNC"),
    any(libc::SYS_fdatasync, "FSYNC"),
    any(libc::SYS_syncfs, "SYNCFS"),
    any(libc::SYS_fchmod, "SETATTR of the mode"),
    any(libc::SYS_fchmodat, "SETATTR of the mode"),
    any(libc::SYS_fchown, "SETATTR of the owner"),
    any(libc::SYS_fchownat, "SETATTR of the owner"),
    any(libc::SYS_utimensat, "SETATTR of times"),
    any(libc::SYS_mkdirat, "MKDIR"),
    any(libc::SYS_mknodat, "MKNOD, as far as device_nodes lets it"),
    any(libc::SYS_symlinkat, "SYMLINK"),
    any(libc::SYS_linkat, "LINK"),
    any(libc::SYS_unlinkat, "UNLINK, RMDIR"),
    any(libc::SYS_renameat, "RENAME"),
    any(libc::SYS_renameat2, "RENAME2"),
    any(libc::SYS_getxattr, "GETXATTR"),
    any(libc::SYS_setxattr, "SETXATTR"),
    any(libc::SYS_listxattr, "LISTXATTR"),
    any(libc::SYS_removexattr, "REMOVEXATTR"),
    any(libc::SYS_fgetxattr, "GETXATTR of an open file"),
    any(libc::SYS_fsetxattr, "SETXATTR of an open file"),
    any(libc::SYS_flistxattr, "LISTXATTR of an open file"),
    any(libc::SYS_fremovexattr, "REMOVEXATTR of an open file"),
    any(libc::SYS_name_to_handle_at, "what a file is, across renames and saves"),
    any(libc::SYS_flock, "flock(2) of the guest"),
    call(libc::SYS_fcntl, &[
        &[is(1, libc::F_GETFL as u32)],
        &[is(1, libc::F_SETFL as u32)],
        &[is(1, libc::F_DUPFD_CLOEXEC as u32)],
        &[is(1, libc::F_OFD_SETLK as u32)],
        &[is(1, libc::F_OFD_GETLK as u32)],
    ], "flags and duplicates of open files; locks of the guest"),
    any(libc::SYS_setfsuid, "who a new file belongs to"),
    any(libc::SYS_setfsgid, "who a new file belongs to"),
    any(libc::SYS_capget, "DAC_OVERRIDE stays with another fsuid"),
    any(libc::SYS_capset, "as capget; the thread has the few capabilities of a file server, and gets no others"),
    any(libc::SYS_umask, "the mode of a new file"),
    call(libc::SYS_unshare, &[&[is(0, libc::CLONE_FS as u32)]], "a umask of the thread's own"),
];

/// The calls of `role`. One that is in two lists may be made when either says so.
pub fn calls(role: Role) -> Vec<Call> {
    let own = match role {
        Role::Vcpu => VCPU,
        Role::Io => IO,
        Role::Block => BLOCK,
        Role::Tap => TAP,
        Role::Mem => MEM,
        Role::Balloon => BALLOON,
        Role::Pmem => PMEM,
        Role::Pager => PAGER,
        Role::Connector => CONNECTOR,
        Role::Fs => FS,
    };
    EVERY.iter().chain(own).copied().collect()
}
