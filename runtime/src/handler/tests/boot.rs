//! The boot of a VM with its first container: beside each other, and what is left when it fails.

use super::*;

#[tokio::test]
async fn boot_when_it_fails_says_why_and_leaves_nothing() {
    for (boot, kind, parts) in [
        (
            Boot::Refused,
            ErrorKind::PermissionDenied,
            ["sandbox c1", "/dev/kvm: permission denied"],
        ),
        (
            Boot::Panics,
            ErrorKind::Unavailable,
            [
                "the guest kernel panicked",
                "Kernel panic - not syncing | [0m---[",
            ],
        ),
    ] {
        let mut bench = bench(boot);
        let error = bench.create("c1", &["sleep"]).await.unwrap_err();
        assert_eq!(error.kind, kind, "{error}");
        for part in parts {
            assert!(error.message.contains(part), "{part} in {error}");
        }
        assert!(!error.message.contains('\n'));
        assert_eq!(bench.leftovers(), Vec::<String>::new());
        assert_eq!(bench.events(), Vec::<String>::new());
        assert!(bench.shutdown().await, "a shim without a sandbox may end");
    }
}

#[tokio::test]
async fn boot_when_shut_down_is_interrupted() {
    let bench = Arc::new(bench(Boot::Hangs));
    let creating = {
        let bench = bench.clone();
        tokio::spawn(async move { bench.create("c1", &["sleep"]).await })
    };
    bench.prepared().await;
    assert!(bench.shutdown().await);
    assert_eq!(creating.await.unwrap().unwrap_err().kind, ErrorKind::Unavailable);
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn container_when_its_guest_boots_is_prepared() {
    let bench = Arc::new(bench(Boot::Hangs));
    let creating = {
        let bench = bench.clone();
        tokio::spawn(async move { bench.create("c1", &["sleep"]).await })
    };
    bench.prepared().await;
    assert!(!creating.is_finished());

    bench.manager.shutdown().await;
    creating.await.unwrap().unwrap_err();
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn boot_when_a_mount_is_bad_is_interrupted() {
    let mut bench = bench(Boot::Hangs);
    let mut create = bench.create_request("c1", &["sleep"], Stdio::default());
    create.rootfs = vec![Mount {
        fs_type: "overlay".into(),
        source: "overlay".into(),
        options: vec!["lowerdir=/nonexistent-lower".into()],
        ..Default::default()
    }];

    let error = bench.create_with(create).await.unwrap_err();

    assert!(error.message.contains("/nonexistent-lower"), "{error}");
    assert_eq!(bench.leftovers(), Vec::<String>::new());
    assert_eq!(bench.events(), Vec::<String>::new());
    assert!(bench.shutdown().await);
}

#[tokio::test]
async fn bundle_when_bad_is_named_and_leaves_nothing() {
    let mut bench = bench(Boot::Announced);
    let request = |bench: &Bench| bench.create_request("c1", &["sleep"], Stdio::default());

    let create = request(&bench);
    fs::remove_file(create.bundle.join("config.json")).unwrap();
    let error = bench.create_with(create).await.unwrap_err();
    assert!(
        error.kind == ErrorKind::NotFound && error.message.contains("c1/config.json"),
        "{error}"
    );

    let create = request(&bench);
    fs::remove_dir_all(create.bundle.join("rootfs")).unwrap();
    let error = bench.create_with(create).await.unwrap_err();
    assert!(
        error.kind == ErrorKind::NotFound && error.message.contains("c1/rootfs"),
        "{error}"
    );
    assert_eq!(bench.leftovers(), Vec::<String>::new());

    let mut create = request(&bench);
    create.rootfs = vec![Mount {
        fs_type: "overlay".into(),
        source: "overlay".into(),
        ..Default::default()
    }];
    create.rootfs[0].options = vec!["lowerdir=/nonexistent-lower".into()];
    let error = bench.create_with(create).await.unwrap_err();
    assert!(
        error.message.contains("overlay") && error.message.contains("/nonexistent-lower"),
        "{error}"
    );

    let mut create = request(&bench);
    create.options.config_body = b"[hypervisor.dragonball]\nkernel = \"/nonexistent/vmlinux\"\n".to_vec();
    let error = bench.create_with(create).await.unwrap_err();
    assert!(
        error.kind == ErrorKind::NotFound && error.message.contains("/nonexistent/vmlinux"),
        "{error}"
    );

    let error = bench.create("c1", &["refused"]).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::InvalidArgument);
    assert_eq!(
        error.message,
        "create container c1: agent CreateContainer: refused by the test"
    );

    assert_eq!(bench.leftovers(), Vec::<String>::new());
    assert_eq!(bench.events(), Vec::<String>::new());
    assert!(bench.shutdown().await);
}
