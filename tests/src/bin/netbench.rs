//! `make netbench`: what a pod's network costs under the runtime that is tested, beside runc, in one run: RunPodSandbox, an interface
//! for a pod that runs, streams and datagrams between pod and host, streams between pods, memory. In the lab with `--icount` a millisecond is a million instructions.

use std::env;
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use tests::Settings;
use tests::cri::config::Series;
use tests::cri::pods::{Member, Pod, Pods};
use tests::cri::private::host;
use tests::cri::traffic::{flood, source};

/// Rounds; the first one warms caches and is not counted.
const ROUNDS: usize = 4;
/// Bytes per stream.
const STREAM: usize = 64 << 20;
/// Datagrams of a kilobyte.
const DATAGRAMS: usize = 20_000;
/// How long nothing may arrive before a flood counts as over.
const QUIET: Duration = Duration::from_secs(2);

/// What one round measured; times in milliseconds, rates in MB per second.
#[derive(Clone, Default)]
struct Round {
    run_pod: f64,
    attach: f64,
    to_host: f64,
    to_pod: f64,
    between_pods: f64,
    datagrams_to_host: f64,
    datagrams_to_pod: f64,
    shim_kib: f64,
    shim_two_kib: f64,
}

type Column = (&'static str, fn(&Round) -> f64);

const COLUMNS: [Column; 9] = [
    ("RunPodSandbox, ms", |round| round.run_pod),
    ("interface for a running pod, ms", |round| round.attach),
    ("TCP pod to host, MB/s", |round| round.to_host),
    ("TCP host to pod, MB/s", |round| round.to_pod),
    ("TCP pod to pod, MB/s", |round| round.between_pods),
    ("UDP pod to host, MB/s", |round| round.datagrams_to_host),
    ("UDP host to pod, MB/s", |round| round.datagrams_to_pod),
    ("shim's PSS, one network, KiB", |round| round.shim_kib),
    ("shim's PSS, two networks, KiB", |round| round.shim_two_kib),
];

/// Where a pod's container has this program and the libraries it needs: busybox sends no datagrams.
const PROGRAM: &str = "/bench";
const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";

fn main() -> ExitCode {
    if let [_, address, port] = env::args().collect::<Vec<_>>().as_slice() {
        return send(address, port);
    }
    let tested = Pods::on_its_own("netbench", Settings::from_env(), Series::V1_7);
    let reference = tested.beside(false);
    let mut rounds = [Vec::new(), Vec::new()];
    for number in 0..ROUNDS {
        for (pods, rounds) in [&reference, &tested].into_iter().zip(&mut rounds) {
            let measured = round(pods);
            if number > 0 {
                rounds.push(measured);
            }
        }
    }
    let [runc, ours] = rounds;
    println!(
        "| median of {} | runc | {} |\n|---|---|---|",
        ROUNDS - 1,
        Settings::from_env().runtime
    );
    for (name, column) in COLUMNS {
        println!(
            "| {name} | {:.1} | {:.1} |",
            median(&runc, column),
            median(&ours, column)
        );
    }
    ExitCode::SUCCESS
}

/// In a pod: the flood of datagrams.
fn send(address: &str, port: &str) -> ExitCode {
    let (Ok(address), Ok(port)) = (address.parse::<IpAddr>(), port.parse()) else {
        eprintln!("netbench: no address and port: {address} {port}");
        return ExitCode::from(2);
    };
    match flood((address, port), DATAGRAMS) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("netbench: {address} {port}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A waiting container that can send datagrams.
fn sender<'a>(pod: &'a Pod<'_>) -> Member<'a> {
    let program = env::current_exe().unwrap_or_else(|e| panic!("this program: {e}"));
    let folder = program.parent().and_then(Path::to_str);
    let folder = folder.unwrap_or_else(|| panic!("no folder: {}", program.display()));
    let waiting = pod.container(&["sleep", "1000000"]);
    waiting.mount(folder, PROGRAM).mount(LIBRARIES, LIBRARIES).start()
}

fn median(rounds: &[Round], column: fn(&Round) -> f64) -> f64 {
    let mut values = rounds.iter().map(column).collect::<Vec<_>>();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn round(pods: &Pods) -> Round {
    let started = Instant::now();
    let pod = pods.pod("bridge").run();
    let run_pod = started.elapsed().as_secs_f64() * 1000.0;
    let member = sender(&pod);
    let gateway: IpAddr = pods
        .subnets
        .gateway()
        .parse()
        .unwrap_or_else(|e| panic!("gateway: {e}"));
    let shim_kib = pss(&pod);
    let measured = Round {
        run_pod,
        shim_kib,
        to_host: to_host(&member, gateway),
        to_pod: to_pod(&member, gateway),
        between_pods: between_pods(pods, &pod, &member),
        datagrams_to_host: datagrams_to_host(&member, gateway),
        datagrams_to_pod: datagrams_to_pod(&pod, &member),
        attach: attach(&pod, &member),
        shim_two_kib: 0.0,
    };
    drop(pod);
    let two = pods.pod("two").run();
    let _member = two.sleeping();
    Round {
        shim_two_kib: pss(&two),
        ..measured
    }
}

fn rate(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / 1e6 / time.as_secs_f64()
}

/// From the first byte to the last.
fn to_host(member: &Member<'_>, gateway: IpAddr) -> f64 {
    let listener = TcpListener::bind((gateway, 0)).unwrap_or_else(|e| panic!("{gateway}: {e}"));
    let port = listener.local_addr().map_or(0, |address| address.port());
    let reader = thread::spawn(move || {
        let (mut peer, _) = listener.accept()?;
        let mut buffer = vec![0; 1 << 20];
        let (mut total, started) = (0, Instant::now());
        loop {
            match peer.read(&mut buffer)? {
                0 => return std::io::Result::Ok((total, started.elapsed())),
                read => total += read,
            }
        }
    });
    member.sh(&format!("head -c {STREAM} /dev/zero | nc {gateway} {port}"));
    let (total, time) = reader
        .join()
        .unwrap_or_else(|_| panic!("the reader panicked"))
        .unwrap_or_else(|e| panic!("from the pod: {e}"));
    assert_eq!(total, STREAM);
    rate(total, time)
}

fn to_pod(member: &Member<'_>, gateway: IpAddr) -> f64 {
    let sent = source(gateway, vec![0; STREAM]).unwrap_or_else(|e| panic!("{gateway}: {e}"));
    // The command's own start is in it: the same for both.
    let started = Instant::now();
    let out = member.sh(&format!("nc {gateway} {} </dev/null | wc -c", sent.port()));
    assert_eq!(out.trim(), STREAM.to_string());
    rate(STREAM, started.elapsed())
}

/// From a second pod; its command's own start is in it.
fn between_pods(pods: &Pods, pod: &Pod<'_>, member: &Member<'_>) -> f64 {
    const PORT: u16 = 7000;
    let second = pods.pod("bridge").run();
    let sender = second.sleeping();
    let address = pod.address();
    thread::scope(|scope| {
        // The count goes back to the sender, when the stream has ended.
        let receiver = scope.spawn(|| member.sh(&format!("nc -l -p {PORT} -e wc -c")));
        member.sh(&format!(
            "until netstat -tln | grep -q :{PORT}; do usleep 10000; done"
        ));
        let started = Instant::now();
        let received = sender.sh(&format!("head -c {STREAM} /dev/zero | nc {address} {PORT}"));
        let time = started.elapsed();
        receiver
            .join()
            .unwrap_or_else(|_| panic!("the receiver panicked"));
        assert_eq!(received.trim(), STREAM.to_string());
        rate(STREAM, time)
    })
}

/// From an interface's address in the pod's namespace to a command in the container that sees it, and its answer.
fn attach(pod: &Pod<'_>, member: &Member<'_>) -> f64 {
    let netns = pod.netns();
    let netns = netns
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_else(|| panic!("no name: {}", netns.display()));
    let pair = "netbench0";
    host(&[
        "ip", "link", "add", pair, "type", "veth", "peer", "name", "eth1", "netns", netns,
    ])
    .expect_code(0);
    host(&["ip", "link", "set", pair, "up"]).expect_code(0);
    let time = thread::scope(|scope| {
        let seen =
            scope.spawn(|| member.sh("until grep -q 10.79.3.2 /proc/net/fib_trie; do usleep 5000; done"));
        // Its shell asks again and again by then; when not, its start is counted, for both.
        thread::sleep(QUIET);
        pod.in_netns(&["ip", "addr", "add", "10.79.3.2/24", "dev", "eth1"]);
        let started = Instant::now();
        pod.in_netns(&["ip", "link", "set", "eth1", "up"]);
        seen.join().unwrap_or_else(|_| panic!("the waiting one panicked"));
        started.elapsed()
    });
    host(&["ip", "link", "del", pair]).expect_code(0);
    time.as_secs_f64() * 1000.0
}

fn datagrams_to_host(member: &Member<'_>, gateway: IpAddr) -> f64 {
    let socket = UdpSocket::bind((gateway, 0)).unwrap_or_else(|e| panic!("{gateway}: {e}"));
    let port = socket.local_addr().map_or(0, |address| address.port());
    let reader = thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        let (mut total, mut first, mut last) = (0, None, Instant::now());
        // Until the flood begins, as long as it takes.
        while let Ok(read) = socket.recv(&mut buffer) {
            total += read;
            last = Instant::now();
            if first.is_none() {
                first = Some(last);
                let _ = socket.set_read_timeout(Some(QUIET));
            }
        }
        rate(total, last - first.unwrap_or(last))
    });
    member.sh(&format!(
        "{LIBRARIES}/ld-linux-x86-64.so.2 --library-path {LIBRARIES} {PROGRAM}/netbench {gateway} {port}"
    ));
    reader.join().unwrap_or_else(|_| panic!("the reader panicked"))
}

/// Datagrams nobody listens for, as the pod's kernel counts them.
fn datagrams_to_pod(pod: &Pod<'_>, member: &Member<'_>) -> f64 {
    let arrived = || -> usize {
        let text = member.sh("grep ^Udp: /proc/net/snmp | tail -n 1 | cut -d ' ' -f 3");
        text.trim().parse().unwrap_or(0)
    };
    let before = arrived();
    let started = Instant::now();
    flood((pod.address(), 9), DATAGRAMS).unwrap_or_else(|e| panic!("flood: {e}"));
    let time = started.elapsed();
    rate((arrived() - before) * 1024, time)
}

/// The shim's proportional share of memory, the guest's in it.
fn pss(pod: &Pod<'_>) -> f64 {
    let path = format!("/proc/{}/smaps_rollup", pod.shim());
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    // Seen while it runs: a bench that hangs shows where.
    let _ = writeln!(std::io::stderr(), "{} {:?} KiB", pod.id(), kib);
    kib.unwrap_or_else(|| panic!("{path} has no Pss"))
}
