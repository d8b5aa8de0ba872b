use protocols::agent::{
    CreateContainerRequest, CreateSandboxRequest, Device, Storage, UpdateContainerRequest, WaitProcessRequest,
};
use protocols::oci_convert::spec_to_wire;
use ttrpc::Code;

use crate::harness::{Agent, code, context, message, process};

#[tokio::test]
async fn program_when_missing_fails_the_creation_naming_it_and_leaves_nothing() {
    let agent = Agent::start().await;
    let mut spec = agent.spec("true");
    for (program, expected) in [
        (
            "frobnicate",
            "exec: \"frobnicate\": executable file not found in $PATH",
        ),
        (
            "/bin/frobnicate",
            "exec: \"/bin/frobnicate\": no such file or directory",
        ),
        ("/tmp", "exec: \"/tmp\": permission denied"),
    ] {
        spec.set_process(Some(process(&[program])));
        let error = agent.create("one", &spec).await.unwrap_err();
        assert_eq!(code(&error), Code::INVALID_ARGUMENT);
        assert!(message(&error).contains(expected), "{error}");
    }
    let output = agent.run("one", &agent.spec("echo fine")).await;
    assert_eq!(output.stdout, "fine\n");
}

#[tokio::test]
async fn program_when_it_cannot_be_executed_fails_the_start() {
    use std::os::unix::fs::PermissionsExt;

    let agent = Agent::start().await;
    let file = agent.rootfs().join("bin/not-a-program");
    std::fs::write(&file, "neither ELF nor script").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut spec = agent.spec("true");
    spec.set_process(Some(process(&["not-a-program"])));
    agent.create("one", &spec).await.unwrap();

    let error = agent.start_container("one").await.unwrap_err();

    assert_eq!(code(&error), Code::INVALID_ARGUMENT);
    assert!(
        message(&error).contains("\"/bin/not-a-program\": exec format error"),
        "{error}"
    );
}

#[tokio::test]
async fn names_when_unknown_are_not_found() {
    let agent = Agent::start().await;
    agent.create("one", &agent.spec("sleep 1000")).await.unwrap();
    let wait = |id: &str, exec_id: &str| WaitProcessRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
        ..Default::default()
    };

    for (id, exec_id, expected) in [
        ("nobody", "", "container nobody not found"),
        (
            "one",
            "nothing",
            "container one: process nothing of container one not found",
        ),
    ] {
        let error = agent
            .client
            .wait_process(context(), &wait(id, exec_id))
            .await
            .unwrap_err();
        assert_eq!(
            (code(&error), message(&error).as_str()),
            (Code::NOT_FOUND, expected)
        );
    }
    assert_eq!(
        code(&agent.start_container("nobody").await.unwrap_err()),
        Code::NOT_FOUND
    );
    assert_eq!(code(&agent.remove("nobody").await.unwrap_err()), Code::NOT_FOUND);
    assert_eq!(
        code(&agent.signal("nobody", "", 9).await.unwrap_err()),
        Code::NOT_FOUND
    );
    assert_eq!(
        code(&agent.write("nobody", "", b"x").await.unwrap_err()),
        Code::NOT_FOUND
    );
    assert_eq!(
        code(&agent.signal("one", "", 99).await.unwrap_err()),
        Code::INVALID_ARGUMENT
    );
}

#[tokio::test]
async fn names_when_taken_or_dangerous_are_refused() {
    let agent = Agent::start().await;
    agent.create("one", &agent.spec("sleep 1000")).await.unwrap();

    let error = agent.create("one", &agent.spec("true")).await.unwrap_err();
    assert_eq!(
        (code(&error), message(&error).as_str()),
        (Code::ALREADY_EXISTS, "container one exists")
    );
    for id in [
        "",
        "..",
        "../../etc",
        "a/b",
        "shared",
        "sandbox",
        &"x".repeat(200),
    ] {
        let error = agent.create(id, &agent.spec("true")).await.unwrap_err();
        assert_eq!(code(&error), Code::INVALID_ARGUMENT, "{id}: {error}");
    }
    let again = CreateSandboxRequest {
        sandbox_id: "other".into(),
        ..Default::default()
    };
    let error = agent.client.create_sandbox(context(), &again).await.unwrap_err();
    assert_eq!(code(&error), Code::ALREADY_EXISTS, "{error}");
}

#[tokio::test]
async fn requests_when_incomplete_or_unsupported_are_refused_by_kind() {
    let agent = Agent::start().await;
    let request = |change: &dyn Fn(&mut CreateContainerRequest)| {
        let mut request = CreateContainerRequest {
            container_id: "one".into(),
            OCI: Some(spec_to_wire(&agent.spec("true"))).into(),
            ..Default::default()
        };
        change(&mut request);
        request
    };
    let storage = Storage {
        driver: "scsi".into(),
        mount_point: "/run/x".into(),
        ..Default::default()
    };
    let device = Device {
        id: "d".into(),
        type_: "vfio-pci".into(),
        ..Default::default()
    };

    let cases: [(CreateContainerRequest, Code, &str); 6] = [
        (
            request(&|r| r.OCI = None.into()),
            Code::INVALID_ARGUMENT,
            "request without OCI",
        ),
        (
            request(&|r| r.OCI.mut_or_insert_default().Root.mut_or_insert_default().Path = "/nowhere".into()),
            Code::INVALID_ARGUMENT,
            "container one: container root /nowhere: not a directory in the guest",
        ),
        (
            request(&|r| r.OCI.mut_or_insert_default().Process = None.into()),
            Code::INVALID_ARGUMENT,
            "container one: container specification without process",
        ),
        (
            request(&|r| r.storages = vec![storage.clone()]),
            Code::UNIMPLEMENTED,
            "storage driver \"scsi\": not supported by this agent",
        ),
        (
            request(&|r| r.devices = vec![device.clone()]),
            Code::UNIMPLEMENTED,
            "device d of type vfio-pci: not supported by this agent",
        ),
        (
            request(&|r| r.string_user.mut_or_insert_default().uid = "www".into()),
            Code::UNIMPLEMENTED,
            "string_user (www:): not supported by this agent",
        ),
    ];
    for (request, expected_code, expected) in cases {
        let error = agent
            .client
            .create_container(context(), &request)
            .await
            .unwrap_err();
        assert_eq!(
            (code(&error), message(&error).as_str()),
            (expected_code, expected)
        );
    }
    let update = UpdateContainerRequest {
        container_id: "nobody".into(),
        ..Default::default()
    };
    assert!(agent.client.update_container(context(), &update).await.is_err());
}

#[tokio::test]
async fn storages_when_mounted_are_visible_and_released_with_the_container() {
    let agent = Agent::start().await;
    let spec = {
        let mut spec = agent.spec("touch /data/file; ls -ld /data; ls /data");
        let mut mount = oci_spec::runtime::Mount::default();
        mount
            .set_destination("/data".into())
            .set_source(Some("/run/kata-containers/sandbox/ephemeral".into()))
            .set_typ(Some("bind".into()))
            .set_options(Some(vec!["rbind".into()]));
        spec.mounts_mut().get_or_insert_default().push(mount);
        spec
    };
    let storage = Storage {
        driver: "ephemeral".into(),
        source: "tmpfs".into(),
        fstype: "tmpfs".into(),
        options: vec!["size=1m".into(), "mode=0700".into()],
        mount_point: "/run/kata-containers/sandbox/ephemeral".into(),
        ..Default::default()
    };
    let request = CreateContainerRequest {
        container_id: "one".into(),
        OCI: Some(spec_to_wire(&spec)).into(),
        storages: vec![storage],
        ..Default::default()
    };

    for _ in 0..2 {
        agent.client.create_container(context(), &request).await.unwrap();
        agent.start_container("one").await.unwrap();
        let text = String::from_utf8(agent.read_all("one", "", false).await).unwrap();
        assert!(
            text.starts_with("drwx------") && text.ends_with("\nfile\n"),
            "{text}"
        );
        assert_eq!(agent.wait("one", "").await.unwrap(), 0);
        agent.remove("one").await.unwrap();
    }
}
