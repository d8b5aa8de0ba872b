//! The agent's figures in the names of cgroup v2.

use std::collections::BTreeMap;

use protobuf::MessageField;
use protocols::agent as wire;

use crate::types::{
    ContainerStats, HugePageFigures, IoFigures, MemoryEvents, MemoryFigures, NetworkFigures, Pressure,
    PressureLine,
};

/// Nanoseconds per microsecond.
const NS: u64 = 1000;

/// `pod`: the container stands for its pod, whose network it is.
pub(crate) fn convert(response: wire::StatsContainerResponse, pod: bool) -> ContainerStats {
    let cgroup = response.cgroup_stats.unwrap_or_default();
    let cpu = cgroup.cpu_stats.unwrap_or_default();
    let (usage, throttling) = (
        cpu.cpu_usage.unwrap_or_default(),
        cpu.throttling_data.unwrap_or_default(),
    );
    let memory = cgroup.memory_stats.unwrap_or_default();
    let pids = cgroup.pids_stats.unwrap_or_default();
    let mut memory_stat: Vec<(String, u64)> = memory.stats.into_iter().collect();
    memory_stat.sort();
    let mut huge_pages: Vec<_> = cgroup.hugetlb_stats.into_iter().map(huge_page).collect();
    huge_pages.sort_by(|one, other| one.size.cmp(&other.size));
    ContainerStats {
        cpu_usec: [
            usage.total_usage / NS,
            usage.usage_in_usermode / NS,
            usage.usage_in_kernelmode / NS,
        ],
        throttling: [
            throttling.periods,
            throttling.throttled_periods,
            throttling.throttled_time / NS,
        ],
        memory: figures(memory.usage),
        swap: figures(memory.swap_usage),
        memory_stat,
        memory_events: cgroup.memory_events.map(memory_events).unwrap_or_default(),
        pids_current: pids.current,
        pids_limit: pids.limit,
        io: io(&cgroup.blkio_stats.unwrap_or_default()),
        huge_pages,
        pressure: [cgroup.cpu_pressure, cgroup.memory_pressure, cgroup.io_pressure].map(pressure),
        network: if pod {
            response.network_stats.into_iter().map(network).collect()
        } else {
            Vec::new()
        },
    }
}

fn figures(data: MessageField<wire::MemoryData>) -> MemoryFigures {
    let data = data.unwrap_or_default();
    MemoryFigures {
        usage: data.usage,
        limit: if data.limit == 0 { u64::MAX } else { data.limit },
        peak: data.max_usage,
    }
}

fn memory_events(events: wire::MemoryEvents) -> MemoryEvents {
    MemoryEvents {
        low: events.low,
        high: events.high,
        max: events.max,
        oom: events.oom,
        oom_kill: events.oom_kill,
    }
}

/// One entry for each device; the wire has one for each figure.
fn io(stats: &wire::BlkioStats) -> Vec<IoFigures> {
    let mut devices: BTreeMap<(u64, u64), IoFigures> = BTreeMap::new();
    let mut add = |entries: &[wire::BlkioStatsEntry], field: fn(&mut IoFigures) -> &mut [u64; 2]| {
        for entry in entries {
            let figures = devices.entry((entry.major, entry.minor)).or_default();
            let [read, write] = field(figures);
            // cgroup v1 has them with a capital; discards and sums have no place.
            match entry.op.to_ascii_lowercase().as_str() {
                "read" => *read = entry.value,
                "write" => *write = entry.value,
                _ => {}
            }
        }
    };
    add(&stats.io_service_bytes_recursive, |figures| &mut figures.bytes);
    add(&stats.io_serviced_recursive, |figures| &mut figures.operations);
    let with_device = |(device, figures)| IoFigures { device, ..figures };
    devices.into_iter().map(with_device).collect()
}

fn huge_page((size, stats): (String, wire::HugetlbStats)) -> HugePageFigures {
    HugePageFigures {
        size,
        usage: stats.usage,
        peak: stats.max_usage,
        failed: stats.failcnt,
    }
}

fn pressure(pressure: MessageField<wire::Pressure>) -> Option<Pressure> {
    let line = |line: MessageField<wire::PressureLine>| {
        let line = line.unwrap_or_default();
        PressureLine {
            average: [line.avg10, line.avg60, line.avg300],
            total: line.total,
        }
    };
    pressure.into_option().map(|pressure| Pressure {
        some: line(pressure.some),
        full: line(pressure.full),
    })
}

fn network(stats: wire::NetworkStats) -> NetworkFigures {
    NetworkFigures {
        name: stats.name,
        received: [
            stats.rx_bytes,
            stats.rx_packets,
            stats.rx_errors,
            stats.rx_dropped,
        ],
        sent: [
            stats.tx_bytes,
            stats.tx_packets,
            stats.tx_errors,
            stats.tx_dropped,
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some<T>(value: T) -> MessageField<T> {
        MessageField::some(value)
    }

    fn entry(major: u64, op: &str, value: u64) -> wire::BlkioStatsEntry {
        wire::BlkioStatsEntry {
            major,
            op: op.into(),
            value,
            ..Default::default()
        }
    }

    fn full_response() -> wire::StatsContainerResponse {
        let data = |usage, max_usage, limit| wire::MemoryData {
            usage,
            max_usage,
            limit,
            ..Default::default()
        };
        let line = wire::PressureLine {
            avg10: 1.5,
            total: 4,
            ..Default::default()
        };
        let cgroup = wire::CgroupStats {
            cpu_stats: some(wire::CpuStats {
                cpu_usage: some(wire::CpuUsage {
                    total_usage: 3_000,
                    usage_in_usermode: 2_000,
                    usage_in_kernelmode: 1_000,
                    ..Default::default()
                }),
                throttling_data: some(wire::ThrottlingData {
                    periods: 9,
                    throttled_periods: 2,
                    throttled_time: 7_000,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            memory_stats: some(wire::MemoryStats {
                usage: some(data(7, 8, 9)),
                swap_usage: some(data(4, 5, 0)),
                stats: [("inactive_file".to_owned(), 4)].into(),
                ..Default::default()
            }),
            blkio_stats: some(wire::BlkioStats {
                io_service_bytes_recursive: vec![
                    entry(8, "read", 10),
                    entry(8, "Write", 11),
                    entry(8, "discard", 12),
                    entry(253, "write", 13),
                ],
                io_serviced_recursive: vec![entry(8, "read", 1)],
                ..Default::default()
            }),
            hugetlb_stats: [(
                "2MB".to_owned(),
                wire::HugetlbStats {
                    usage: 6,
                    failcnt: 1,
                    ..Default::default()
                },
            )]
            .into(),
            memory_events: some(wire::MemoryEvents {
                oom_kill: 3,
                ..Default::default()
            }),
            io_pressure: some(wire::Pressure {
                some: some(line),
                ..Default::default()
            }),
            ..Default::default()
        };
        wire::StatsContainerResponse {
            cgroup_stats: some(cgroup),
            network_stats: vec![wire::NetworkStats {
                name: "eth0".into(),
                rx_bytes: 1,
                tx_dropped: 2,
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn figures_when_converted_keep_their_meaning() {
        let stats = convert(full_response(), true);

        assert_eq!((stats.cpu_usec, stats.throttling), ([3, 2, 1], [9, 2, 7]));
        let figures = |usage, peak, limit| MemoryFigures { usage, limit, peak };
        assert_eq!(
            (stats.memory, stats.swap),
            (figures(7, 8, 9), figures(4, 5, u64::MAX))
        );
        assert_eq!(stats.memory_stat, [("inactive_file".to_owned(), 4)]);
        assert_eq!(stats.memory_events.oom_kill, 3);
        let device = |major, bytes, operations| IoFigures {
            device: (major, 0),
            bytes,
            operations,
        };
        assert_eq!(
            stats.io,
            [device(8, [10, 11], [1, 0]), device(253, [0, 13], [0, 0])]
        );
        assert_eq!(
            (stats.huge_pages[0].size.as_str(), stats.huge_pages[0].failed),
            ("2MB", 1)
        );
        let [cpu, memory, io] = stats.pressure;
        assert_eq!((cpu, memory), (None, None));
        assert_eq!(io.map(|io| (io.some.average[0], io.some.total)), Some((1.5, 4)));
        assert_eq!((stats.network[0].received[0], stats.network[0].sent[3]), (1, 2));
    }

    #[test]
    fn figures_when_missing_mean_no_limit() {
        let stats = convert(wire::StatsContainerResponse::new(), true);
        assert_eq!((stats.memory.limit, stats.swap.limit), (u64::MAX, u64::MAX));
    }

    #[test]
    fn network_when_counted_is_the_pods() {
        assert_eq!(convert(full_response(), false).network, []);
    }
}
