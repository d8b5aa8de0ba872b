//! A share whose host does not answer: who uses it waits, and nobody else.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use oci_spec::runtime::Mount;
use protocols::agent::CreateContainerRequest;
use protocols::oci_convert::spec_to_wire;
use tokio::sync::oneshot;
use ttrpc::context::with_timeout;

use crate::harness::Agent;

/// linux/fuse.h
const INIT: u32 = 26;

/// A FUSE file system in a mount namespace of this test's thread, which the agent inherits. Its server answers the mount and
/// hears one more request, of which it says nothing.
struct HangingShare {
    path: PathBuf,
    /// Somebody waits.
    used: Option<oneshot::Receiver<()>>,
    release: Option<mpsc::Sender<()>>,
    server: Option<JoinHandle<()>>,
}

impl HangingShare {
    fn mount() -> Self {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&Path>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let path = std::env::temp_dir().join(format!("agent-hanging-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        mount(
            Some("hanging"),
            &path,
            Some("fuse"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .unwrap();
        let (use_it, used) = oneshot::channel();
        let (release, released) = mpsc::channel();
        let server = std::thread::spawn(move || serve(device, use_it, &released));
        Self {
            path,
            used: Some(used),
            release: Some(release),
            server: Some(server),
        }
    }

    /// Fails who waits.
    fn release(&mut self) {
        drop(self.release.take());
        if let Some(server) = self.server.take()
            && server.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the share's server panicked");
        }
    }
}

impl Drop for HangingShare {
    fn drop(&mut self) {
        self.release();
        let _ = nix::mount::umount(&self.path);
        let _ = std::fs::remove_dir(&self.path);
    }
}

fn serve(mut device: File, used: oneshot::Sender<()>, released: &mpsc::Receiver<()>) {
    // More than the largest write, or the kernel gives nothing.
    let mut request = vec![0; 2 << 20];
    let mut next = |device: &mut File| {
        // struct fuse_in_header: len, opcode, unique, …
        let len = device.read(&mut request).unwrap();
        assert!(len >= 40, "{len}");
        let opcode = u32::from_le_bytes(request[4..8].try_into().unwrap());
        (opcode, request[8..16].to_vec())
    };
    let (opcode, unique) = next(&mut device);
    assert_eq!(opcode, INIT);
    // struct fuse_out_header: len, error, unique; struct fuse_init_out: version 7.31, …, the largest write at byte 20.
    let mut answer = vec![0; 16 + 64];
    for (at, word) in [(0, 80), (16, 7u32), (20, 31), (36, 1 << 20), (40, 1)] {
        answer[at..at + 4].copy_from_slice(&word.to_le_bytes());
    }
    answer[8..16].copy_from_slice(&unique);
    assert_eq!(device.write(&answer).unwrap(), answer.len());
    next(&mut device);
    used.send(()).unwrap();
    // Closing the device, in the end, fails everything that waits.
    let _ = released.recv();
}

#[tokio::test]
async fn agent_when_a_share_hangs_serves_all_others() {
    let mut share = HangingShare::mount();
    let agent = Agent::start().await;
    let mut spec = agent.spec("true");
    let mut volume = Mount::default();
    volume
        .set_typ(Some("bind".into()))
        .set_source(Some(share.path.join("folder")))
        .set_destination("/volume".into())
        .set_options(Some(vec!["rbind".into()]));
    spec.mounts_mut().get_or_insert_default().push(volume);

    let used = share.used.take().unwrap();
    let request = CreateContainerRequest {
        container_id: "hung".into(),
        OCI: Some(spec_to_wire(&spec)).into(),
        ..Default::default()
    };
    // Longer than all the others together may take.
    let long = with_timeout(Duration::from_secs(900).as_nanos().try_into().unwrap());
    let hung = agent.client.create_container(long, &request);
    tokio::pin!(hung);
    let others = async {
        used.await.unwrap();
        for id in ["one", "two"] {
            assert_eq!(agent.run(id, &agent.spec("echo here")).await.stdout, "here\n");
        }
    };
    tokio::select! {
        biased;
        result = &mut hung => panic!("nothing hung: {result:?}"),
        () = others => {}
    }
    share.release();
    hung.await.expect_err("its volume is gone");
    // The name is free again.
    let output = agent.run("hung", &agent.spec("echo again")).await;
    assert_eq!(output.stdout, "again\n");
}
