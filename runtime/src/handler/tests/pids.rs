//! The pids that stand for containers on the host, and the namespaces that a CRI names by them.

use protocols::pid_namespace::path_of;

use super::*;

/// What a member's namespaces came to in the guest: whether it is in the pod's, and the path in its spec.
type Joined = (bool, String);

impl Bench {
    fn joined(&self) -> Joined {
        let created = self.vm.guest.created.lock().unwrap().clone().unwrap();
        let namespaces = created.OCI.Linux.Namespaces.iter();
        let mut of_pids = namespaces.filter(|namespace| namespace.Type == "pid");
        (created.sandbox_pidns, of_pids.next().unwrap().Path.clone())
    }
}

fn pid_path(pid: u32) -> String {
    format!("/proc/{pid}/ns/pid")
}

#[tokio::test]
async fn pid_of_a_container_when_asked_for_is_its_own_everywhere() {
    let mut bench = bench(Boot::Announced);
    let sandbox = bench.member("c1", "").await.unwrap();
    let member = bench.member("c2", "").await.unwrap();
    assert_ne!(sandbox, member);
    assert_eq!(bench.start(init("c2")).await.unwrap(), member);
    let (exec, pid) = bench.exec_to_its_end("c2", 3).await;
    assert_eq!(pid, member);
    assert_eq!(answer(bench.manager.pids("c2")).await.unwrap(), [member]);
    assert_eq!(
        answer(bench.manager.connect_container("c2")).await.unwrap(),
        member
    );
    assert_eq!(
        answer(bench.manager.state_process(&exec)).await.unwrap().pid,
        member
    );
    bench.kill(init("c2"), 9).await.unwrap();
    bench.wait(init("c2")).await;
    let deleted = answer(bench.manager.delete_process(&init("c2"))).await.unwrap();
    assert_eq!((deleted.pid, deleted.exit.status), (member, 137));

    let mut pids = Vec::new();
    while let Ok(event) = bench.events.try_recv() {
        match event {
            Event::TaskCreate {
                container_id, pid, ..
            }
            | Event::TaskStart { container_id, pid } => {
                pids.push((container_id, pid));
            }
            Event::TaskExecStarted { process, pid }
            | Event::TaskExit { process, pid, .. }
            | Event::TaskDelete { process, pid, .. } => pids.push((process.container_id, pid)),
            _ => {}
        }
    }
    assert_eq!(pids.remove(0), ("c1".to_owned(), sandbox));
    assert_eq!(pids, vec![("c2".to_owned(), member); 6]);
    bench.manager.shutdown().await;
}

#[tokio::test]
async fn namespace_when_named_by_a_pid_of_the_pod_is_joined() {
    let bench = bench(Boot::Announced);
    let sandbox = bench.member("c1", "").await.unwrap();
    assert_eq!(bench.joined(), (false, String::new()));
    let target = bench.member("c2", "").await.unwrap();
    assert_eq!(bench.joined(), (false, String::new()));

    bench.member("c3", &pid_path(sandbox)).await.unwrap();
    assert_eq!(bench.joined(), (true, String::new()), "shareProcessNamespace");
    bench.member("c4", &pid_path(target)).await.unwrap();
    let of_target = path_of("c2").display().to_string();
    assert_eq!(bench.joined(), (false, of_target), "kubectl debug --target");
    bench.manager.shutdown().await;
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn namespace_when_it_is_a_strangers_is_refused_by_name() {
    let bench = bench(Boot::Announced);
    bench.member("c1", "").await.unwrap();

    for stranger in [
        pid_path(1),
        "/proc/self/ns/pid".to_owned(),
        "/run/pidns/x".to_owned(),
    ] {
        let error = bench.member("c2", &stranger).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::InvalidArgument);
        assert!(
            error.message.contains(&stranger) && error.message.contains("container c2"),
            "{error}"
        );
    }
    // Nothing of them is left.
    bench.member("c2", "").await.unwrap();
    bench.manager.shutdown().await;
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}
