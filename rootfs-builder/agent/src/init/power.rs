//! The end of the machine.

use std::panic::PanicHookInfo;

use nix::mount::{MntFlags, umount2};
use nix::sys::reboot::{RebootMode, reboot};

/// Filesystems that hold somebody's data. The others vanish with the machine.
const DATA: [&str; 5] = ["virtiofs", "ext4", "xfs", "btrfs", "overlay"];

/// Writes back what is dirty and powers off. Never returns; if the machine cannot power off it is reset, and the
/// host sees either as the end of the VM.
pub fn power_off() -> ! {
    nix::unistd::sync();
    detach_data();
    die()
}

/// Makes a panic of PID 1 end the machine with one clear line instead of a kernel panic about a dead init.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info: &PanicHookInfo<'_>| {
        eprintln!("kata-agent: internal error, powering off: {info}");
        die();
    }));
}

/// Best effort: what is still busy is detached, and was synced above.
fn detach_data() {
    let Ok(mounts) = std::fs::read_to_string("/proc/self/mounts") else {
        return;
    };
    for line in mounts.lines().rev() {
        let mut fields = line.split(' ').skip(1);
        let (Some(target), Some(fstype)) = (fields.next(), fields.next()) else {
            continue;
        };
        if DATA.contains(&fstype) {
            let _ = umount2(target, MntFlags::MNT_DETACH);
        }
    }
}

fn die() -> ! {
    // Both return only if they fail.
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    eprintln!("kata-agent: power off: {error}; resetting");
    let Err(error) = reboot(RebootMode::RB_AUTOBOOT);
    eprintln!("kata-agent: reset: {error}");
    // The kernel refuses only callers without CAP_SYS_BOOT, which PID 1 has; its exit is a kernel panic, and
    // `panic=-1` resets the machine.
    std::process::exit(1)
}
