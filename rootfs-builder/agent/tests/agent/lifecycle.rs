use std::time::{Duration, Instant};

use oci_spec::runtime::Mount;
use protocols::agent::{
    CreateContainerRequest, DestroySandboxRequest, GetOOMEventRequest, GuestDetailsRequest,
    PauseContainerRequest, ResumeContainerRequest, SetGuestDateTimeRequest, SetPolicyRequest,
    StatsContainerRequest, Storage,
};
use protocols::health::CheckRequest;
use protocols::health::health_check_response::ServingStatus;
use protocols::oci_convert::spec_to_wire;

use crate::harness::{Agent, Output, PATIENCE, code, context, message, process};

const SIGTERM: u32 = 15;
const SIGKILL: u32 = 9;

#[tokio::test]
async fn program_when_it_exits_reports_its_code_and_output() {
    let agent = Agent::start().await;
    for status in [0, 1, 42, 255] {
        let output = agent
            .run(
                "one",
                &agent.spec(&format!("echo out; echo err >&2; exit {status}")),
            )
            .await;
        assert_eq!(
            output,
            Output {
                status,
                stdout: "out\n".into(),
                stderr: "err\n".into()
            }
        );
    }
}

#[tokio::test]
async fn program_when_killed_by_a_signal_reports_128_plus_it() {
    let agent = Agent::start().await;
    agent.create("two", &agent.spec("sleep 1000")).await.unwrap();
    agent.start_container("two").await.unwrap();
    agent
        .exec("two", "e", &process(&["sh", "-c", "kill -11 $$"]), [0; 3])
        .await
        .unwrap();
    assert_eq!(agent.wait("two", "e").await.unwrap(), 139);
    // The shell is the init of its PID namespace and cannot be killed from inside, its child can.
    let output = agent
        .run("one", &agent.spec("sh -c 'kill -11 $$'; exit $?"))
        .await;
    assert_eq!(output.status, 139);
}

#[tokio::test]
async fn init_when_signalled_dies_and_everyone_who_waits_learns_it() {
    let agent = Agent::start().await;
    agent.create("one", &agent.spec("sleep 1000")).await.unwrap();
    agent.start_container("one").await.unwrap();

    let kill = async { agent.signal("one", "", SIGKILL).await.unwrap() };
    let (first, second, ()) = tokio::join!(agent.wait("one", ""), agent.wait("one", ""), kill);

    assert_eq!((first.unwrap(), second.unwrap()), (137, 137));
    assert_eq!(agent.wait("one", "").await.unwrap(), 137, "after the exit");
    agent.remove("one").await.unwrap();
}

/// As with runc: the kernel drops what the init of a PID namespace does not handle.
#[tokio::test]
async fn init_when_it_has_no_handler_outlives_sigterm_and_otherwise_handles_it() {
    let agent = Agent::start().await;
    let script = "echo ready; exec sleep 1000";
    agent.create("plain", &agent.spec(script)).await.unwrap();
    agent.start_container("plain").await.unwrap();
    agent.read_until("plain", "", "ready").await;
    agent.signal("plain", "", SIGTERM).await.unwrap();
    agent.signal_all("plain", SIGTERM).await.unwrap();
    // Of a signal that kills the exit code is decided as it is sent: it would be 143.
    agent.signal("plain", "", SIGKILL).await.unwrap();
    assert_eq!(agent.wait("plain", "").await.unwrap(), 137);

    let script = "trap 'exit 5' TERM; echo ready; while true; do sleep 0.1; done";
    agent.create("handler", &agent.spec(script)).await.unwrap();
    agent.start_container("handler").await.unwrap();
    let request = protocols::agent::ReadStreamRequest {
        container_id: "handler".into(),
        len: 64,
        ..Default::default()
    };
    let ready = agent.client.read_stdout(context(), &request).await.unwrap();
    assert_eq!(ready.data, b"ready\n");
    agent.signal("handler", "", SIGTERM).await.unwrap();
    assert_eq!(agent.wait("handler", "").await.unwrap(), 5);
}

#[tokio::test]
async fn created_container_when_signalled_dies_of_term_and_kill_only() {
    let agent = Agent::start().await;
    for (signal, status) in [(SIGTERM, 143), (SIGKILL, 137)] {
        agent.create("one", &agent.spec("touch /tmp/ran")).await.unwrap();
        for other in [1, 2, 10, 37] {
            agent.signal("one", "", other).await.unwrap();
            agent.signal_all("one", other).await.unwrap();
        }
        agent.signal("one", "", signal).await.unwrap();
        assert_eq!(agent.wait("one", "").await.unwrap(), status);
        let error = agent.start_container("one").await.unwrap_err();
        assert_eq!(code(&error), ttrpc::Code::FAILED_PRECONDITION, "{error}");
        agent.remove("one").await.unwrap();
    }
    assert!(!agent.rootfs().join("tmp/ran").exists());
    agent.create("one", &agent.spec("exit 3")).await.unwrap();
    agent.signal("one", "", 2).await.unwrap();
    agent.start_container("one").await.unwrap();
    assert_eq!(agent.wait("one", "").await.unwrap(), 3, "SIGINT did not end it");
}

#[tokio::test]
async fn signal_when_real_time_is_delivered_and_reported() {
    let agent = Agent::start().await;
    let script = "trap 'exit 12' 37; echo ready; while true; do sleep 0.1; done";
    agent.create("one", &agent.spec(script)).await.unwrap();
    agent.start_container("one").await.unwrap();
    agent.read_until("one", "", "ready").await;
    agent
        .exec("one", "e", &process(&["sh", "-c", "kill -40 $$"]), [0; 3])
        .await
        .unwrap();
    assert_eq!(agent.wait("one", "e").await.unwrap(), 168);

    agent.signal("one", "", 0).await.unwrap();
    agent.signal("one", "", 37).await.unwrap();
    assert_eq!(agent.wait("one", "").await.unwrap(), 12);
}

/// Traps what it is asked to, and is only ended by that.
const CHILD: &str =
    "sh -c \"trap 'echo child; exit 0' TERM USR1; echo ready; while true; do sleep 0.1; done\"";

#[tokio::test]
async fn signal_when_for_all_reaches_every_process_once() {
    let agent = Agent::start().await;
    let script = format!("trap 'echo init' USR1; {CHILD} & wait $!; wait; exit 4");
    agent.create("one", &agent.spec(&script)).await.unwrap();
    agent.start_container("one").await.unwrap();
    agent.read_until("one", "", "ready").await;

    agent.signal_all("one", 10).await.unwrap();

    let rest = String::from_utf8(agent.read_all("one", "", false).await).unwrap();
    let mut lines: Vec<_> = rest.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["child", "init"]);
    assert_eq!(agent.wait("one", "").await.unwrap(), 4);
}

#[tokio::test]
async fn signal_when_for_all_names_an_exec_spares_the_init() {
    let agent = Agent::start().await;
    agent.create("one", &agent.spec("sleep 1000")).await.unwrap();
    agent.start_container("one").await.unwrap();
    agent
        .exec("one", "e", &process(&["sleep", "1000"]), [0; 3])
        .await
        .unwrap();
    let request = protocols::agent::SignalProcessRequest {
        container_id: "one".into(),
        exec_id: "e".into(),
        signal: SIGKILL,
        all: true,
        ..Default::default()
    };

    agent.client.signal_process(context(), &request).await.unwrap();

    assert_eq!(agent.wait("one", "e").await.unwrap(), 137);
    agent
        .exec("one", "after", &process(&["true"]), [0; 3])
        .await
        .unwrap();
    assert_eq!(agent.wait("one", "after").await.unwrap(), 0);
}

/// The specification of a pod's own container.
fn pause(agent: &Agent) -> oci_spec::runtime::Spec {
    let mut spec = agent.spec("trap 'exit 0' TERM; while true; do sleep 0.1; done");
    let kind = (
        "io.katacontainers.pkg.oci.container_type".to_owned(),
        "pod_sandbox".to_owned(),
    );
    spec.set_annotations(Some([kind].into()));
    spec
}

#[tokio::test]
async fn containers_when_they_share_pids_end_by_themselves() {
    let agent = Agent::start().await;
    agent.create("pause", &pause(&agent)).await.unwrap();
    agent.start_container("pause").await.unwrap();
    let keeper = agent.spec("/bin/sleep 1001 & echo up; wait");
    agent.create_in_pod("keeper", &keeper).await.unwrap();
    agent.read_until("keeper", "", "up").await;
    let seen = async |name: &str| {
        let command = process(&["sh", "-c", "cat /proc/[0-9]*/cmdline"]);
        agent.exec("keeper", name, &command, [0; 3]).await.unwrap();
        String::from_utf8(agent.read_all("keeper", name, false).await)
            .unwrap()
            .replace('\0', " ")
    };

    // Its init ends, its child does not: the child is not the pod's.
    for round in ["first", "again"] {
        let restarted = agent.spec("/bin/sleep 1002 & echo up; exit 5");
        agent.create_in_pod("restarted", &restarted).await.unwrap();
        assert_eq!(agent.wait("restarted", "").await.unwrap(), 5);
        agent.read_all("restarted", "", false).await;
        let processes = seen(round).await;
        assert!(!processes.contains("/bin/sleep 1002"), "{processes}");
        agent.remove("restarted").await.unwrap();
    }

    // The neighbour's child lives, and the pod's own container is seen.
    let processes = seen("all").await;
    assert!(processes.contains("/bin/sleep 1001"), "{processes}");
    assert!(processes.starts_with("sh -c trap 'exit 0' TERM"), "{processes}");
    agent.signal("keeper", "", SIGKILL).await.unwrap();
    assert_eq!(agent.wait("keeper", "").await.unwrap(), 137);
    agent
        .exec("pause", "alive", &process(&["true"]), [0; 3])
        .await
        .unwrap();
    assert_eq!(agent.wait("pause", "alive").await.unwrap(), 0);
}

#[tokio::test]
async fn children_when_there_is_no_pid_namespace_end_with_the_init() {
    let agent = Agent::start().await;
    let mut spec = agent.spec("sleep 1000 & exit 6");
    let linux = spec.linux_mut().as_mut().unwrap();
    linux
        .namespaces_mut()
        .as_mut()
        .unwrap()
        .retain(|namespace| namespace.typ() != oci_spec::runtime::LinuxNamespaceType::Pid);
    agent.create("one", &spec).await.unwrap();
    agent.start_container("one").await.unwrap();

    assert_eq!(agent.wait("one", "").await.unwrap(), 6);
    // The child holds the output open for as long as it lives.
    agent.read_all("one", "", false).await;
    agent.remove("one").await.unwrap();
}

#[tokio::test]
async fn running_container_when_removed_is_killed_and_leaves_nothing() {
    let agent = Agent::start().await;
    agent
        .create("one", &agent.spec("sleep 1000 & sleep 1000"))
        .await
        .unwrap();
    agent.start_container("one").await.unwrap();

    agent.remove("one").await.unwrap();

    assert_eq!(
        code(&agent.wait("one", "").await.unwrap_err()),
        ttrpc::Code::NOT_FOUND
    );
    let output = agent.run("one", &agent.spec("echo again")).await;
    assert_eq!(output.stdout, "again\n");
}

#[tokio::test]
async fn container_when_run_has_its_own_world() {
    let agent = Agent::start().await;
    let mut spec = agent
        .spec("hostname; echo $$; id -u; echo $COLOUR; readlink /proc/self/cwd; ls /proc/self/oom_score_adj");
    let process = spec.process_mut().as_mut().unwrap();
    process
        .set_env(Some(vec!["PATH=/bin".into(), "COLOUR=blue".into()]))
        .set_cwd("/tmp".into());
    process.user_mut().set_uid(1234);

    let output = agent.run("one", &spec).await;

    assert_eq!(
        output.stdout, "pod-name\n1\n1234\nblue\n/tmp\n/proc/self/oom_score_adj\n",
        "{}",
        output.stderr
    );
}

#[tokio::test]
async fn root_when_read_only_refuses_writes() {
    let agent = Agent::start().await;
    let mut spec = agent.spec("touch /file 2>/dev/null || echo refused; touch /dev/shm/file && echo shm");
    spec.root_mut().as_mut().unwrap().set_readonly(Some(true));

    let output = agent.run("one", &spec).await;

    assert_eq!(output.stdout, "refused\nshm\n", "{}", output.stderr);
}

#[tokio::test]
async fn containers_when_in_one_pod_share_ipc_and_uts_only() {
    let agent = Agent::start().await;
    let script = "for ns in ipc uts pid mnt; do readlink /proc/self/ns/$ns; done";
    let one = agent.run("one", &agent.spec(script)).await;
    let keeper = agent.spec("sleep 1000");
    agent.create("keeper", &keeper).await.unwrap();
    agent.start_container("keeper").await.unwrap();
    let two = agent.run("two", &agent.spec(script)).await;
    agent
        .exec("keeper", "look", &process(&["sh", "-c", script]), [0; 3])
        .await
        .unwrap();
    let inside = String::from_utf8(agent.read_all("keeper", "look", false).await).unwrap();

    let [one, two, keeper]: [Vec<&str>; 3] =
        [&one.stdout, &two.stdout, &inside].map(|text| text.lines().collect());
    assert_eq!(one[..2], two[..2]);
    assert_eq!(one[..2], keeper[..2]);
    assert_ne!(two[2..], keeper[2..]);
}

#[tokio::test]
async fn containers_when_made_at_once_do_not_mix() {
    let agent = Agent::start().await;
    let runs = (0..8).map(|number| {
        let agent = &agent;
        async move {
            agent
                .run(
                    &format!("c{number}"),
                    &agent.spec(&format!("echo {number}; exit {number}")),
                )
                .await
        }
    });

    let outputs = futures::future::join_all(runs).await;

    for (number, output) in outputs.into_iter().enumerate() {
        assert_eq!(
            (output.status, output.stdout),
            (number as i32, format!("{number}\n"))
        );
    }
}

/// A volume can only be removed once it is unmounted, which is when what was written to it has reached its place.
#[tokio::test]
async fn sandbox_when_destroyed_has_given_back_its_volumes_before_it_answers() {
    let agent = Agent::start().await;
    let volume = agent.rootfs().with_file_name("volume");
    let path = volume.to_str().unwrap();
    let mut spec = agent.spec("echo ready; while :; do sleep 100; done");
    let mut mount = Mount::default();
    mount
        .set_typ(Some("bind".into()))
        .set_source(Some(volume.clone()))
        .set_destination("/volume".into())
        .set_options(Some(vec!["rbind".into()]));
    spec.mounts_mut().get_or_insert_default().push(mount);
    let request = CreateContainerRequest {
        container_id: "one".into(),
        OCI: Some(spec_to_wire(&spec)).into(),
        storages: vec![Storage {
            driver: "ephemeral".into(),
            source: "tmpfs".into(),
            mount_point: path.into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    agent.client.create_container(context(), &request).await.unwrap();
    agent.start_container("one").await.unwrap();
    agent.read_until("one", "", "ready").await;
    assert!(volume.exists());

    agent
        .client
        .destroy_sandbox(context(), &DestroySandboxRequest::new())
        .await
        .unwrap();

    assert!(!volume.exists());
}

#[tokio::test]
async fn sandbox_when_destroyed_ends_its_containers_and_the_agent() {
    let mut agent = Agent::start().await;
    agent.create("one", &agent.spec("sleep 1000")).await.unwrap();
    agent.start_container("one").await.unwrap();

    let oom_watcher = tokio::spawn({
        let client = agent.client.clone();
        async move { client.get_oom_event(context(), &GetOOMEventRequest::new()).await }
    });

    agent
        .client
        .destroy_sandbox(context(), &DestroySandboxRequest::new())
        .await
        .unwrap();

    assert!(oom_watcher.await.unwrap().is_err());
    assert!(agent.ends().await);
}

#[tokio::test]
async fn agent_when_asked_describes_itself() {
    let agent = Agent::start().await;

    let health = agent.health.check(context(), &CheckRequest::new()).await.unwrap();
    let version = agent
        .health
        .version(context(), &CheckRequest::new())
        .await
        .unwrap();
    let details = agent
        .client
        .get_guest_details(context(), &GuestDetailsRequest::new())
        .await
        .unwrap();

    assert_eq!(health.status, ServingStatus::SERVING.into());
    assert_eq!(version.agent_version, env!("CARGO_PKG_VERSION"));
    assert!(
        details
            .agent_details
            .storage_handlers
            .contains(&"virtio-fs".to_owned())
    );
    assert!(!details.agent_details.init_daemon);
}

#[tokio::test]
async fn calls_when_not_implemented_or_senseless_say_so() {
    let agent = Agent::start().await;

    let error = agent
        .client
        .set_policy(context(), &SetPolicyRequest::new())
        .await
        .unwrap_err();
    assert_eq!(code(&error), ttrpc::Code::UNIMPLEMENTED);
    assert_eq!(message(&error), "SetPolicy is not implemented by this agent");
    let time = SetGuestDateTimeRequest {
        Sec: -1,
        ..Default::default()
    };
    let error = agent
        .client
        .set_guest_date_time(context(), &time)
        .await
        .unwrap_err();
    assert_eq!(code(&error), ttrpc::Code::INVALID_ARGUMENT, "{error}");
}

#[tokio::test]
async fn container_when_paused_stands_still_and_goes_on_when_resumed() {
    let agent = Agent::start().await;
    agent
        .create("one", &agent.spec("while true; do echo tick; sleep 0.01; done"))
        .await
        .unwrap();
    agent.start_container("one").await.unwrap();
    let pause = PauseContainerRequest {
        container_id: "one".into(),
        ..Default::default()
    };
    agent.client.pause_container(context(), &pause).await.unwrap();
    let stats = StatsContainerRequest {
        container_id: "one".into(),
        ..Default::default()
    };
    let used = async || {
        let stats = agent.client.stats_container(context(), &stats).await.unwrap();
        stats.cgroup_stats.cpu_stats.cpu_usage.total_usage
    };

    // On a busy machine what it used until it stood still is still being counted.
    let deadline = Instant::now() + PATIENCE;
    let mut before = used().await;
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = used().await;
        if now == std::mem::replace(&mut before, now) {
            break;
        }
        assert!(Instant::now() < deadline, "it goes on");
    }
    assert!(before > 0);
    let resume = ResumeContainerRequest {
        container_id: "one".into(),
        ..Default::default()
    };
    agent.client.resume_container(context(), &resume).await.unwrap();
    while used().await == before {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    agent.signal("one", "", SIGKILL).await.unwrap();
    assert_eq!(agent.wait("one", "").await.unwrap(), 137);
}
