//! A container's mounts, working directory and devices, where runc and libcontainer differ.

use std::os::unix::fs::symlink;

use oci_spec::runtime::{Capability, LinuxCapabilities, Mount, Spec};
use protocols::agent::{CreateContainerRequest, Storage};
use protocols::oci_convert::spec_to_wire;

use crate::harness::{Agent, code, context, message};

fn mount(kind: Option<&str>, source: Option<&str>, destination: &str, options: &[&str]) -> Mount {
    let mut mount = Mount::default();
    mount
        .set_typ(kind.map(str::to_owned))
        .set_source(source.map(Into::into))
        .set_destination(destination.into())
        .set_options(
            Some(options.iter().map(ToString::to_string).collect()).filter(|list: &Vec<_>| !list.is_empty()),
        );
    mount
}

fn with_mounts(mut spec: Spec, mounts: impl IntoIterator<Item = Mount>) -> Spec {
    spec.mounts_mut().get_or_insert_default().extend(mounts);
    spec
}

#[tokio::test]
async fn mount_when_defaults_are_left_out_is_made() {
    let agent = Agent::start().await;
    let script = "for at in /t /u /m; do grep \" $at \" /proc/mounts | cut -d' ' -f3,4 | cut -d, -f1; done";
    let spec = with_mounts(
        agent.spec(script),
        [
            mount(Some("tmpfs"), None, "/t", &[]),
            mount(Some("tmpfs"), None, "/u", &["ro", "size=1m"]),
            mount(Some("mqueue"), None, "/m", &[]),
        ],
    );

    let output = agent.run("one", &spec).await;

    assert_eq!(
        output.stdout, "tmpfs rw\ntmpfs ro\nmqueue rw\n",
        "{}",
        output.stderr
    );
}

#[tokio::test]
async fn mount_when_its_destination_leads_through_links_is_inside_the_root() {
    let agent = Agent::start().await;
    let root = agent.rootfs();
    std::fs::create_dir_all(root.join("real")).unwrap();
    for (link, target) in [
        ("one", "two"),
        ("two", "/real"),
        ("dangling", "/nowhere/file"),
        ("out", "../../../../outside"),
    ] {
        symlink(target, root.join(link)).unwrap();
    }
    let source = root.join("tmp/source");
    std::fs::write(&source, "text\n").unwrap();
    let file = source.to_str();
    let script = "cat /one/below/file /nowhere/file /outside; grep -c ' /real/tmpfs ' /proc/mounts";
    let spec = with_mounts(
        agent.spec(script),
        [
            mount(
                Some("bind"),
                file,
                "/one/below/file",
                &["rbind", "ro", "rprivate"],
            ),
            mount(Some("bind"), file, "/dangling", &["rbind"]),
            mount(Some("bind"), file, "/out", &["bind", "rslave", "nosuid"]),
            mount(
                Some("tmpfs"),
                Some("tmpfs"),
                "/two/tmpfs",
                &["size=1m", "mode=700"],
            ),
        ],
    );

    let output = agent.run("one", &spec).await;

    assert_eq!(output.stdout, "text\ntext\ntext\n1\n", "{}", output.stderr);
    assert!(!std::path::Path::new("/outside").exists());
}

#[tokio::test]
async fn mounts_when_they_lie_on_each_other_are_made_in_order() {
    let agent = Agent::start().await;
    let source = agent.rootfs().join("tmp/source");
    std::fs::create_dir_all(source.join("deep")).unwrap();
    std::fs::write(source.join("deep/file"), "text\n").unwrap();
    let script = "cat /a/file; ls /a; test -e /dev/core || readlink /dev/core; ls /dev/mine; ls -d /sys/mine 2>/dev/null || echo none";
    let spec = with_mounts(
        agent.spec(script),
        [
            mount(Some("bind"), source.to_str(), "/a", &["rbind"]),
            mount(Some("tmpfs"), None, "/a", &[]),
            mount(Some("bind"), source.join("deep").to_str(), "/a/../a", &["rbind"]),
            mount(Some("bind"), source.to_str(), "/dev/mine", &["rbind"]),
        ],
    );

    let output = agent.run("one", &spec).await;

    assert_eq!(
        output.stdout, "text\nfile\n/proc/kcore\ndeep\nnone\n",
        "{}",
        output.stderr
    );
}

#[tokio::test]
async fn bind_mount_when_recursive_and_read_only_is_so_at_the_top() {
    const TOP: &str = "/run/kata-containers/sandbox/top";
    const BELOW: &str = "/run/kata-containers/sandbox/top/below";
    let agent = Agent::start().await;
    let script = "for file in /top/x /top/below/x /all/x /all/below/x; do
                  touch $file 2>/dev/null && echo yes || echo no; done";
    let spec = with_mounts(
        agent.spec(script),
        [
            mount(Some("bind"), Some(TOP), "/top", &["rbind", "ro"]),
            mount(Some("bind"), Some(TOP), "/all", &["rbind", "rro"]),
        ],
    );
    let storage = |path: &str| Storage {
        driver: "ephemeral".into(),
        source: "tmpfs".into(),
        mount_point: path.into(),
        ..Default::default()
    };
    let request = CreateContainerRequest {
        container_id: "one".into(),
        OCI: Some(spec_to_wire(&spec)).into(),
        storages: vec![storage(TOP), storage(BELOW)],
        ..Default::default()
    };

    agent.client.create_container(context(), &request).await.unwrap();
    agent.start_container("one").await.unwrap();

    let output = agent.read_all("one", "", false).await;
    assert_eq!(String::from_utf8(output).unwrap(), "no\nyes\nno\nno\n");
}

#[tokio::test]
async fn mount_when_its_source_is_missing_is_named() {
    let agent = Agent::start().await;
    let spec = with_mounts(
        agent.spec("true"),
        [mount(Some("bind"), Some("/nowhere/at/all"), "/a", &["rbind"])],
    );

    let error = agent.create("one", &spec).await.unwrap_err();

    assert_eq!(code(&error), ttrpc::Code::INVALID_ARGUMENT);
    assert!(
        message(&error).contains("mount /nowhere/at/all on /a: ENOENT"),
        "{error}"
    );
}

#[tokio::test]
async fn working_directory_when_missing_is_made_for_the_init_only() {
    let agent = Agent::start().await;
    symlink("/made", agent.rootfs().join("link")).unwrap();
    let mut spec = agent.spec("pwd");
    spec.process_mut().as_mut().unwrap().set_cwd("/link/a/b".into());

    let output = agent.run("one", &spec).await;

    assert_eq!(output.stdout, "/made/a/b\n", "{}", output.stderr);
    agent.create("two", &agent.spec("sleep 1000")).await.unwrap();
    agent.start_container("two").await.unwrap();
    let mut command = crate::harness::process(&["pwd"]);
    command.set_cwd("/none".into());
    let error = agent.exec("two", "e", &command, [0; 3]).await.unwrap_err();
    assert_ne!(code(&error), ttrpc::Code::NOT_FOUND, "{error}");
    assert!(!agent.rootfs().join("none").exists());
}

#[tokio::test]
async fn device_when_its_node_is_made_by_hand_cannot_be_opened() {
    let agent = Agent::start().await;
    // A node, or a refusal to make it where the kernel has no device control: either way no device.
    let script = "mknod /dev/disk b 1 1; cat /dev/disk; mknod /tmp/memory c 1 1; head -c 1 /tmp/memory";
    let mut spec = agent.spec(script);
    let set = Some([Capability::Mknod, Capability::Chown].into_iter().collect());
    let mut capabilities = LinuxCapabilities::default();
    capabilities
        .set_bounding(set.clone())
        .set_effective(set.clone())
        .set_permitted(set)
        .set_inheritable(Some(Default::default()))
        .set_ambient(Some(Default::default()));
    spec.process_mut()
        .as_mut()
        .unwrap()
        .set_capabilities(Some(capabilities));

    let output = agent.run("one", &spec).await;

    assert_eq!(output.stdout, "");
    assert!(
        output.stderr.contains("Operation not permitted"),
        "{}",
        output.stderr
    );
    assert_ne!(output.status, 0);
}
