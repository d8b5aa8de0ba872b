//! The figures of a pod: those of its containers together.

use std::collections::BTreeMap;

use crate::types::{ContainerStats, HugePageFigures, IoFigures, MemoryEvents, MemoryFigures};

/// Adds the figures of all containers of a pod, `all`; the interfaces, which every container reports, are the pod's.
/// Pressure is left out: stalls at the same time do not add up.
pub(crate) fn together(all: &[ContainerStats]) -> ContainerStats {
    let sum =
        |figure: &dyn Fn(&ContainerStats) -> u64| all.iter().map(figure).fold(0_u64, u64::saturating_add);
    let three = |figures: &dyn Fn(&ContainerStats) -> [u64; 3]| {
        [0, 1, 2].map(|index: usize| sum(&|stats| figures(stats).get(index).copied().unwrap_or_default()))
    };
    ContainerStats {
        cpu_usec: three(&|stats| stats.cpu_usec),
        throttling: three(&|stats| stats.throttling),
        memory: memory(all, |stats| stats.memory),
        swap: memory(all, |stats| stats.swap),
        memory_stat: by_name(all),
        memory_events: events(all),
        pids_current: sum(&|stats| stats.pids_current),
        // No limit of one is none of all.
        pids_limit: if all.iter().any(|stats| stats.pids_limit == 0) {
            0
        } else {
            sum(&|stats| stats.pids_limit)
        },
        io: by_device(all),
        huge_pages: by_size(all),
        pressure: [None; 3],
        network: all.first().map(|stats| stats.network.clone()).unwrap_or_default(),
    }
}

fn memory(all: &[ContainerStats], of: impl Fn(&ContainerStats) -> MemoryFigures) -> MemoryFigures {
    let nothing = MemoryFigures {
        limit: if all.is_empty() { u64::MAX } else { 0 },
        ..Default::default()
    };
    all.iter().map(of).fold(nothing, |sum, one| MemoryFigures {
        usage: sum.usage.saturating_add(one.usage),
        // Saturates: no limit of one is none of all.
        limit: sum.limit.saturating_add(one.limit),
        peak: sum.peak.saturating_add(one.peak),
    })
}

fn by_name(all: &[ContainerStats]) -> Vec<(String, u64)> {
    let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
    for (name, value) in all.iter().flat_map(|stats| &stats.memory_stat) {
        let sum = sums.entry(name).or_default();
        *sum = sum.saturating_add(*value);
    }
    sums.into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

fn events(all: &[ContainerStats]) -> MemoryEvents {
    all.iter()
        .map(|stats| stats.memory_events)
        .fold(MemoryEvents::default(), |sum, one| MemoryEvents {
            low: sum.low.saturating_add(one.low),
            high: sum.high.saturating_add(one.high),
            max: sum.max.saturating_add(one.max),
            oom: sum.oom.saturating_add(one.oom),
            oom_kill: sum.oom_kill.saturating_add(one.oom_kill),
        })
}

fn by_device(all: &[ContainerStats]) -> Vec<IoFigures> {
    let mut sums: BTreeMap<(u64, u64), IoFigures> = BTreeMap::new();
    for one in all.iter().flat_map(|stats| &stats.io) {
        let sum = sums.entry(one.device).or_default();
        sum.device = one.device;
        for (sum, one) in [(&mut sum.bytes, one.bytes), (&mut sum.operations, one.operations)] {
            for (sum, one) in sum.iter_mut().zip(one) {
                *sum = sum.saturating_add(one);
            }
        }
    }
    sums.into_values().collect()
}

fn by_size(all: &[ContainerStats]) -> Vec<HugePageFigures> {
    let mut sums: BTreeMap<&str, HugePageFigures> = BTreeMap::new();
    for one in all.iter().flat_map(|stats| &stats.huge_pages) {
        let sum = sums.entry(&one.size).or_default();
        sum.size.clone_from(&one.size);
        sum.usage = sum.usage.saturating_add(one.usage);
        sum.peak = sum.peak.saturating_add(one.peak);
        sum.failed = sum.failed.saturating_add(one.failed);
    }
    sums.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::NetworkFigures;

    fn one(limit: u64, pids_limit: u64) -> ContainerStats {
        ContainerStats {
            cpu_usec: [30, 20, 10],
            memory: MemoryFigures {
                usage: 4096,
                limit,
                peak: 8192,
            },
            memory_stat: vec![("anon".into(), 1), ("file".into(), 2)],
            pids_current: 3,
            pids_limit,
            io: vec![IoFigures {
                device: (8, 0),
                bytes: [1, 2],
                operations: [3, 4],
            }],
            network: vec![NetworkFigures {
                name: "eth0".into(),
                received: [7, 0, 0, 0],
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn figures_of_a_pod_when_it_has_two_containers_are_their_sums() {
        let pod = together(&[one(1 << 20, 10), one(1 << 21, 20)]);

        assert_eq!(pod.cpu_usec, [60, 40, 20]);
        assert_eq!(
            (pod.memory.usage, pod.memory.limit, pod.memory.peak),
            (8192, 3 << 20, 16384)
        );
        assert_eq!(pod.memory_stat, [("anon".to_owned(), 2), ("file".to_owned(), 4)]);
        assert_eq!((pod.pids_current, pod.pids_limit), (6, 30));
        assert_eq!((pod.io[0].bytes, pod.io[0].operations), ([2, 4], [6, 8]));
        assert_eq!(
            (pod.network.len(), pod.network[0].received[0]),
            (1, 7),
            "the interfaces are the pod's"
        );
    }

    #[test]
    fn limit_of_a_pod_when_a_container_has_none_is_none() {
        let pod = together(&[one(1 << 20, 10), one(u64::MAX, 0)]);
        assert_eq!((pod.memory.limit, pod.pids_limit), (u64::MAX, 0));
        assert_eq!(together(&[]).memory.limit, u64::MAX);
    }
}
