//! Kills for memory, and only those.

use tests::Case;
use tests::events::{Event, Events, position};

const LIMIT: &str = "33554432";

fn notices(events: &[Event]) -> usize {
    events.iter().filter(|event| event.topic == "/tasks/oom").count()
}

#[test]
fn hog_when_over_its_limit_is_killed_with_one_event_and_its_neighbour_lives() {
    let case = Case::begin("oom");
    let events = Events::subscribe(case.daemon()).unwrap();
    let shared = case.folder("shared");
    let mount = format!("type=bind,src={},dst=/mnt,options=rbind:rw", shared.display());
    let neighbour = case.container();
    neighbour.sleeping();
    let container = case.container();
    let id = container.id();
    let done = container
        .run(&["sh", "-c", "echo before >/mnt/file; exec tail /dev/zero"])
        .option("--memory-limit", LIMIT)
        .option("--mount", &mount)
        .output();

    assert_eq!(done.code, 137, "{}", done.describe());
    let ended = |e: &[Event]| notices(e) > 0 && position(e, "/tasks/exit", id).is_some();
    events.wait(id, "oom and exit", case.limit(), ended).unwrap();
    neighbour.exec(&[], &["true"]).expect_code(0);
    assert_eq!(std::fs::read_to_string(shared.join("file")).unwrap(), "before\n");
    assert_eq!(notices(&events.of(id)), 1, "{:#?}", events.of(id));
    assert_eq!(notices(&events.of(neighbour.id())), 0);
}

#[test]
fn exit_when_nothing_was_killed_for_memory_is_not_called_so() {
    let case = Case::begin("no-oom");
    let events = Events::subscribe(case.daemon()).unwrap();
    for script in [
        "exit 137",
        "head -c 1048576 /dev/zero | tail -c 1 >/dev/null",
        "kill -9 $$; exit 3",
    ] {
        let container = case.container();
        let id = container.id();
        container
            .run(&["sh", "-c", script])
            .option("--memory-limit", LIMIT)
            .flag("--rm")
            .output();
        let seen = events
            .wait(id, "the delete event", case.limit(), |e| {
                position(e, "/tasks/delete", id).is_some()
            })
            .unwrap();
        assert_eq!(notices(&seen), 0, "{script}: {seen:#?}");
    }
}
