//! The containers of a pod, one after another and beside each other; their logs.

use tests::cri::config::Series;
use tests::cri::pods::{LogLine, Pods};
use tests::cri::wire::{ContainerState, NamespaceMode};

#[test]
fn containers_when_started_one_after_another_share_what_a_pod_shares() {
    let seen = Pods::like_runc("lifecycle", Series::V2_1, |pods| {
        let pod = pods.pod("bridge").run();
        let folder = pods.case().folder(&format!("volume{}", pods.vm()));
        let volume = folder.to_str().unwrap();
        let mut seen = Vec::new();
        // Init containers: each must end before the next one starts.
        for number in [1, 2] {
            let script = format!("echo init {number} >>/volume/steps; exit {}", number - 1);
            let init = pod
                .container(&["sh", "-c", &script])
                .mount(volume, "/volume")
                .start();
            let status = init.wait();
            seen.push((status.exit_code, status.reason));
            init.remove();
        }
        let workload = pod
            .container(&[
                "sh",
                "-c",
                "echo workload >>/volume/steps; trap 'exit 4' TERM; while :; do sleep 1000 & wait $!; done",
            ])
            .mount(volume, "/volume")
            .start();
        workload.sh("true");
        workload.stop();
        let status = workload.status();
        seen.push((status.exit_code, status.reason.clone()));
        assert!(
            status.finished_at >= status.started_at && status.started_at > 0,
            "{status:?}"
        );
        // Nothing runs now, and the pod stays.
        assert!(pod.ready());
        let again = pod
            .container(&["sh", "-c", "echo again >>/volume/steps"])
            .with(|config| config.metadata.get_or_insert_default().attempt = 1)
            .mount(volume, "/volume")
            .start();
        seen.push((again.wait().exit_code, again.status().reason));
        let steps = std::fs::read_to_string(folder.join("steps")).unwrap();
        assert_eq!(steps, "init 1\ninit 2\nworkload\nagain\n");
        seen
    });
    let completed = |code, reason: &str| (code, reason.to_owned());
    let expected = [
        completed(0, "Completed"),
        completed(1, "Error"),
        completed(4, "Error"),
        completed(0, "Completed"),
    ];
    assert_eq!(seen, expected);
}

#[test]
fn pod_when_its_only_container_was_restarted_is_the_same_machine() {
    Pods::like_runc("restart", Series::V1_7, |pods| {
        let pod = pods.pod("bridge").run();
        let shim = pod.shim();
        let addresses = pod.addresses();
        for attempt in 0..3 {
            let member = pod
                .container(&["sh", "-c", "exit 7"])
                .with(|config| config.metadata.get_or_insert_default().attempt = attempt)
                .start();
            assert_eq!(member.wait().exit_code, 7);
            member.remove();
            assert_eq!(pod.shim(), shim);
        }
        assert_eq!(pod.addresses(), addresses);
    });
}

#[test]
fn container_when_ephemeral_looks_into_its_target() {
    Pods::like_runc("ephemeral", Series::V2_1, |pods| {
        let pod = pods.pod("bridge").run();
        let target = pod.container(&["sleep", "4242"]).start();
        let debugger = pod
            .container(&["sleep", "1717"])
            .namespaces(|options| {
                options.pid = NamespaceMode::Target.into();
                options.target_id = target.id().to_owned();
            })
            .start();
        let processes = debugger.sh("ps -o args");
        for command in ["sleep 4242", "sleep 1717"] {
            assert!(processes.lines().any(|line| line == command), "{processes}");
        }
        let own = debugger.sh("readlink /proc/self/ns/pid; readlink /proc/1/ns/pid");
        let (own, first) = own.split_once('\n').unwrap();
        assert_eq!(own, first.trim_end());
        // It ends by itself, and its target goes on.
        debugger.stop();
        assert_eq!(target.status().state(), ContainerState::Running);
        target.sh("true");
    });
}

#[test]
fn container_when_its_command_is_missing_says_so_and_leaves_the_pod_alone() {
    Pods::like_runc("no-command", Series::V2_1, |pods| {
        let pod = pods.pod("bridge").run();
        let member = pod.container(&["/no/such/command"]).create();
        let refused = pods.client().start(member.id()).unwrap_err();
        assert!(refused.message().contains("/no/such/command"), "{refused}");
        let status = member.status();
        assert_eq!(status.state(), ContainerState::Exited, "{status:?}");
        // Created: 128, as with runc.
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (128, "StartError"),
            "{status:?}"
        );
        pod.sleeping().sh("true");
    });
}

fn of_stream(lines: &[LogLine], stream: &str) -> Vec<(String, String)> {
    let lines = lines.iter().filter(|line| line.stream == stream);
    lines.map(|line| (line.tag.clone(), line.text.clone())).collect()
}

#[test]
fn log_when_lines_are_of_every_kind_keeps_them() {
    Pods::like_runc("log", Series::V2_1, |pods| {
        let pod = pods.pod("bridge").run();
        // An empty line, one with spaces, one longer than the 16 KiB of a log line, and one that does not end.
        let script = "echo; echo '  a  b '; head -c 20000 /dev/zero | tr '\\0' x; echo; echo error >&2; printf unfinished";
        let member = pod.container(&["sh", "-c", script]).start();
        assert_eq!(member.wait().exit_code, 0);
        let lines = member.wait_log("unfinished line", |lines| {
            lines.iter().any(|line| line.text == "unfinished")
                && lines.iter().any(|line| line.text == "error")
        });
        let line = |tag: &str, text: &str| (tag.to_owned(), text.to_owned());
        assert_eq!(of_stream(&lines, "stderr"), [line("F", "error")]);
        let out = of_stream(&lines, "stdout");
        let (long, rest): (Vec<_>, Vec<_>) = out.into_iter().partition(|(_, text)| text.starts_with('x'));
        let expected = [line("F", ""), line("F", "  a  b "), line("P", "unfinished")];
        assert_eq!(rest, expected);
        let whole = long.iter().map(|(_, text)| text.as_str()).collect::<String>();
        assert_eq!(whole.len(), 20000);
        assert!(long.len() > 1 && long.iter().rev().skip(1).all(|(tag, _)| tag == "P"));
    });
}

#[test]
fn log_when_reopened_goes_on_in_a_new_file() {
    Pods::like_runc("log-reopen", Series::V1_7, |pods| {
        let pod = pods.pod("bridge").run();
        let script = "echo before; while [ ! -e /tmp/go ]; do sleep 1; done; echo after";
        let member = pod.container(&["sh", "-c", script]).start();
        member.wait_log("first line", |lines| {
            lines.iter().any(|line| line.text == "before")
        });
        let moved = member.log_path().with_extension("old");
        std::fs::rename(member.log_path(), &moved).unwrap();
        pods.client().reopen_log(member.id()).unwrap();
        member.sh("touch /tmp/go");
        let lines = member.wait_log("last line", |lines| lines.iter().any(|line| line.text == "after"));
        assert_eq!(lines.len(), 1, "{lines:?}");
        let old = std::fs::read_to_string(&moved).unwrap();
        assert!(
            old.ends_with("stdout F before\n") && old.lines().count() == 1,
            "{old}"
        );
    });
}
