//! What is mounted into a container: the host's mount table decides, and what cannot be had is refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tests::Case;
use tests::case::skipped_under_runc;
use tests::image::mapped;

/// Mounts of the test on the host; taken away with the value.
struct HostMount(PathBuf);

impl HostMount {
    fn tmpfs(point: &Path) -> Self {
        fs::create_dir_all(point).unwrap();
        let mount = |args: &[&str]| Command::new("mount").args(args).arg(point).status().unwrap();
        assert!(mount(&["-t", "tmpfs", "tmpfs"]).success());
        assert!(mount(&["--make-shared"]).success());
        Self(point.to_owned())
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn bind(source: &Path, target: &str, options: &str) -> String {
    format!(
        "type=bind,src={},dst={target},options={options}",
        source.display()
    )
}

#[test]
fn host_mount_when_made_later_comes_and_goes_under_rslave() {
    let case = Case::begin("rslave");
    let source = HostMount::tmpfs(&case.daemon().dir().join("rslave"));
    let container = case.container();
    let script = "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done";
    let run = container
        .run(&["sh", "-c", script])
        .flag("-d")
        .flag("--null-io")
        .option("--mount", &bind(&source.0, "/mnt", "rbind:rslave"));
    run.output().expect_code(0);

    let later = HostMount::tmpfs(&source.0.join("later"));
    fs::write(later.0.join("file"), "late\n").unwrap();
    let appears = "until [ -e /mnt/later/file ]; do sleep 0.1; done; cat /mnt/later/file";
    assert_eq!(container.script(&[], appears).expect_code(0).out(), "late\n");

    drop(later);
    let goes = "while [ -e /mnt/later/file ]; do sleep 0.1; done";
    container.script(&[], goes).expect_code(0);
}

#[test]
fn read_only_mount_when_another_is_below_covers_what_was_asked() {
    let case = Case::begin("nested-ro");
    let source = HostMount::tmpfs(&case.daemon().dir().join("nested"));
    let _below = HostMount::tmpfs(&source.0.join("below"));
    for (options, below) in [("rbind:ro", "written"), ("rbind:rro", "refused")] {
        let script =
            "try() { touch $1/new 2>/dev/null && echo written || echo refused; }; try /mnt; try /mnt/below";
        let container = case.container();
        let run = container
            .run(&["sh", "-c", script])
            .flag("--rm")
            .option("--mount", &bind(&source.0, "/mnt", options));
        assert_eq!(
            run.output().expect_code(0).out(),
            format!("refused\n{below}\n"),
            "{options}"
        );
    }
}

#[test]
fn volume_when_it_cannot_be_had_in_the_guest_is_refused_by_name() {
    if skipped_under_runc("a process has the host's devices") {
        return;
    }
    let case = Case::begin("foreign-volume");
    let folder = case.daemon().dir().join("foreign");
    fs::create_dir_all(&folder).unwrap();
    let node = |name: &str, words: &[&str]| {
        let path = folder.join(name);
        assert!(
            Command::new("mknod")
                .arg(&path)
                .args(words)
                .status()
                .unwrap()
                .success()
        );
        path
    };
    let socket = folder.join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for (source, word) in [
        (node("disk", &["b", "7", "0"]), "block device"),
        (node("kvm", &["c", "10", "232"]), "device of the host"),
        (node("fifo", &["p"]), "FIFO"),
        (socket, "socket"),
    ] {
        let container = case.container();
        let done = container
            .run(&["true"])
            .flag("--rm")
            .option("--mount", &bind(&source, "/mnt", "rbind:rw"))
            .output();
        let named = done.err().contains(&*source.to_string_lossy()) && done.err().contains(word);
        assert!(done.code != 0 && named, "{}", done.describe());
    }
}

/// A guest's kernel sends pages of a mapped file to its host after the process has ended that wrote to them: whoever is told of
/// the end of a pod finds them there.
#[test]
fn data_when_written_through_memory_only_outlives_the_pod() {
    let pages = Case::like_runc("mapped", |case| {
        let volume = case.folder("volume");
        mapped::write(&volume.join("program")).unwrap();
        let container = case.container();
        let run = container
            .run(&["./program"])
            .flag("--rm")
            .option("--cwd", "/mnt")
            .option("--mount", &bind(&volume, "/mnt", "rbind:rw"));
        run.output().expect_code(0);
        mapped::pages_in(&volume.join("out")).unwrap()
    });
    assert_eq!(pages, mapped::SIZE as usize / mapped::PAGE);
}
