//! Hooks that run in the guest: a container's own two, and those of the image.

use oci_spec::runtime::{Hook, HookBuilder, Hooks};
use protocols::agent::RemoveContainerRequest;

use crate::harness::{Agent, context, message};

/// A hook that runs `script` with a shell, which guest and container have at the same place.
fn shell(script: &str) -> Hook {
    let args = ["sh", "-c", script].map(str::to_owned);
    let env = vec!["PATH=/usr/bin:/bin".to_owned()];
    HookBuilder::default()
        .path("/bin/sh")
        .args(args)
        .env(env)
        .build()
        .unwrap()
}

#[tokio::test]
async fn hooks_of_a_container_when_it_starts_run_in_its_namespaces() {
    let agent = Agent::start().await;
    let mut spec = agent.spec("cat /state /start; exit 0");
    let mut hooks = Hooks::default();
    // Before pivot_root: the container's root is a folder yet.
    let rootfs = agent.rootfs();
    let create = format!("cat > {}/state", rootfs.display());
    hooks.set_create_container(Some(vec![shell(&create)]));
    hooks.set_start_container(Some(vec![shell("echo started in $(hostname) > /start")]));
    spec.set_hooks(Some(hooks));

    agent.create("c", &spec).await.unwrap();
    assert!(!rootfs.join("start").exists(), "not before the start");
    agent.start_container("c").await.unwrap();
    let seen = agent.read_until("c", "", "started in pod-name").await;

    assert!(seen.contains("\"id\":\"c\""), "{seen}");
    assert_eq!(agent.wait("c", "").await.unwrap(), 0);
}

#[tokio::test]
async fn create_container_hook_when_it_fails_or_is_missing_fails_the_create() {
    let agent = Agent::start().await;
    for (hook, expected) in [
        // libcontainer tells its log the reason.
        (shell("exit 3"), "failed to run hooks"),
        (
            HookBuilder::default().path("/on/the/host").build().unwrap(),
            "createContainer hook /on/the/host",
        ),
    ] {
        let mut spec = agent.spec("true");
        let mut hooks = Hooks::default();
        hooks.set_create_container(Some(vec![hook]));
        spec.set_hooks(Some(hooks));
        let error = agent.create("c", &spec).await.unwrap_err();
        assert!(message(&error).contains(expected), "{}", message(&error));
    }
    // The name is free again.
    agent.create("c", &agent.spec("true")).await.unwrap();
}

#[tokio::test]
async fn hooks_of_the_image_when_a_container_lives_run_in_order() {
    let note = r#"state=$(cat); echo "$(basename "$0") $1 $state" >> "$(dirname "$0")/../../notes""#;
    let agent = Agent::start_with_hooks(&[
        ("prestart/10-first", note),
        ("prestart/20-second", note),
        ("poststart/one", note),
        ("poststop/one", note),
    ])
    .await;
    let names = |agent: &Agent| {
        let notes = agent.left("notes");
        let name = |line: &str| line.split(" {").next().unwrap_or_default().to_owned();
        notes.lines().map(name).collect::<Vec<_>>()
    };

    agent.create("c", &agent.spec("sleep 1000")).await.unwrap();
    assert_eq!(names(&agent), ["10-first prestart", "20-second prestart"]);
    agent.start_container("c").await.unwrap();
    assert_eq!(names(&agent)[2..], ["one poststart"]);
    let remove = RemoveContainerRequest {
        container_id: "c".into(),
        ..Default::default()
    };
    agent.client.remove_container(context(), &remove).await.unwrap();
    assert_eq!(names(&agent)[3..], ["one poststop"]);
    assert!(agent.left("notes").contains("\"id\":\"c\""));
}

#[tokio::test]
async fn start_when_a_hook_of_the_image_fails_kills_the_container() {
    let agent = Agent::start_with_hooks(&[("poststart/one", "exit 5")]).await;
    agent.create("c", &agent.spec("sleep 1000")).await.unwrap();

    let error = agent.start_container("c").await.unwrap_err();

    assert!(message(&error).contains("exit code: 5"), "{}", message(&error));
    assert_eq!(agent.wait("c", "").await.unwrap(), 137);
}
