//! The agent's figures in the names of cgroup v2.

use protocols::agent as wire;

use crate::types::ContainerStats;

/// Nanoseconds per microsecond.
const NS: u64 = 1000;

pub(super) fn convert(response: wire::StatsContainerResponse) -> ContainerStats {
    let cgroup = response.cgroup_stats.unwrap_or_default();
    let cpu = cgroup.cpu_stats.unwrap_or_default().cpu_usage.unwrap_or_default();
    let memory = cgroup.memory_stats.unwrap_or_default();
    let usage = memory.usage.unwrap_or_default();
    let pids = cgroup.pids_stats.unwrap_or_default();
    let mut memory_stat: Vec<(String, u64)> = memory.stats.into_iter().collect();
    memory_stat.sort();
    ContainerStats {
        cpu_usec: [
            cpu.total_usage / NS,
            cpu.usage_in_usermode / NS,
            cpu.usage_in_kernelmode / NS,
        ],
        memory_usage: usage.usage,
        memory_limit: if usage.limit == 0 { u64::MAX } else { usage.limit },
        memory_stat,
        pids_current: pids.current,
        pids_limit: pids.limit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::MessageField;

    #[test]
    fn figures_keep_their_meaning() {
        let mut response = wire::StatsContainerResponse::new();
        assert_eq!(
            convert(response.clone()).memory_limit,
            u64::MAX,
            "no figures, no limit"
        );

        let cpu = wire::CpuUsage {
            total_usage: 3_000,
            usage_in_usermode: 2_000,
            usage_in_kernelmode: 1_000,
            ..Default::default()
        };
        let memory = wire::MemoryData {
            usage: 7,
            limit: 9,
            ..Default::default()
        };
        response.cgroup_stats = MessageField::some(wire::CgroupStats {
            cpu_stats: MessageField::some(wire::CpuStats {
                cpu_usage: MessageField::some(cpu),
                ..Default::default()
            }),
            memory_stats: MessageField::some(wire::MemoryStats {
                usage: MessageField::some(memory),
                stats: [("inactive_file".to_owned(), 4)].into(),
                ..Default::default()
            }),
            ..Default::default()
        });

        let stats = convert(response);

        assert_eq!(stats.cpu_usec, [3, 2, 1]);
        assert_eq!((stats.memory_usage, stats.memory_limit), (7, 9));
        assert_eq!(stats.memory_stat, [("inactive_file".to_owned(), 4)]);
    }
}
