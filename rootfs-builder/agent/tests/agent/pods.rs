//! Namespaces of PIDs between the containers of a pod.

use protocols::pid_namespace::path_of;

use crate::harness::{Agent, code, process};

const SIGKILL: u32 = 9;
const SIGTERM: u32 = 15;

const NAMESPACE: &str = "readlink /proc/self/ns/pid";

async fn shown(agent: &Agent, id: &str, exec: &str, script: &str) -> String {
    agent
        .exec(id, exec, &process(&["sh", "-c", script]), [0; 3])
        .await
        .unwrap();
    String::from_utf8(agent.read_all(id, exec, false).await).unwrap()
}

/// A spec that joins the PID namespace of `target`.
fn joining(agent: &Agent, script: &str, target: &str) -> oci_spec::runtime::Spec {
    let mut spec = agent.spec(script);
    let namespaces = spec
        .linux_mut()
        .as_mut()
        .unwrap()
        .namespaces_mut()
        .as_mut()
        .unwrap();
    for namespace in namespaces {
        if namespace.typ() == oci_spec::runtime::LinuxNamespaceType::Pid {
            namespace.set_path(Some(path_of(target)));
        }
    }
    spec
}

/// A container whose program says "up" once it runs.
async fn run_up(agent: &Agent, id: &str, spec: &oci_spec::runtime::Spec) {
    agent.create(id, spec).await.unwrap();
    agent.start_container(id).await.unwrap();
    agent.read_until(id, "", "up").await;
}

/// The command lines of the processes that container `id` sees, with spaces between their words.
async fn commands_seen_by(agent: &Agent, id: &str) -> String {
    let seen = shown(agent, id, "look", "cat /proc/[0-9]*/cmdline").await;
    seen.replace('\0', " ")
}

/// The Sandbox API has no pause container: the first container may end, the namespace must not.
#[tokio::test]
async fn pids_when_the_pod_has_no_container_of_its_own_outlive_the_first() {
    let agent = Agent::start().await;
    agent
        .create_in_pod("first", &agent.spec(NAMESPACE))
        .await
        .unwrap();
    let first = agent.read_all("first", "", false).await;
    assert_eq!(agent.wait("first", "").await.unwrap(), 0);
    let keeper = agent.spec("/bin/sleep 1001 & echo up; wait");
    agent.create_in_pod("keeper", &keeper).await.unwrap();
    agent.read_until("keeper", "", "up").await;
    agent.remove("first").await.unwrap();

    agent
        .create_in_pod("again", &agent.spec(NAMESPACE))
        .await
        .unwrap();

    assert_eq!(agent.read_all("again", "", false).await, first);
    let seen = commands_seen_by(&agent, "keeper").await;
    assert!(seen.starts_with("pause "), "PID 1 of the pod: {seen}");
    assert!(seen.contains("/bin/sleep 1001"), "{seen}");
    // It is nobody's, and what it sees is nothing.
    let owner = shown(
        &agent,
        "keeper",
        "owner",
        "grep -E '^(Uid|CapEff)' /proc/1/status",
    )
    .await;
    assert!(
        owner.contains("65534") && owner.contains("0000000000000000"),
        "{owner}"
    );
    let root = shown(&agent, "keeper", "root", "ls /proc/1/root/ 2>/dev/null | wc -l").await;
    assert_eq!(root.trim(), "0");
}

#[tokio::test]
async fn container_when_it_targets_another_shares_its_processes_and_its_end() {
    let agent = Agent::start().await;
    run_up(&agent, "target", &agent.spec("/bin/sleep 1003 & echo up; wait")).await;

    let debugger = joining(&agent, "echo up; /bin/sleep 1004 & wait", "target");
    run_up(&agent, "debugger", &debugger).await;

    let seen = commands_seen_by(&agent, "debugger").await;
    assert!(seen.contains("/bin/sleep 1003"), "{seen}");
    let target = shown(&agent, "target", "ns", NAMESPACE).await;
    assert_eq!(shown(&agent, "debugger", "ns", NAMESPACE).await, target);
    // A neighbour sees neither.
    agent.create("other", &agent.spec(NAMESPACE)).await.unwrap();
    agent.start_container("other").await.unwrap();
    assert_ne!(
        String::from_utf8(agent.read_all("other", "", false).await).unwrap(),
        target
    );

    agent.signal("target", "", SIGKILL).await.unwrap();

    assert_eq!(agent.wait("target", "").await.unwrap(), 137);
    assert_eq!(
        agent.wait("debugger", "").await.unwrap(),
        137,
        "with the namespace"
    );
}

/// PID 1 alone is shielded by the kernel from signals that it does not handle.
#[tokio::test]
async fn init_when_it_is_not_the_first_process_of_its_namespace_obeys_sigterm() {
    let agent = Agent::start().await;
    run_up(&agent, "target", &agent.spec("echo up; sleep 1007")).await;
    let debugger = joining(&agent, "echo up; exec sleep 1008", "target");
    run_up(&agent, "debugger", &debugger).await;

    agent.signal("debugger", "", SIGTERM).await.unwrap();

    assert_eq!(agent.wait("debugger", "").await.unwrap(), 143);
}

#[tokio::test]
async fn debugger_when_it_ends_leaves_its_target_alone() {
    let agent = Agent::start().await;
    run_up(&agent, "target", &agent.spec("echo up; sleep 1005")).await;
    agent
        .create("debugger", &joining(&agent, "/bin/sleep 1006 & exit 3", "target"))
        .await
        .unwrap();
    agent.start_container("debugger").await.unwrap();

    assert_eq!(agent.wait("debugger", "").await.unwrap(), 3);
    agent.read_all("debugger", "", false).await;
    agent.remove("debugger").await.unwrap();

    let seen = commands_seen_by(&agent, "target").await;
    assert!(!seen.contains("/bin/sleep 1006"), "{seen}");
}

#[tokio::test]
async fn target_when_it_is_none_is_named() {
    let agent = Agent::start().await;
    let error = agent
        .create("debugger", &joining(&agent, "true", "nobody"))
        .await
        .unwrap_err();
    assert_eq!(code(&error), ttrpc::Code::NOT_FOUND);

    agent.create("target", &agent.spec("exit 0")).await.unwrap();
    agent.start_container("target").await.unwrap();
    assert_eq!(agent.wait("target", "").await.unwrap(), 0);
    let error = agent
        .create("debugger", &joining(&agent, "true", "target"))
        .await
        .unwrap_err();
    assert_eq!(code(&error), ttrpc::Code::FAILED_PRECONDITION);
    assert!(
        format!("{error:?}").contains("PID namespace of container target"),
        "{error:?}"
    );
    assert_eq!(
        agent.run("debugger", &agent.spec("echo free")).await.stdout,
        "free\n"
    );
}
