//! The death of a VM, and of its shim.

use super::*;

#[tokio::test]
async fn vm_when_it_dies_ends_every_process_in_order() {
    let mut bench = bench(Boot::Announced);
    bench.create("c1", &["sleep"]).await.unwrap();
    bench.start(init("c1")).await.unwrap();
    bench.exec("e1", &["sleep"]).await.unwrap();
    bench.start(exec("e1")).await.unwrap();
    bench.events();

    bench.vm.end(VmExit::Panic);

    assert_eq!(bench.wait(exec("e1")).await, 137);
    assert_eq!(bench.wait(init("c1")).await, 137);
    assert_eq!(bench.status(init("c1")).await, ProcessStatus::Stopped);
    bench.delete(exec("e1")).await.unwrap();
    bench.delete(init("c1")).await.unwrap();
    assert!(bench.shutdown().await);
    assert_eq!(
        bench.events(),
        ["exit e1 137", "exit c1 137", "delete e1 137", "delete c1 137"]
    );
    assert_eq!(bench.leftovers(), Vec::<String>::new());
}

#[tokio::test]
async fn cleanup_when_the_shim_crashed_removes_everything() {
    let bench = bench(Boot::Announced);
    bench.create("c1", &["sleep"]).await.unwrap();
    assert_ne!(bench.leftovers(), Vec::<String>::new());
    let paths = SandboxPaths::below(&bench.path("run"), "test", "c1").unwrap();

    let before = bench.leftovers();
    let error = cleanup_paths(paths.clone(), bench.path("c1")).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::AlreadyExists, "{error}");
    assert_eq!(bench.leftovers(), before, "of a living shim nothing is touched");

    // The shim is "dead": nothing of it is asked, and nobody holds the lock of the file that is found.
    let copy = paths.state().join("copy");
    fs::copy(paths.journal(), &copy).unwrap();
    fs::rename(&copy, paths.journal()).unwrap();
    cleanup_paths(paths.clone(), bench.path("c1")).await.unwrap();
    cleanup_paths(paths.clone(), bench.path("c1")).await.unwrap();

    assert_eq!(bench.leftovers(), Vec::<String>::new());
    assert!(bench.path("c1/rootfs/file").exists() && bench.path("volume").exists());
    bench.manager.shutdown().await;
}
