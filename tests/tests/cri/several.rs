//! Several pods at once, and pod to pod. `make stress` runs more of them.

use std::net::IpAddr;
use std::thread;

use tests::cri::config::Series;
use tests::cri::pods::{Pod, Pods};
use tests::cri::traffic::fetch_soon;

/// How many pods.
fn count() -> usize {
    let asked = std::env::var("STRESS_PODS").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(4)
}

/// The results of `work` for every item, each done by a thread of its own.
fn at_once<T: Send, U: Send>(items: Vec<T>, work: impl Fn(T) -> U + Sync) -> Vec<U> {
    thread::scope(|scope| {
        let work = &work;
        let start = |item| scope.spawn(move || work(item));
        let threads = items.into_iter().map(start).collect::<Vec<_>>();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn stress_pods_when_started_at_once_all_reach_each_other() {
    Pods::like_runc("several", Series::V1_7, |pods| {
        let count = count();
        let made = at_once((0..count).collect(), |_| pods.pod("bridge").run());
        let servers = at_once(made.iter().enumerate().collect(), |(number, pod)| {
            pod.web(&format!("pod {number}"))
        });
        let addresses = made.iter().map(Pod::address).collect::<Vec<_>>();
        let mut apart = addresses.clone();
        apart.sort();
        apart.dedup();
        assert_eq!(apart.len(), count, "every pod has its own address: {addresses:?}");
        for (number, address) in addresses.iter().enumerate() {
            assert_eq!(
                fetch_soon((*address, 8080), "/", pods.limit()),
                format!("pod {number}\n")
            );
        }
        // Each asks the next one.
        for (number, server) in servers.iter().enumerate() {
            let next = (number + 1) % count;
            let address: IpAddr = addresses[next];
            let answer = server.sh(&format!("wget -q -O - http://{address}:8080/"));
            assert_eq!(answer, format!("pod {next}\n"), "asked by pod {number}");
        }
    });
}
