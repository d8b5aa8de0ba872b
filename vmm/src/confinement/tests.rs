//! Threads of every role, and what an attacker would try on them.
//!
//! What ends a process runs in a child of its own, which this process forks: no lock is taken there that another thread may
//! have held.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Read;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::panic::{catch_unwind, resume_unwind};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::thread::CapabilitySet;

use super::*;

const ENFORCED: Confinement = Confinement {
    seccomp: Seccomp::Enforce,
    keep_capabilities: false,
};

/// How a child ended, and what it said.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Exited(i32, String),
    Killed(i32),
}

/// Runs `body` in a child, whose violations are caught. It exits with what `body` returns.
fn in_child(body: impl FnOnce() -> i32) -> End {
    let (mut reader, writer) = io::pipe().unwrap();
    // SAFETY: the child calls nothing that needs another thread, and leaves by _exit.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "{}", io::Error::last_os_error());
    if pid == 0 {
        drop(reader);
        // SAFETY: the descriptor stays open: the child never drops it.
        violation::report_to(unsafe { BorrowedFd::borrow_raw(writer.as_raw_fd()) });
        let status = body();
        // SAFETY: ends the child.
        unsafe { libc::_exit(status) };
    }
    drop(writer);
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
    let mut status = 0;
    // SAFETY: our child, and a place for its status.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    if libc::WIFEXITED(status) {
        End::Exited(libc::WEXITSTATUS(status), said)
    } else {
        End::Killed(libc::WTERMSIG(status))
    }
}

/// Runs `body` confined, in a child. Status 99: it could not be confined.
fn confined(confinement: Confinement, role: Role, body: impl FnOnce() -> i32) -> End {
    in_child(|| match confinement.apply(role) {
        Ok(()) => body(),
        Err(_) => 99,
    })
}

/// A system call and its arguments.
type Attempt = (libc::c_long, [u64; 6]);

/// The raw call: 0, or the errno.
fn make((number, a): Attempt) -> i32 {
    // SAFETY: the attempts below point to constants, or to nothing.
    match unsafe { libc::syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]) } {
        -1 => io::Error::last_os_error().raw_os_error().unwrap_or(98),
        _ => 0,
    }
}

fn at(text: &'static std::ffi::CStr) -> u64 {
    text.as_ptr() as u64
}

/// What is forbidden to everybody.
fn forbidden() -> Vec<Attempt> {
    let cwd = libc::AT_FDCWD as u64;
    let passwd = at(c"/etc/passwd");
    let own = u64::from(std::process::id());
    // SAFETY: no arguments, cannot fail.
    let parent = unsafe { libc::getppid() } as u64;
    let executable = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u64;
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let numbers = |numbers: &[u64]| {
        let mut all = [0; 6];
        all[..numbers.len()].copy_from_slice(numbers);
        all
    };
    [
        (libc::SYS_open, &[passwd, 0][..]),
        (libc::SYS_creat, &[at(c"/tmp/x"), 0o600]),
        (libc::SYS_open_by_handle_at, &[0, 0, 0]),
        (libc::SYS_memfd_create, &[passwd, 0]),
        (
            libc::SYS_socket,
            &[libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0],
        ),
        (
            libc::SYS_socket,
            &[libc::AF_NETLINK as u64, libc::SOCK_RAW as u64, 0],
        ),
        (
            libc::SYS_socket,
            &[libc::AF_PACKET as u64, libc::SOCK_RAW as u64, 0],
        ),
        (
            libc::SYS_socket,
            &[libc::AF_VSOCK as u64, libc::SOCK_STREAM as u64, 0],
        ),
        // Datagrams go to any address, whoever the socket was paired with.
        (
            libc::SYS_socketpair,
            &[libc::AF_UNIX as u64, libc::SOCK_DGRAM as u64, 0, 0],
        ),
        (libc::SYS_bind, &[0, 0, 0]),
        (libc::SYS_mount, &[0, passwd, 0, libc::MS_REMOUNT, 0]),
        (libc::SYS_umount2, &[passwd, 0]),
        (libc::SYS_pivot_root, &[passwd, passwd]),
        (libc::SYS_chroot, &[at(c"/")]),
        (libc::SYS_move_mount, &[0, 0, 0, 0, 0]),
        (libc::SYS_ptrace, &[libc::PTRACE_ATTACH as u64, parent, 0, 0]),
        (libc::SYS_process_vm_readv, &[parent, 0, 0, 0, 0, 0]),
        (libc::SYS_process_vm_writev, &[parent, 0, 0, 0, 0, 0]),
        (libc::SYS_kill, &[parent, 0]),
        (libc::SYS_kill, &[own, 0]),
        (libc::SYS_tgkill, &[parent, parent, 0]),
        (libc::SYS_tgkill, &[parent, parent, libc::SIGABRT as u64]),
        (libc::SYS_tgkill, &[own, own, libc::SIGTERM as u64]),
        (libc::SYS_pidfd_open, &[parent, 0]),
        (libc::SYS_pidfd_getfd, &[0, 0, 0]),
        (libc::SYS_execve, &[at(c"/bin/true"), 0, 0]),
        (libc::SYS_execveat, &[cwd, at(c"/bin/true"), 0, 0, 0]),
        (libc::SYS_fork, &[]),
        (libc::SYS_vfork, &[]),
        (libc::SYS_clone, &[libc::SIGCHLD as u64, 0, 0, 0, 0]),
        (
            libc::SYS_clone,
            &[(libc::CLONE_NEWUSER | libc::SIGCHLD) as u64, 0, 0, 0, 0],
        ),
        (libc::SYS_clone3, &[0, 0]),
        (libc::SYS_io_uring_setup, &[4, 0]),
        (libc::SYS_bpf, &[0, 0, 0]),
        (libc::SYS_userfaultfd, &[0]),
        (libc::SYS_perf_event_open, &[0, 0, 0, 0, 0]),
        (libc::SYS_unshare, &[libc::CLONE_NEWUSER as u64]),
        (libc::SYS_unshare, &[(libc::CLONE_FS | libc::CLONE_NEWNS) as u64]),
        (libc::SYS_setns, &[0, 0]),
        (libc::SYS_setuid, &[1000]),
        (libc::SYS_setgid, &[1000]),
        (libc::SYS_setresuid, &[0, 0, 0]),
        (libc::SYS_setgroups, &[0, 0]),
        (libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0]),
        (libc::SYS_prctl, &[libc::PR_SET_SECUREBITS as u64, 0, 0, 0, 0]),
        (libc::SYS_prctl, &[libc::PR_GET_SECCOMP as u64, 0, 0, 0, 0]),
        (libc::SYS_prctl, &[libc::PR_SET_NAME as u64, passwd, 0, 0, 0]),
        (libc::SYS_seccomp, &[0, 0, 0]),
        (libc::SYS_mmap, &[0, 4096, executable, anonymous, u64::MAX, 0]),
        (libc::SYS_mprotect, &[0, 4096, libc::PROT_EXEC as u64]),
        (libc::SYS_pkey_mprotect, &[0, 4096, libc::PROT_EXEC as u64, 0]),
        (libc::SYS_remap_file_pages, &[0, 4096, 0, 0, 0]),
        (libc::SYS_madvise, &[0, 4096, libc::MADV_DODUMP as u64]),
        (libc::SYS_rt_sigaction, &[libc::SIGSYS as u64, 0, 0, 8]),
        (libc::SYS_init_module, &[0, 0, 0]),
        (libc::SYS_finit_module, &[0, 0, 0]),
        (libc::SYS_kexec_load, &[0, 0, 0, 0]),
        (libc::SYS_reboot, &[0, 0, 0]),
        (libc::SYS_keyctl, &[0, 0, 0, 0, 0]),
        (libc::SYS_add_key, &[0, 0, 0, 0, 0]),
        (libc::SYS_syslog, &[3, 0, 0]),
        (libc::SYS_sethostname, &[passwd, 0]),
        (libc::SYS_sched_setaffinity, &[0, 0, 0]),
        (libc::SYS_setrlimit, &[0, 0]),
        (libc::SYS_prlimit64, &[parent, 0, 0, 0]),
        (libc::SYS_ioctl, &[0, libc::TIOCSTI, 0]),
        // KVM_CREATE_VM and KVM_SET_USER_MEMORY_REGION2
        (libc::SYS_ioctl, &[0, 0xae01, 0]),
        (libc::SYS_ioctl, &[0, 0x40a0_ae49, 0]),
        (libc::SYS_ioctl, &[0, libc::TUNSETIFF, 0]),
        (libc::SYS_fcntl, &[0, libc::F_SETLEASE as u64, 0]),
        (libc::SYS_arch_prctl, &[0, 0]),
        (libc::SYS_personality, &[0]),
        // x32's numbers are other numbers, and one that no kernel has.
        (libc::SYS_read | 0x4000_0000, &[0, 0, 0]),
        (4000, &[]),
    ]
    .into_iter()
    .map(|(number, arguments)| (number, numbers(arguments)))
    .collect()
}

/// What some roles may do and others not.
fn forbidden_to(role: Role) -> Vec<Attempt> {
    let mut all = forbidden();
    let cwd = libc::AT_FDCWD as u64;
    let unix = [libc::AF_UNIX as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0];
    if role != Role::Fs {
        all.push((libc::SYS_openat, [cwd, at(c"/etc/passwd"), 0, 0, 0, 0]));
        all.push((libc::SYS_openat, [0, at(c"/proc/stat"), 0, 0, 0, 0]));
        all.push((libc::SYS_openat, [cwd, at(c"/proc/statx"), 0, 0, 0, 0]));
        all.push((libc::SYS_openat, [cwd, 0, 0, 0, 0, 0]));
        all.push((libc::SYS_openat2, [cwd, at(c"/etc/passwd"), 0, 0, 0, 0]));
        all.push((libc::SYS_unlinkat, [cwd, at(c"/tmp/x"), 0, 0, 0, 0]));
        all.push((libc::SYS_capset, [0; 6]));
        all.push((libc::SYS_setfsuid, [1000, 0, 0, 0, 0, 0]));
    }
    if role != Role::Connector {
        all.push((libc::SYS_socket, unix));
        all.push((libc::SYS_connect, [0; 6]));
    }
    if role != Role::Io {
        all.push((libc::SYS_socketpair, unix));
        all.push((libc::SYS_accept4, [0; 6]));
        all.push((libc::SYS_io_uring_enter, [0; 6]));
        all.push((libc::SYS_sendmsg, [0; 6]));
    }
    if role != Role::Vcpu {
        // KVM_RUN
        all.push((libc::SYS_ioctl, [0, 0xae80, 0, 0, 0, 0]));
    }
    all
}

#[test]
fn forbidden_calls_when_made_end_the_process_and_say_so() {
    for role in Role::ALL.into_iter().filter(|role| !role.refuses()) {
        for attempt in forbidden_to(role) {
            let End::Exited(status, said) = confined(ENFORCED, role, || make(attempt)) else {
                panic!("{role:?} {attempt:?}: killed")
            };
            assert_eq!(status, violation::STATUS, "{role:?} {attempt:x?}: {said}");
            let (number, [first, second, ..]) = attempt;
            let number = number as u32;
            let known = names::name(number.into()).unwrap_or("unknown");
            let told = format!("role={} syscall={known} number={number} ", role.name());
            assert!(said.contains(&told), "{said}");
            assert!(
                said.contains(&format!("arguments=\"{first:#x} {second:#x} ")),
                "{said}"
            );
            assert!(said.starts_with("level=fatal msg=\"forbidden system call") && said.ends_with('\n'));
            assert_eq!(said.lines().count(), 1);
        }
    }
}

#[test]
fn forbidden_calls_when_made_by_a_share_are_refused() {
    for attempt in forbidden_to(Role::Fs) {
        let end = confined(ENFORCED, Role::Fs, || make(attempt));
        assert_eq!(end, End::Exited(libc::EPERM, String::new()), "{attempt:x?}");
    }
}

#[test]
fn forbidden_calls_when_only_logged_are_made() {
    let confinement = Confinement {
        seccomp: Seccomp::LogOnly,
        ..ENFORCED
    };
    for role in Role::ALL {
        let end = confined(confinement, role, || {
            // SAFETY: no arguments, cannot fail.
            i32::from(unsafe { libc::getppid() } <= 0)
        });
        assert_eq!(end, End::Exited(0, String::new()), "{role:?}");
    }
}

#[test]
fn malloc_when_it_looks_at_the_host_does_without() {
    for path in [
        c"/proc/sys/vm/overcommit_memory",
        c"/sys/devices/system/cpu/online",
        c"/proc/stat",
    ] {
        let open = (libc::SYS_openat, [libc::AT_FDCWD as u64, at(path), 0, 0, 0, 0]);
        let end = confined(ENFORCED, Role::Io, || make(open));
        assert_eq!(end, End::Exited(libc::EACCES, String::new()), "{path:?}");
    }
}

#[test]
fn abort_and_faults_when_confined_are_what_they_are() {
    let abort = confined(ENFORCED, Role::Vcpu, || std::process::abort());
    assert_eq!(abort, End::Killed(libc::SIGABRT));
    let fault = confined(ENFORCED, Role::Vcpu, || {
        // SAFETY: meant to fault.
        unsafe { std::ptr::read_volatile(std::ptr::dangling::<i32>()) }
    });
    assert_eq!(fault, End::Killed(libc::SIGSEGV));
}

#[test]
fn threads_when_confined_do_what_rust_and_libc_need() {
    let (sender, receiver) = channel();
    for role in Role::ALL {
        let sender = sender.clone();
        let (locked, counter) = (Arc::new(Mutex::new(0)), Arc::new(Mutex::new(0)));
        let run = move || {
            // Small and large pieces, grown, and given back: arenas, mmap, mremap, and the trimming of both.
            for shift in 4..24 {
                let mut bytes = vec![1u8; 1 << shift];
                bytes.resize(3 << shift, 2);
                bytes.shrink_to_fit();
                drop(bytes);
            }
            let map: HashMap<u32, String> = (0..1000).map(|n| (n, n.to_string())).collect();
            let many: Vec<Vec<u8>> = (0..2000).map(|n| vec![0; n]).collect();
            drop((map, many));
            *locked.lock().unwrap() += 1;
            thread::sleep(Duration::from_millis(1));
            thread::yield_now();
            let waited = Instant::now();
            // In a process that has not asked for it before, which depends on the tests that are run.
            let _ = clock_gettime(ClockId::Monotonic);
            let panicked = catch_unwind(|| panic!("meant to be")).is_err();
            eprintln!("role {role:?} after {:?}", waited.elapsed());
            *counter.lock().unwrap() += 1;
            sender.send((role, panicked, violation::is_confined())).unwrap();
        };
        let thread = ENFORCED.spawn(role, "test-confined", run).unwrap();
        assert_eq!(thread.join(), Some(()), "{role:?}");
        assert_eq!(receiver.try_recv().unwrap(), (role, true, true));
        assert!(!violation::is_confined());
    }
}

/// The lines of a thread's status.
fn status_of(tid: i32) -> BTreeMap<String, String> {
    let status = fs::read_to_string(format!("/proc/self/task/{tid}/status")).unwrap();
    let line = |line: &str| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_owned(), value.trim().to_owned()))
    };
    status.lines().filter_map(line).collect()
}

/// The status of a thread of `role` while it runs.
fn status_when(confinement: Confinement, role: Role) -> BTreeMap<String, String> {
    let (tell, told) = channel();
    let (end, ends) = channel::<()>();
    let main = move || {
        // SAFETY: no arguments, cannot fail.
        tell.send(unsafe { libc::gettid() }).unwrap();
        let _ = ends.recv();
    };
    let thread = confinement.spawn(role, "test-status", main).unwrap();
    let status = status_of(told.recv().unwrap());
    drop(end);
    thread.join().unwrap();
    status
}

#[test]
fn privileges_when_given_up_are_gone() {
    // SAFETY: no arguments, cannot fail.
    let own = status_of(unsafe { libc::gettid() });
    for role in Role::ALL {
        let status = status_when(ENFORCED, role);
        let permitted = rustix::thread::capabilities(None).unwrap().permitted;
        let kept = format!("{:016x}", (role.kept() & permitted).bits());
        for (name, expected) in [
            ("CapEff", &*kept),
            ("CapPrm", &*kept),
            ("CapInh", "0000000000000000"),
            ("CapAmb", "0000000000000000"),
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
            ("Groups", ""),
        ] {
            assert_eq!(status[name], expected, "{role:?}: {name}");
        }
        if permitted.contains(CapabilitySet::SETPCAP) {
            assert_eq!(
                status["CapBnd"],
                format!("{:016x}", role.kept().bits()),
                "{role:?}"
            );
        }
    }
    // SAFETY: as above.
    let after = status_of(unsafe { libc::gettid() });
    for name in ["CapEff", "CapBnd", "NoNewPrivs", "Seccomp", "Groups"] {
        assert_eq!(after[name], own[name], "others keep theirs: {name}");
    }
    // SAFETY: takes numbers.
    assert_eq!(unsafe { libc::prctl(libc::PR_GET_DUMPABLE) }, 0);
}

#[test]
fn privileges_when_kept_are_there_and_those_of_a_share_are_not() {
    let confinement = Confinement {
        keep_capabilities: true,
        seccomp: Seccomp::Off,
    };
    // SAFETY: no arguments, cannot fail.
    let own = status_of(unsafe { libc::gettid() });
    let status = status_when(confinement, Role::Vcpu);
    for name in ["CapEff", "CapBnd", "NoNewPrivs", "Seccomp"] {
        assert_eq!(status[name], own[name], "{name}");
    }
    let status = status_when(confinement, Role::Fs);
    assert_eq!(
        (&*status["Seccomp"], &*status["NoNewPrivs"]),
        (&*own["Seccomp"], "1")
    );
    let permitted = rustix::thread::capabilities(None).unwrap().permitted;
    let kept = (Role::Fs.kept() & permitted).bits();
    assert_eq!(status["CapEff"], format!("{kept:016x}"));
}

#[test]
fn securebits_when_locked_bring_nothing_back() {
    if !rustix::thread::capabilities(None)
        .unwrap()
        .permitted
        .contains(CapabilitySet::SETPCAP)
    {
        eprintln!("not run: not root");
        return;
    }
    for role in [Role::Vcpu, Role::Fs] {
        let (tell, told) = channel();
        let confinement = Confinement {
            seccomp: Seccomp::Off,
            ..ENFORCED
        };
        let look = move || {
            let bits = rustix::thread::capabilities_secure_bits().unwrap();
            tell.send(bits.bits()).unwrap();
        };
        confinement
            .spawn(role, "test-bits", look)
            .unwrap()
            .join()
            .unwrap();
        // NOROOT and its lock, the locks of NO_SETUID_FIXUP and KEEP_CAPS, NO_CAP_AMBIENT_RAISE and its lock.
        let expected = if role == Role::Fs {
            0b1110_1011
        } else {
            0b1110_1111
        };
        assert_eq!(told.recv().unwrap(), expected, "{role:?}");
    }
}

#[test]
fn spawn_when_the_preparation_fails_runs_nothing() {
    let failing = || Err(io::Error::other("no"));
    let (tell, told) = channel::<()>();
    let main = move || tell.send(()).unwrap();
    let refused = ENFORCED.spawn_after(failing, Role::Fs, "test-refused", main);
    assert_eq!(refused.unwrap_err().to_string(), "no");
    assert!(told.recv().is_err());
}

#[test]
fn delegate_when_asked_answers_and_ends_with_its_last_owner() {
    let ended = Arc::new(());
    let held = ended.clone();
    let delegate = Delegate::spawn(
        ENFORCED,
        Some(Role::Connector),
        "test-delegate",
        move |number: u32| {
            let _held = &held;
            if number == 100 {
                resume_unwind(Box::new(()));
            }
            number + 1
        },
    );
    let delegate = delegate.unwrap();
    assert_eq!((delegate.ask(1), delegate.ask(41)), (Some(2), Some(42)));
    // It panics.
    assert_eq!((delegate.ask(100), delegate.ask(1)), (None, None));
    drop(delegate);
    assert_eq!(Arc::strong_count(&ended), 1);
}
