//! Commands in a running container: by ExecSync as probes do, and with streams as `kubectl exec` and `kubectl attach` do.

use tests::command::eventually;
use tests::cri::config::Series;
use tests::cri::pods::Pods;
use tests::cri::traffic::{pattern, sha256};
use tests::cri::wire::ContainerState;
use tonic::Code;

#[test]
fn command_when_its_time_is_up_leaves_no_process() {
    for (name, series) in [("timeout17", Series::V1_7), ("timeout21", Series::V2_1)] {
        Pods::like_runc(name, series, |pods| {
            let pod = pods.pod("bridge").run();
            let member = pod.sleeping();
            let late = pods
                .client()
                .exec_sync(member.id(), &["sleep", "4242"], 1)
                .unwrap_err();
            assert_eq!(late.code(), Code::DeadlineExceeded, "{late}");
            let mut processes = String::new();
            let gone = eventually(pods.limit(), || {
                processes = member.sh("ps -o args");
                !processes.contains("sleep 4242")
            });
            assert!(gone, "{processes}");
        });
    }
}

#[test]
fn command_when_it_ends_tells_its_code_and_both_streams() {
    let seen = Pods::like_runc("exec-codes", Series::V2_1, |pods| {
        let pod = pods.pod("bridge").run();
        let member = pod.sleeping();
        let mut seen = [
            "exit 0",
            "exit 1",
            "exit 255",
            "kill -9 $$",
            "kill -15 $$",
            "echo o; echo e >&2; exit 9",
        ]
        .map(|script| member.exec(&["sh", "-c", script]))
        .to_vec();
        let refused = pods
            .client()
            .exec_sync(member.id(), &["/no/such/command"], 0)
            .unwrap_err();
        assert!(refused.message().contains("/no/such/command"), "{refused}");
        // More than a pipe holds.
        let large = member.exec(&["sh", "-c", "head -c 1000000 /dev/zero | tr '\\0' y"]);
        assert_eq!(large.out.len(), 1_000_000);
        assert!(large.out.bytes().all(|byte| byte == b'y'));
        // containerd waits for everyone who holds the streams, so what stays behind must not.
        let script = "sleep 1000 >/dev/null 2>&1 & echo started; exit 2";
        seen.push(member.exec(&["sh", "-c", script]));
        seen
    });
    let codes = seen.iter().map(|done| done.code).collect::<Vec<_>>();
    assert_eq!(codes, [0, 1, 255, 137, 143, 9, 2]);
}

/// How many commands one after another.
fn count() -> usize {
    let asked = std::env::var("STRESS_EXECS").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(60)
}

#[test]
fn stress_commands_when_many_in_sequence_all_end_and_leave_nothing() {
    Pods::like_runc("exec-many", Series::V1_7, |pods| {
        let pod = pods.pod("bridge").run();
        let member = pod.sleeping();
        let before = member.sh("ps -o comm | sort");
        for number in 0..count() {
            let code = i32::try_from(number % 200).unwrap();
            let done = member.exec(&["sh", "-c", &format!("echo {number}; exit {code}")]);
            assert_eq!((done.code, done.out), (code, format!("{number}\n")));
        }
        let mut after = String::new();
        // The last one's processes may still be on their way out.
        eventually(pods.limit(), || {
            after = member.sh("ps -o comm | sort");
            after == before
        });
        assert_eq!(after, before);
    });
}

#[test]
fn command_when_streamed_reads_all_and_tells_its_code() {
    for (name, series) in [("stream17", Series::V1_7), ("stream21", Series::V2_1)] {
        Pods::like_runc(name, series, |pods| {
            let pod = pods.pod("bridge").run();
            let member = pod.sleeping();
            let command = ["sh", "-c", "sha256sum; echo error >&2; exit 6"];
            let mut streams = pods.client().exec(member.id(), &command, false).unwrap();
            let bytes = pattern(1 << 20, 3);
            streams.write("stdin", &bytes).unwrap();
            streams.close("stdin").unwrap();
            let out = streams.finish("stdout", pods.limit()).unwrap();
            assert_eq!(String::from_utf8_lossy(&out), format!("{}  -\n", sha256(&bytes)));
            assert_eq!(streams.finish("stderr", pods.limit()).unwrap(), b"error\n");
            assert_eq!(streams.exit_code(pods.limit()).unwrap(), Ok(6));
        });
    }
}

#[test]
fn terminal_when_resized_tells_the_command() {
    Pods::like_runc("stream-tty", Series::V2_1, |pods| {
        let pod = pods.pod("bridge").run();
        let member = pod.sleeping();
        // The size travels beside the keys: the command asks until it has arrived.
        let script = "until [ \"$(stty size)\" = '37 91' ]; do sleep 0.1; done; stty size; read go; exit 8";
        let mut streams = pods
            .client()
            .exec(member.id(), &["sh", "-c", script], true)
            .unwrap();
        streams.write("resize", br#"{"Width":91,"Height":37}"#).unwrap();
        let limit = pods.limit();
        streams
            .wait("stdout", "the size", limit, |text| text.contains("37 91\r\n"))
            .unwrap();
        streams.write("stdin", b"\n").unwrap();
        assert_eq!(streams.exit_code(limit).unwrap(), Ok(8));
    });
}

#[test]
fn container_when_attached_to_hears_and_answers() {
    // containerd 2.1 ends a second attach at once, under runc, too.
    let cases = [
        ("attach17", Series::V1_7, &["one", "end"][..]),
        ("attach21", Series::V2_1, &["end"]),
    ];
    for (name, series, words) in cases {
        Pods::like_runc(name, series, |pods| {
            let pod = pods.pod("bridge").run();
            let script = "while read -r line; do echo \"heard $line\"; [ \"$line\" != end ] || exit 3; done";
            let member = pod
                .container(&["sh", "-c", script])
                .with(|config| config.stdin = true)
                .start();
            let limit = pods.limit();
            // The first one leaves without an end; the second one finds everything as it was.
            for word in words {
                let mut streams = pods.client().attach(member.id(), false).unwrap();
                streams.write("stdin", format!("{word}\n").as_bytes()).unwrap();
                let heard = format!("heard {word}\n");
                streams
                    .wait("stdout", &heard, limit, |text| text == heard)
                    .unwrap();
            }
            let status = member.wait();
            assert_eq!((status.state(), status.exit_code), (ContainerState::Exited, 3));
            let lines = member.wait_log("a line each", |lines| lines.len() == words.len());
            let lines = lines.iter().map(|line| line.text.clone());
            let heard = words.iter().map(|word| format!("heard {word}"));
            assert_eq!(lines.collect::<Vec<_>>(), heard.collect::<Vec<_>>());
        });
    }
}
