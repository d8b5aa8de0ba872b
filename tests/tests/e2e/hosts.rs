//! What the guest sees of its machine.

use tests::Case;
use tests::case::skipped_under_runc;

#[test]
fn proc_and_sys_when_listed_look_like_a_container() {
    let case = Case::begin("mounts");
    let script = "grep -c . /proc/self/mountinfo; cat /proc/1/comm; ls /dev/null /dev/zero /dev/urandom /dev/pts /dev/shm";
    let out = case
        .container()
        .run(&["sh", "-c", script])
        .flag("--rm")
        .output()
        .expect_code(0)
        .out();
    let mut lines = out.lines();
    assert!(
        lines
            .next()
            .and_then(|n| n.parse::<u32>().ok())
            .is_some_and(|n| n > 3),
        "{out}"
    );
    assert_eq!(lines.next(), Some("sh"), "{out}");
    assert!(out.contains("/dev/urandom"), "{out}");
}

#[test]
fn random_numbers_when_two_containers_start_differ() {
    let case = Case::begin("random");
    let read = || {
        let container = case.container();
        let run = container
            .run(&["sh", "-c", "head -c 16 /dev/urandom | od -An -tx1"])
            .flag("--rm");
        run.output().expect_code(0).out()
    };
    assert_ne!(read(), read());
}

#[test]
fn clock_when_guest_boots_is_the_hosts() {
    let case = Case::begin("clock");
    let seconds = || {
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs()
    };
    let before = seconds();
    let out = case
        .container()
        .run(&["date", "+%s"])
        .flag("--rm")
        .output()
        .expect_code(0)
        .out();
    let guest = out.trim().parse::<u64>().unwrap();
    // Two seconds either way for rounding.
    assert!(
        guest + 2 >= before && guest <= seconds() + 2,
        "guest {guest}, host {before}..{}",
        seconds()
    );
}

#[test]
fn processors_when_annotated_are_all_online() {
    if skipped_under_runc("the machine's size is the host's") {
        return;
    }
    let case = Case::begin("vcpus");
    let container = case.container();
    let annotation = "io.katacontainers.config.hypervisor.default_vcpus=3";
    let run = container
        .run(&["nproc"])
        .flag("--rm")
        .option("--annotation", annotation);
    assert_eq!(run.output().expect_code(0).out(), "3\n");
}

#[test]
fn memory_when_annotated_is_the_machines() {
    if skipped_under_runc("the machine's size is the host's") {
        return;
    }
    let case = Case::begin("memory");
    // 5 GiB reach beyond the hole below 4 GiB.
    for mib in [128, 5120] {
        let container = case.container();
        let annotation = format!("io.katacontainers.config.hypervisor.default_memory={mib}");
        let script = "awk '/MemTotal/ {print $2}' /proc/meminfo";
        let run = container
            .run(&["sh", "-c", script])
            .flag("--rm")
            .option("--annotation", &annotation);
        let kib = run.output().expect_code(0).out().trim().parse::<u64>().unwrap();
        // The kernel keeps some of it for itself.
        assert!(
            (mib * 1024 * 3 / 4..=mib * 1024).contains(&kib),
            "{mib} MiB: the guest sees {kib} KiB"
        );
    }
}
