//! The event stream: order, and one exit per process.

use tests::Case;
use tests::events::{Event, Events, position};

/// Asserts that the topics of this process appear once each and in this order.
#[track_caller]
fn assert_order(events: &[Event], process: &str, topics: &[&str]) {
    let of = |e: &&Event| e.process() == process && topics.contains(&e.topic.as_str());
    let seen = events
        .iter()
        .filter(of)
        .map(|e| e.topic.as_str())
        .collect::<Vec<_>>();
    assert_eq!(seen, topics, "events of {process}: {events:#?}");
}

fn ended(events: &[Event], container: &str) -> bool {
    position(events, "/tasks/delete", container).is_some()
}

#[test]
fn events_when_container_runs_come_in_order_with_one_exit() {
    let case = Case::begin("events");
    let events = Events::subscribe(case.daemon()).unwrap();
    let container = case.container();
    let id = container.id();
    container
        .run(&["sh", "-c", "exit 3"])
        .flag("--rm")
        .output()
        .expect_code(3);
    let seen = events
        .wait(id, "the delete event", case.limit(), |e| ended(e, id))
        .unwrap();
    assert_order(
        &seen,
        id,
        &["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"],
    );
    let exit = seen.iter().find(|e| e.topic == "/tasks/exit").unwrap();
    assert_eq!(
        (exit.exit_status(), exit.body.get("id").and_then(|id| id.as_str())),
        (3, Some(id))
    );
    assert!(exit.body.get("exited_at").is_some(), "{exit:?}");
}

#[test]
fn events_when_process_exits_at_once_still_start_before_exit() {
    let case = Case::begin("events-fast");
    let events = Events::subscribe(case.daemon()).unwrap();
    let containers = (0..3).map(|_| case.container()).collect::<Vec<_>>();
    for container in &containers {
        container.run(&["true"]).flag("--rm").output().expect_code(0);
    }
    for container in &containers {
        let id = container.id();
        let seen = events
            .wait(id, "the delete event", case.limit(), |e| ended(e, id))
            .unwrap();
        assert_order(
            &seen,
            id,
            &["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"],
        );
    }
}

#[test]
fn events_when_execs_run_precede_the_exit_of_the_container() {
    let case = Case::begin("events-exec");
    let events = Events::subscribe(case.daemon()).unwrap();
    let container = case.container();
    let id = container.id();
    container.sleeping();
    container
        .exec(&["--exec-id", "first"], &["sh", "-c", "exit 5"])
        .expect_code(5);
    container
        .exec(&["-d", "--exec-id", "second"], &["sleep", "10000"])
        .expect_code(0);
    container.kill("KILL").expect_code(0);
    let both = |e: &[Event]| {
        position(e, "/tasks/exit", id).is_some() && position(e, "/tasks/exit", "second").is_some()
    };
    events.wait(id, "the exits", case.limit(), both).unwrap();
    case.ctr(["tasks", "rm", "-f", id]);
    let seen = events
        .wait(id, "the delete event", case.limit(), |e| ended(e, id))
        .unwrap();
    assert_order(
        &seen,
        id,
        &["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"],
    );
    for (exec, status) in [("first", 5), ("second", 137)] {
        assert_order(
            &seen,
            exec,
            &["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"],
        );
        let exit = position(&seen, "/tasks/exit", exec).unwrap();
        assert_eq!(seen.get(exit).unwrap().exit_status(), status, "{exec}");
        let last = position(&seen, "/tasks/exit", id).unwrap();
        assert!(
            exit < last,
            "the exit of {exec} comes after the container's: {seen:#?}"
        );
    }
}
