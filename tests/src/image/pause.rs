//! The program of a pod's sandbox container, as an ELF file of 188 bytes: it ignores SIGCHLD, so that the kernel reaps what a
//! shared PID namespace leaves to its first process, and waits.

use super::{elf, header};

/// x86-64: `rt_sigaction(SIGCHLD, &{SIG_IGN}, NULL, 8); for (;;) pause();`, and the action behind it.
const CODE: [u8; 68] = [
    0xb8, 13, 0, 0, 0, // mov eax, SYS_rt_sigaction
    0xbf, 17, 0, 0, 0, // mov edi, SIGCHLD
    0x48, 0x8d, 0x35, 0x13, 0, 0, 0, // lea rsi, [rip + 19]: the action
    0x31, 0xd2, // xor edx, edx
    0x41, 0xba, 8, 0, 0, 0, // mov r10d, 8
    0x0f, 0x05, // syscall
    0xb8, 34, 0, 0, 0, // mov eax, SYS_pause
    0x0f, 0x05, // syscall
    0xeb, 0xf7, // jmp to the second mov eax
    1, 0, 0, 0, 0, 0, 0, 0, // handler: SIG_IGN
    0, 0, 0, 0, 0, 0, 0, 0, // flags
    0, 0, 0, 0, 0, 0, 0, 0, // restorer
    0, 0, 0, 0, 0, 0, 0, 0, // mask
];

/// The image's one layer.
pub(super) fn layer() -> std::io::Result<Vec<u8>> {
    let program = elf::program(&CODE);
    let mut tar = tar::Builder::new(Vec::new());
    let mut entry = header(tar::EntryType::Regular, 0o755, program.len(), (0, 0));
    tar.append_data(&mut entry, "pause", program.as_slice())?;
    tar.into_inner()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn program_when_started_waits_until_it_is_killed() {
        let path = std::env::temp_dir().join(format!("pause-{}", std::process::id()));
        elf::write(&path, &CODE).unwrap();
        let mut child = Command::new(&path).spawn().unwrap();
        let status = format!("/proc/{}/status", child.id());
        // SIGCHLD is bit 16 of what it ignores; the shell's parent may have ignored others.
        let ignores = || {
            let text = std::fs::read_to_string(&status).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix("SigIgn:\t"));
            line.and_then(|mask| u64::from_str_radix(mask, 16).ok())
                .is_some_and(|mask| mask >> 16 & 1 == 1)
        };
        let waited = crate::command::eventually(std::time::Duration::from_secs(60), ignores);
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(waited, "it does not ignore SIGCHLD");
        assert_eq!(ended, None);
    }
}
