//! A container's limits and figures: `UpdateContainer`, `PauseContainer`, `ResumeContainer`, `StatsContainer`.
//!
//! Figures are read from the cgroup's files directly. A file that a kernel leaves out (no swap, no pressure stall
//! information) is a zero, not an error.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use libcgroups::common::{CgroupConfig, CgroupManager, ControllerOpt, create_cgroup_manager};
use oci_spec::runtime::LinuxResources;
use protobuf::MessageField;
use protocols::agent::{
    BlkioStats, BlkioStatsEntry, CgroupStats, CpuStats, CpuUsage, HugetlbStats, MemoryData, MemoryEvents,
    MemoryStats, NetworkStats, PidsStats, Pressure, PressureLine, ThrottlingData,
};
use tokio::time::{Instant, sleep};

use super::cgroup::Cgroup;

const NANOSECONDS_PER_MICROSECOND: u64 = 1000;
/// How long the kernel may take to freeze: a process in the middle of a system call has to come out of it.
const FREEZE_PATIENCE: Duration = Duration::from_secs(10);
const FREEZE_POLL: Duration = Duration::from_millis(2);

/// A limit that could not be set.
#[derive(Debug, thiserror::Error)]
pub enum ResourceError {
    /// The kernel, or libcgroups, refused a limit.
    #[error("set limits: {0}")]
    Limits(String),
    /// A cgroup file could not be written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Processes did not freeze or thaw.
    #[error("cgroup not {wanted} after {} s", FREEZE_PATIENCE.as_secs())]
    Freeze {
        /// `frozen` or `thawed`.
        wanted: &'static str,
    },
}

impl Cgroup {
    /// Sets the limits that `resources` names; the others stay.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), ResourceError> {
        let config = CgroupConfig {
            cgroup_path: self.relative(),
            systemd_cgroup: false,
            container_name: String::new(),
        };
        let manager =
            create_cgroup_manager(config).map_err(|error| ResourceError::Limits(error.to_string()))?;
        let options = ControllerOpt {
            resources,
            disable_oom_killer: false,
            oom_score_adj: None,
            freezer_state: None,
        };
        manager
            .apply(&options)
            .map_err(|error| ResourceError::Limits(error.to_string()))
    }

    /// Stops every process in it, or lets them go on, and waits until it is so.
    pub async fn freeze(&self, frozen: bool) -> Result<(), ResourceError> {
        let path = self.file("cgroup.freeze");
        std::fs::write(&path, if frozen { "1" } else { "0" })
            .map_err(|source| ResourceError::File { path, source })?;
        let deadline = Instant::now() + FREEZE_PATIENCE;
        while self.is_frozen() != frozen {
            if Instant::now() >= deadline {
                return Err(ResourceError::Freeze {
                    wanted: if frozen { "frozen" } else { "thawed" },
                });
            }
            sleep(FREEZE_POLL).await;
        }
        Ok(())
    }

    /// What the container uses.
    pub fn stats(&self) -> CgroupStats {
        let cpu = self.table("cpu.stat");
        let field = |table: &HashMap<String, u64>, name: &str| table.get(name).copied().unwrap_or_default();
        let cpu_usage = CpuUsage {
            total_usage: field(&cpu, "usage_usec") * NANOSECONDS_PER_MICROSECOND,
            usage_in_usermode: field(&cpu, "user_usec") * NANOSECONDS_PER_MICROSECOND,
            usage_in_kernelmode: field(&cpu, "system_usec") * NANOSECONDS_PER_MICROSECOND,
            ..Default::default()
        };
        let throttling = ThrottlingData {
            periods: field(&cpu, "nr_periods"),
            throttled_periods: field(&cpu, "nr_throttled"),
            throttled_time: field(&cpu, "throttled_usec") * NANOSECONDS_PER_MICROSECOND,
            ..Default::default()
        };
        let memory = self.table("memory.stat");
        CgroupStats {
            cpu_stats: MessageField::some(CpuStats {
                cpu_usage: MessageField::some(cpu_usage),
                throttling_data: MessageField::some(throttling),
                ..Default::default()
            }),
            memory_stats: MessageField::some(MemoryStats {
                cache: field(&memory, "file"),
                usage: MessageField::some(self.memory("memory")),
                swap_usage: MessageField::some(self.memory("memory.swap")),
                use_hierarchy: true,
                stats: memory,
                ..Default::default()
            }),
            pids_stats: MessageField::some(PidsStats {
                current: self.number("pids.current"),
                limit: self.limit("pids.max"),
                ..Default::default()
            }),
            blkio_stats: MessageField::some(self.block_io()),
            hugetlb_stats: self.huge_pages(),
            memory_events: MessageField::some(self.memory_events()),
            cpu_pressure: self.pressure("cpu.pressure"),
            memory_pressure: self.pressure("memory.pressure"),
            io_pressure: self.pressure("io.pressure"),
            ..Default::default()
        }
    }

    /// How often the kernel killed a process of the container for memory.
    pub fn oom_kills(&self) -> u64 {
        self.table("memory.events")
            .get("oom_kill")
            .copied()
            .unwrap_or_default()
    }

    fn memory(&self, prefix: &str) -> MemoryData {
        MemoryData {
            usage: self.number(&format!("{prefix}.current")),
            max_usage: self.number(&format!("{prefix}.peak")),
            limit: self.limit(&format!("{prefix}.max")),
            failcnt: self
                .table(&format!("{prefix}.events"))
                .get("max")
                .copied()
                .unwrap_or_default(),
            ..Default::default()
        }
    }

    fn memory_events(&self) -> MemoryEvents {
        let events = self.table("memory.events");
        let count = |name: &str| events.get(name).copied().unwrap_or_default();
        MemoryEvents {
            low: count("low"),
            high: count("high"),
            max: count("max"),
            oom: count("oom"),
            oom_kill: count("oom_kill"),
            ..Default::default()
        }
    }

    /// By page size, as the kernel writes it in `hugetlb.2MB.current`.
    fn huge_pages(&self) -> HashMap<String, HugetlbStats> {
        let entries = std::fs::read_dir(self.file("")).into_iter().flatten().flatten();
        let sizes = entries.filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?;
            // `hugetlb.2MB.rsvd.current` counts reservations.
            (!size.contains('.')).then(|| size.to_owned())
        });
        sizes
            .map(|size| {
                let stats = HugetlbStats {
                    usage: self.number(&format!("hugetlb.{size}.current")),
                    failcnt: self
                        .table(&format!("hugetlb.{size}.events"))
                        .get("max")
                        .copied()
                        .unwrap_or_default(),
                    ..Default::default()
                };
                (size, stats)
            })
            .collect()
    }

    /// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same for `full`.
    fn pressure(&self, file: &str) -> MessageField<Pressure> {
        let text = self.text(file);
        let line = |name: &str| -> MessageField<PressureLine> {
            let figures = text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            let Some(figures) = figures else {
                return MessageField::none();
            };
            let mut pressure = PressureLine::new();
            for (key, value) in figures
                .split_ascii_whitespace()
                .filter_map(|word| word.split_once('='))
            {
                match key {
                    "avg10" => pressure.avg10 = value.parse().unwrap_or_default(),
                    "avg60" => pressure.avg60 = value.parse().unwrap_or_default(),
                    "avg300" => pressure.avg300 = value.parse().unwrap_or_default(),
                    "total" => pressure.total = value.parse().unwrap_or_default(),
                    _ => {}
                }
            }
            MessageField::some(pressure)
        };
        if text.is_empty() {
            return MessageField::none();
        }
        MessageField::some(Pressure {
            some: line("some"),
            full: line("full"),
            ..Default::default()
        })
    }

    /// `MAJOR:MINOR rbytes=N wbytes=N rios=N wios=N …` per device.
    fn block_io(&self) -> BlkioStats {
        let mut stats = BlkioStats::default();
        for line in self.text("io.stat").lines() {
            let mut words = line.split_ascii_whitespace();
            let device = words.next().and_then(|device| device.split_once(':'));
            let Some((Ok(major), Ok(minor))) = device.map(|(major, minor)| (major.parse(), minor.parse()))
            else {
                continue;
            };
            for (key, value) in words.filter_map(|word| word.split_once('=')) {
                let (list, op) = match key {
                    "rbytes" => (&mut stats.io_service_bytes_recursive, "read"),
                    "wbytes" => (&mut stats.io_service_bytes_recursive, "write"),
                    "rios" => (&mut stats.io_serviced_recursive, "read"),
                    "wios" => (&mut stats.io_serviced_recursive, "write"),
                    "dbytes" => (&mut stats.io_service_bytes_recursive, "discard"),
                    "dios" => (&mut stats.io_serviced_recursive, "discard"),
                    _ => continue,
                };
                let value = value.parse().unwrap_or_default();
                list.push(BlkioStatsEntry {
                    major,
                    minor,
                    op: op.to_owned(),
                    value,
                    ..Default::default()
                });
            }
        }
        stats
    }

    fn number(&self, file: &str) -> u64 {
        self.text(file).trim().parse().unwrap_or_default()
    }

    /// "max" is no limit, which has always been the largest number to readers of these figures.
    fn limit(&self, file: &str) -> u64 {
        match self.text(file).trim() {
            "max" => u64::MAX,
            number => number.parse().unwrap_or_default(),
        }
    }

    pub(super) fn table(&self, file: &str) -> HashMap<String, u64> {
        let text = self.text(file);
        let entries = text.lines().filter_map(|line| line.split_once(' '));
        entries
            .filter_map(|(key, value)| Some((key.to_owned(), value.trim().parse().ok()?)))
            .collect()
    }

    fn text(&self, file: &str) -> String {
        std::fs::read_to_string(self.file(file)).unwrap_or_default()
    }
}

/// The pod's network interfaces, from the text of /proc/net/dev; without lo.
pub fn network_stats(text: &str) -> Vec<NetworkStats> {
    /// Column of each figure behind the colon: bytes, packets, errors, drops; received from 0, sent from 8.
    const SENT: usize = 8;
    let mut interfaces = Vec::new();
    for (name, figures) in text.lines().filter_map(|line| line.split_once(':')) {
        let name = name.trim();
        if name == "lo" {
            continue;
        }
        let figures: Vec<u64> = figures
            .split_ascii_whitespace()
            .map(|figure| figure.parse().unwrap_or_default())
            .collect();
        let column = |index: usize| figures.get(index).copied().unwrap_or_default();
        interfaces.push(NetworkStats {
            name: name.to_owned(),
            rx_bytes: column(0),
            rx_packets: column(1),
            rx_errors: column(2),
            rx_dropped: column(3),
            tx_bytes: column(SENT),
            tx_packets: column(SENT + 1),
            tx_errors: column(SENT + 2),
            tx_dropped: column(SENT + 3),
            ..Default::default()
        });
    }
    interfaces
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stats_when_files_exist_or_not_are_figures_or_zero() {
        let folder = std::env::temp_dir().join(format!("agent-cgroup-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for (file, text) in [
            (
                "cpu.stat",
                "usage_usec 5\nuser_usec 3\nsystem_usec 2\nnr_periods 9\nnr_throttled 1\nthrottled_usec 6\n",
            ),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.25 avg300=0.00 total=77\n",
            ),
            ("memory.swap.current", "8192\n"),
            ("memory.swap.max", "16384\n"),
            ("hugetlb.2MB.current", "4194304\n"),
            ("hugetlb.2MB.rsvd.current", "1\n"),
            ("hugetlb.2MB.events", "max 3\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 1\nfile 2048\n"),
            ("memory.events", "max 7\noom_kill 2\n"),
            ("pids.current", "3\n"),
            ("io.stat", "254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0\n"),
        ] {
            std::fs::write(folder.join(file), text).unwrap();
        }
        let cgroup = Cgroup::at(folder.clone());

        let stats = cgroup.stats();

        let usage = &stats.cpu_stats.cpu_usage;
        assert_eq!(
            (
                usage.total_usage,
                usage.usage_in_usermode,
                usage.usage_in_kernelmode
            ),
            (5000, 3000, 2000)
        );
        let memory = &stats.memory_stats.usage;
        assert_eq!((memory.usage, memory.limit, memory.failcnt), (4096, u64::MAX, 7));
        assert_eq!(stats.memory_stats.cache, 2048);
        let throttling = &stats.cpu_stats.throttling_data;
        assert_eq!(
            (
                throttling.periods,
                throttling.throttled_periods,
                throttling.throttled_time
            ),
            (9, 1, 6000)
        );
        let swap = &stats.memory_stats.swap_usage;
        assert_eq!((swap.usage, swap.limit), (8192, 16384));
        assert_eq!((stats.memory_events.max, stats.memory_events.oom_kill), (7, 2));
        let pressure = &stats.cpu_pressure;
        assert_eq!(
            (pressure.some.avg10, pressure.some.avg60, pressure.some.total),
            (1.5, 0.25, 77)
        );
        assert!(pressure.full.is_none() && stats.io_pressure.is_none());
        let huge: Vec<_> = stats.hugetlb_stats.iter().collect();
        assert_eq!(huge.len(), 1);
        assert_eq!(
            (huge[0].0.as_str(), huge[0].1.usage, huge[0].1.failcnt),
            ("2MB", 4_194_304, 3)
        );
        assert_eq!(stats.pids_stats.current, 3);
        let bytes: Vec<u64> = stats
            .blkio_stats
            .io_service_bytes_recursive
            .iter()
            .map(|entry| entry.value)
            .collect();
        assert_eq!(bytes, [10, 20, 0]);
        assert_eq!(cgroup.oom_kills(), 2);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn network_stats_when_read_skip_the_header_and_lo() {
        let text = "Inter-|   Receive                            |  Transmit\n \
                    face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop\n    \
                    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 3 4 0 0 0 0 50 6 7 8 0 0 0 0\n";

        let stats = network_stats(text);

        assert_eq!(stats.len(), 1);
        let eth0 = &stats[0];
        assert_eq!(
            (eth0.name.as_str(), eth0.rx_bytes, eth0.rx_dropped),
            ("eth0", 10, 4)
        );
        assert_eq!((eth0.tx_bytes, eth0.tx_dropped), (50, 8));
    }
}
