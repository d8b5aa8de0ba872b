//! Standard input, output and error.

use sha2::{Digest, Sha256};
use tests::Case;
use tests::command::{Input, tail};
use tests::task_api::TaskApi;

const MIB: usize = 1 << 20;

/// Bytes that repeat only after a long time, so that loss and reordering change the sum.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn sum(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[test]
fn streams_when_both_are_written_stay_apart() {
    let case = Case::begin("streams");
    let script = "echo out1; echo err1 >&2; echo out2; echo err2 >&2";
    let done = case
        .container()
        .run(&["sh", "-c", script])
        .flag("--rm")
        .output()
        .expect_code(0);
    assert_eq!(
        (done.out().as_str(), done.err().as_str()),
        ("out1\nout2\n", "err1\nerr2\n")
    );
}

#[test]
fn stdin_when_20_mib_pass_through_cat_arrives_unchanged() {
    let case = Case::begin("cat-20m");
    let sent = noise(20 * MIB);
    let container = case.container();
    let done = container
        .run(&["cat"])
        .flag("--rm")
        .output_with(Input::Bytes(sent.clone()))
        .expect_code(0);
    assert_eq!(
        (done.stdout.len(), sum(&done.stdout)),
        (sent.len(), sum(&sent)),
        "{}",
        done.err()
    );
}

#[test]
fn output_when_process_exits_right_after_8_mib_is_complete() {
    let case = Case::begin("burst-8m");
    let line = "0123456789abcde\n";
    let script = format!("yes 0123456789abcde | head -c {}", 8 * MIB);
    for round in 0..2 {
        let done = case
            .container()
            .run(&["sh", "-c", &script])
            .flag("--rm")
            .output()
            .expect_code(0);
        assert_eq!(
            done.stdout.len(),
            8 * MIB,
            "round {round}: ...{}",
            tail(&done.stdout)
        );
        assert!(
            done.stdout
                .chunks(line.len())
                .all(|chunk| chunk == line.as_bytes()),
            "round {round}: content"
        );
    }
}

#[test]
fn output_when_both_streams_are_large_is_complete() {
    let case = Case::begin("burst-both");
    let size = 2 * MIB;
    let script = format!("yes out | head -c {size} & yes err | head -c {size} >&2; wait");
    let done = case
        .container()
        .run(&["sh", "-c", &script])
        .flag("--rm")
        .output()
        .expect_code(0);
    assert_eq!((done.stdout.len(), done.stderr.len()), (size, size));
    assert!(done.stdout.chunks(4).all(|chunk| chunk == b"out\n"));
    assert!(done.stderr.chunks(4).all(|chunk| chunk == b"err\n"));
}

#[test]
fn stdin_when_closed_is_seen_as_end_of_file() {
    let case = Case::begin("stdin-close");
    let container = case.container();
    let script = "while read -r line; do echo got $line; done; echo end of file";
    let mut running = container.run(&["sh", "-c", script]).start(Input::Open);
    running.write(b"one\n").unwrap();
    running
        .wait_out("the answer to the first line", case.limit(), |out| {
            out == "got one\n"
        })
        .unwrap();
    running.write(b"two\n").unwrap();
    running
        .wait_out("the answer to the second line", case.limit(), |out| {
            out.ends_with("got two\n")
        })
        .unwrap();
    running.close_stdin();
    let done = running.finish(case.limit()).unwrap().expect_code(0);
    assert_eq!(done.out(), "got one\ngot two\nend of file\n");
}

#[test]
fn stdin_when_reader_exits_early_does_not_block() {
    let case = Case::begin("stdin-early");
    let container = case.container();
    let done = container
        .run(&["head", "-c", "5"])
        .flag("--rm")
        .output_with(Input::Bytes(noise(4 * MIB)));
    assert_eq!(done.expect_code(0).stdout, noise(4 * MIB).get(..5).unwrap());
}

#[test]
fn output_when_a_background_child_outlives_the_shell_ends_with_the_container() {
    let case = Case::begin("background-child");
    let container = case.container();
    // The container's first process takes its PID namespace with it.
    let done = container
        .run(&["sh", "-c", "sleep 10000 & echo started; exit 5"])
        .flag("--rm")
        .output();
    assert_eq!(done.expect_code(5).out(), "started\n");
}

#[test]
fn output_when_the_client_does_not_read_does_not_hold_the_exit() {
    let case = Case::begin("backed-up");
    let container = case.container();
    let client = container
        .run(&["sh", "-c", "echo up; exec yes"])
        .start(Input::Null);
    client
        .wait_out("the first line", case.limit(), |out| out.starts_with("up\n"))
        .unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(client.pid()).unwrap()).unwrap();
    let send = |signal| rustix::process::kill_process(pid, signal).unwrap();
    send(rustix::process::Signal::STOP);
    let api = TaskApi::connect(case.daemon()).unwrap();
    let waiter = api.start_wait(container.id());

    container.kill("KILL").expect_code(0);

    assert_eq!(api.join(waiter).unwrap(), 137, "while nobody reads");
    send(rustix::process::Signal::CONT);
    client.finish(case.limit()).unwrap().expect_code(137);
}
