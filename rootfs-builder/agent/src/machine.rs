//! The virtual machine around the containers: processors and memory plugged in, its clock, its randomness.

#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use tokio::time::{Instant, sleep};

const CPUS: &str = "/sys/devices/system/cpu";
const MEMORY: &str = "/sys/devices/system/memory";
const RANDOM: &str = "/dev/random";

/// Most bytes of entropy taken at once; the kernel hashes them into 32.
const MAX_ENTROPY: usize = 4096;
/// `RNDRESEEDCRNG` of <linux/random.h>: `_IO('R', 7)`.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
const HOTPLUG_POLL: Duration = Duration::from_millis(2);
/// How long plugged processors may take to show up.
const HOTPLUG_PATIENCE: Duration = Duration::from_secs(10);

/// An operation on the machine that failed.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A value that makes no sense.
    #[error("{what}: {value}")]
    Argument {
        /// Of what.
        what: &'static str,
        /// The value.
        value: String,
    },
    /// A system call failed.
    #[error("{call}: {source}")]
    Call {
        /// Which.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A file of the kernel could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Plugged processors did not come.
    #[error("{online} of {wanted} processors online after {} s", HOTPLUG_PATIENCE.as_secs())]
    Timeout {
        /// How many were asked for.
        wanted: usize,
        /// How many came.
        online: usize,
    },
}

/// Size of a memory block in bytes, 0 if this kernel cannot plug memory.
///
/// # Errors
/// The kernel's answer makes no sense.
pub fn memory_block_size() -> Result<u64, MachineError> {
    let path = Path::new(MEMORY).join("block_size_bytes");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(source) => return Err(MachineError::File { path, source }),
    };
    u64::from_str_radix(text.trim(), 16).map_err(|_| MachineError::Argument {
        what: "block_size_bytes",
        value: text.trim().to_owned(),
    })
}

/// Whether memory is plugged by writing its address to the kernel.
pub fn can_probe_memory() -> bool {
    Path::new(MEMORY).join("probe").exists()
}

/// Puts plugged processors (and, unless `cpu_only`, memory) online. With `wait`, until `count` processors are.
///
/// # Errors
/// They do not come in time, or refuse.
pub async fn online(count: u32, wait: bool, cpu_only: bool) -> Result<(), MachineError> {
    if !cpu_only {
        online_all(Path::new(MEMORY), "memory")?;
    }
    let wanted = usize::try_from(count).unwrap_or(usize::MAX);
    let deadline = Instant::now() + HOTPLUG_PATIENCE;
    loop {
        let online = online_all(Path::new(CPUS), "cpu")?;
        if !wait || online >= wanted {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(MachineError::Timeout { wanted, online });
        }
        sleep(HOTPLUG_POLL).await;
    }
}

/// Sets the clock.
///
/// # Errors
/// The time is not one.
pub fn set_clock(seconds: i64, microseconds: i64) -> Result<(), MachineError> {
    if seconds < 0 || !(0..1_000_000).contains(&microseconds) {
        return Err(MachineError::Argument {
            what: "time",
            value: format!("{seconds} s {microseconds} us"),
        });
    }
    let time = TimeSpec::new(seconds, microseconds * 1000);
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(|error| MachineError::Call {
        call: "clock_settime",
        source: error.into(),
    })
}

/// Mixes `entropy` into the random number generator and makes it use it at once.
///
/// # Errors
/// Too much of it, or the device fails.
pub fn reseed(entropy: &[u8]) -> Result<(), MachineError> {
    if entropy.len() > MAX_ENTROPY {
        return Err(MachineError::Argument {
            what: "entropy bytes",
            value: entropy.len().to_string(),
        });
    }
    let failed = |source| MachineError::File {
        path: PathBuf::from(RANDOM),
        source,
    };
    let mut device = OpenOptions::new().write(true).open(RANDOM).map_err(failed)?;
    device.write_all(entropy).map_err(failed)?;
    force_reseed(&device)
}

fn force_reseed(device: &File) -> Result<(), MachineError> {
    // SAFETY: RNDRESEEDCRNG takes no argument; the descriptor is open.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG) };
    nix::errno::Errno::result(result)
        .map(drop)
        .map_err(|error| MachineError::Call {
            call: "RNDRESEEDCRNG",
            source: error.into(),
        })
}

/// Puts every `<kind>N` below `folder` online that is not; returns how many are. One without an `online` file is
/// always online (the boot processor).
fn online_all(folder: &Path, kind: &str) -> Result<usize, MachineError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        entries => entries.map_err(|source| MachineError::File {
            path: folder.to_owned(),
            source,
        })?,
    };
    let mut online = 0;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix(kind))
            .unwrap_or_default();
        if number.is_empty() || !number.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let switch = entry.path().join("online");
        match fs::read_to_string(&switch) {
            Ok(state) if state.trim() == "0" => match fs::write(&switch, "1") {
                Ok(()) => online += 1,
                Err(source) => return Err(MachineError::File { path: switch, source }),
            },
            _ => online += 1,
        }
    }
    Ok(online)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_when_the_time_makes_no_sense_is_left_alone() {
        for (seconds, microseconds) in [(-1, 0), (0, -1), (0, 1_000_000)] {
            let error = set_clock(seconds, microseconds).unwrap_err();
            assert!(matches!(error, MachineError::Argument { .. }), "{error}");
        }
    }

    #[test]
    fn processors_when_offline_are_put_online_and_counted() {
        let folder = std::env::temp_dir().join(format!("agent-cpus-{}", std::process::id()));
        for name in ["cpu0", "cpu1", "cpufreq", "cpu"] {
            fs::create_dir_all(folder.join(name)).unwrap();
        }
        fs::write(folder.join("cpu1/online"), "0\n").unwrap();

        let online = online_all(&folder, "cpu").unwrap();

        assert_eq!(online, 2);
        assert_eq!(fs::read_to_string(folder.join("cpu1/online")).unwrap(), "1");
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn entropy_when_too_much_is_refused() {
        assert!(reseed(&[0; MAX_ENTROPY + 1]).is_err());
    }
}
