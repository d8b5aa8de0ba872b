//! System call filters, as `build.rs` compiled them.

#![allow(unsafe_code)]

use std::io;

use super::role::Role;

/// SECCOMP_SET_MODE_FILTER and actions (linux/seccomp.h).
const SET_MODE_FILTER: libc::c_uint = 1;
const RET_TRAP: u32 = 0x0003_0000;
const RET_EPERM: u32 = 0x0005_0000 | libc::EPERM as u32;
const RET_LOG: u32 = 0x7ffc_0000;
/// BPF_RET | BPF_K and BPF_JMP | BPF_JEQ | BPF_K (linux/bpf_common.h).
const RET: u16 = 0x06;
const JEQ: u16 = 0x15;

const fn i(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

// `program(role)`, and what stands in it for the process id.
include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// The filter of `role` for the process `pid`. With `log_only` the kernel logs (`type=1326`) what is not on the list, and
/// lets it pass.
fn instructions(role: Role, pid: u32, log_only: bool) -> Vec<libc::sock_filter> {
    let instruction = |i: &libc::sock_filter| {
        let k = match (i.code, i.k) {
            (JEQ, OWN_PID) => pid,
            (RET, RET_TRAP | RET_EPERM) if log_only => RET_LOG,
            (_, k) => k,
        };
        libc::sock_filter { k, ..*i }
    };
    program(role).iter().map(instruction).collect()
}

/// Puts the filter of `role` on the calling thread. It stays, and is inherited; `no_new_privs` must be set.
///
/// # Errors
/// A kernel without seccomp filters, or without RET_LOG (4.14) when that is asked for.
pub(super) fn install(role: Role, log_only: bool) -> io::Result<()> {
    let mut filter = instructions(role, std::process::id(), log_only);
    let program = libc::sock_fprog {
        // BPF_MAXINSNS is 4096, which the compiler has seen to.
        len: filter.len() as libc::c_ushort,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: `program` and the instructions it points to outlive the call, which copies them. No flags: this thread only, and
    // the kernel's mitigations against speculation as they are for every filtered thread.
    match unsafe { libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, 0, &raw const program) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_when_made_for_a_process_name_it_and_nothing_else() {
        for role in Role::ALL {
            let filter = instructions(role, 7, false);
            assert!(
                program(role).iter().any(|i| (i.code, i.k) == (JEQ, OWN_PID)),
                "{role:?}"
            );
            assert!(!filter.iter().any(|i| i.k == OWN_PID), "{role:?}");
            assert!(filter.len() < 4096, "{role:?}: {}", filter.len());
        }
    }

    #[test]
    fn filters_when_logging_never_refuse() {
        for role in Role::ALL {
            let returned = |log_only| {
                let mut all: Vec<u32> = instructions(role, 7, log_only)
                    .iter()
                    .filter_map(|i| (i.code == RET).then_some(i.k))
                    .collect();
                all.sort_unstable();
                all.dedup();
                all
            };
            // RET_ALLOW, and RET_KILL_PROCESS for system calls of another architecture.
            let (allow, kill) = (0x7fff_0000, 0x8000_0000);
            let refuse = if role.refuses() { RET_EPERM } else { RET_TRAP };
            assert_eq!(returned(false), [refuse, allow, kill], "{role:?}");
            assert_eq!(returned(true), [RET_LOG, allow, kill], "{role:?}");
        }
    }
}
