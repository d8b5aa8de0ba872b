//! What was written to a volume, at its end.

use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MsFlags, mount, umount};
use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::Mount;
use protocols::agent::{CreateContainerRequest, DestroySandboxRequest, Storage};
use protocols::oci_convert::spec_to_wire;

use crate::harness::{Agent, context};

/// Stands in no other place of the disk.
const WRITTEN: &str = "what a container wrote last";

/// A disk with an empty ext4, in a file that shows what has reached it.
struct Disk {
    image: PathBuf,
    device: String,
    /// Where this test has it mounted, in a mount namespace of its thread.
    mounted: Option<PathBuf>,
}

impl Disk {
    fn new(folder: &Path) -> Self {
        let image = folder.join("disk");
        std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        output("mkfs.ext4", &["-q".as_ref(), image.as_ref()]);
        let device = output("losetup", &["--find".as_ref(), "--show".as_ref(), image.as_ref()]);
        Self {
            image,
            device: device.trim().to_owned(),
            mounted: None,
        }
    }

    /// Has the filesystem mounted once more, where no agent sees it: its unmounts do not end the filesystem, which then keeps
    /// what is dirty for seconds.
    fn keep(&mut self) {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&Path>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let place = self.image.with_extension("kept");
        std::fs::create_dir(&place).unwrap();
        mount(
            Some(self.device.as_str()),
            &place,
            Some("ext4"),
            MsFlags::empty(),
            none,
        )
        .unwrap();
        self.mounted = Some(place);
    }

    /// Whether `text` is on it, by the file that it is.
    fn has(&self, text: &str) -> bool {
        let bytes = std::fs::read(&self.image).unwrap();
        bytes.windows(text.len()).any(|window| window == text.as_bytes())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Some(place) = &self.mounted {
            let _ = umount(place);
        }
        // Takes effect when the last mount of it goes.
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
    }
}

fn output(program: &str, arguments: &[&std::ffi::OsStr]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// A running container with `disk` on /volume that has written to it.
async fn write(agent: &Agent, disk: &Disk, place: &Path) {
    let mut spec = agent.spec(&format!(
        "echo {WRITTEN} >/volume/file; echo ready; while :; do sleep 100; done"
    ));
    let mut volume = Mount::default();
    volume
        .set_typ(Some("bind".into()))
        .set_source(Some(place.to_owned()))
        .set_destination("/volume".into())
        .set_options(Some(vec!["rbind".into()]));
    spec.mounts_mut().get_or_insert_default().push(volume);
    let request = CreateContainerRequest {
        container_id: "one".into(),
        OCI: Some(spec_to_wire(&spec)).into(),
        storages: vec![Storage {
            driver: "blk".into(),
            source: disk.device.clone(),
            fstype: "ext4".into(),
            mount_point: place.display().to_string(),
            ..Default::default()
        }],
        ..Default::default()
    };
    agent.client.create_container(context(), &request).await.unwrap();
    agent.start_container("one").await.unwrap();
    agent.read_until("one", "", "ready").await;
}

#[tokio::test]
async fn disk_when_the_sandbox_is_destroyed_has_its_data_before_the_answer() {
    let agent = Agent::start().await;
    let mut disk = Disk::new(agent.folder());
    let place = agent.folder().join("volume");
    write(&agent, &disk, &place).await;
    disk.keep();

    agent
        .client
        .destroy_sandbox(context(), &DestroySandboxRequest::new())
        .await
        .unwrap();

    assert!(disk.has(WRITTEN));
    assert!(
        !place.exists(),
        "a folder on which something is mounted cannot be removed"
    );
}

#[tokio::test]
async fn disk_when_its_container_is_removed_has_its_data_before_the_answer() {
    let agent = Agent::start().await;
    let mut disk = Disk::new(agent.folder());
    let place = agent.folder().join("volume");
    write(&agent, &disk, &place).await;
    disk.keep();

    agent.remove("one").await.unwrap();

    assert!(disk.has(WRITTEN));
    assert!(
        !place.exists(),
        "a folder on which something is mounted cannot be removed"
    );
}
