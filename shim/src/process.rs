//! A shim process left over from earlier: found by pid, proven to be ours, ended.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::version;

/// A running shim, held by a descriptor so that a reused pid cannot be hit.
#[derive(Debug)]
pub struct ShimProcess {
    pidfd: OwnedFd,
}

impl ShimProcess {
    /// The process `pid`, if it is a shim of ours that serves sandbox `id` of containerd's `namespace`.
    pub fn find(pid: u32, namespace: &str, id: &str) -> Option<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
        // Opened before the check: the descriptor and /proc cannot then mean two different processes.
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let cmdline = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).ok()?;
        is_ours(&cmdline, namespace, id).then_some(Self { pidfd })
    }

    /// Asks the process to end, waits up to `patience`, then kills it and waits as long again. True once it is gone.
    pub fn end(&self, patience: Duration) -> bool {
        [Signal::TERM, Signal::KILL].into_iter().any(|signal| {
            // Fails only when the process is gone already, which the wait then sees.
            let _ = pidfd_send_signal(&self.pidfd, signal);
            self.wait(patience)
        })
    }

    fn wait(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(timeout) = Timespec::try_from(left) else {
                return false;
            };
            match poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return false,
                Ok(_) => return true,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

/// Whether a command line (NUL-separated) is that of the serving shim of sandbox `id` in `namespace`.
fn is_ours(cmdline: &[u8], namespace: &str, id: &str) -> bool {
    let words: Vec<&str> = cmdline
        .split(|b| *b == 0)
        .filter_map(|word| std::str::from_utf8(word).ok())
        .collect();
    let named = words
        .first()
        .and_then(|word| Path::new(word).file_name())
        .is_some_and(|name| name == version::NAME);
    let has = |flag: &str, value: &str| words.windows(2).any(|pair| pair == [flag, value]);
    let helper = words.iter().any(|word| matches!(*word, "start" | "delete"));
    named && has("-namespace", namespace) && has("-id", id) && !helper
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_when_another_sandboxs_is_not_ours() {
        let cases: [(&[u8], bool); 7] = [
            (
                b"/usr/local/bin/containerd-shim-kata-v2\0-namespace\0n\0-id\0abc\0",
                true,
            ),
            (
                b"containerd-shim-kata-v2\0-id\0abc\0-debug\0-namespace\0n\0",
                true,
            ),
            (b"containerd-shim-kata-v2\0-namespace\0m\0-id\0abc\0", false),
            (
                b"/usr/bin/containerd-shim-runc-v2\0-namespace\0n\0-id\0abc\0",
                false,
            ),
            (b"containerd-shim-kata-v2\0-namespace\0n\0-id\0abcd\0", false),
            (
                b"containerd-shim-kata-v2\0-namespace\0n\0-id\0abc\0delete\0",
                false,
            ),
            (b"", false),
        ];
        for (cmdline, expected) in cases {
            assert_eq!(
                is_ours(cmdline, "n", "abc"),
                expected,
                "{:?}",
                String::from_utf8_lossy(cmdline)
            );
        }
    }

    #[test]
    fn process_when_foreign_is_not_found() {
        assert!(ShimProcess::find(std::process::id(), "n", "abc").is_none());
        assert!(ShimProcess::find(u32::MAX, "n", "abc").is_none());
        assert!(ShimProcess::find(0, "n", "abc").is_none());
    }

    #[test]
    fn process_when_stubborn_is_killed() {
        let mut child = std::process::Command::new("sh")
            .args(["-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        let process = ShimProcess {
            pidfd: pidfd_open(pid, PidfdFlags::empty()).unwrap(),
        };

        // Long enough for the kernel to end it on a busy machine; SIGTERM alone does not.
        assert!(process.end(Duration::from_secs(5)));

        use std::os::unix::process::ExitStatusExt;
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }
}
