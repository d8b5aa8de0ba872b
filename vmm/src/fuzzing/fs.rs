//! FUSE requests (include/uapi/linux/fuse.h, 7.33).

use std::path::Path;

use vmm_sys_util::tempdir::TempDir;

use super::guest::{Guest, Subject};
use super::scratch::scratch;
use super::script::Script;
use crate::config::{FsConfig, FsRoot, SharedDir};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::fs::Fs;

const HIPRIO: usize = 0;
const REQUESTS: usize = 1;
const INIT: u32 = 26;
const NAMES: [&str; 8] = ["a", "b", "dir", "dir/a", "..", "", "link", "."];

/// A directory with a file, a folder and a link out of it.
#[derive(Default)]
pub(super) struct Share {
    dir: Option<TempDir>,
    unique: u64,
}

impl Subject for Share {
    fn build(&mut self) -> Box<dyn VirtioDevice> {
        let share = self.dir.get_or_insert_with(populated).as_path().join("share");
        let mut config = FsConfig::new("share", "tag", FsRoot::Directory(SharedDir::writable(share)));
        (config.threads, config.queue_size) = (2, 64);
        Box::new(Fs::new(&config).unwrap())
    }

    fn started(&mut self, guest: &mut Guest) {
        let mut body = Vec::new();
        for field in [7u32, 33, 1 << 16, u32::MAX] {
            body.extend(field.to_le_bytes());
        }
        self.request(guest, REQUESTS, INIT, 0, &body, &[80]);
    }

    fn act(&mut self, _device: &mut dyn VirtioDevice, guest: &mut Guest, script: &mut Script) {
        let (opcode, node, shape) = (script.byte(), script.byte() % 8, script.byte());
        let mut body = Vec::new();
        // Most fields are 64 bits wide and small: nodes, handles, offsets, counts, flags.
        for _ in 0..shape & 7 {
            body.extend(u64::from(script.size()).to_le_bytes());
        }
        for bits in [shape >> 3, shape >> 6] {
            if bits & 1 != 0 {
                body.extend(NAMES[usize::from(script.byte()) % NAMES.len()].bytes());
                body.push(0);
            }
        }
        body.extend(script.some(64));
        let queue = if opcode & 0x80 == 0 { REQUESTS } else { HIPRIO };
        let room = [script.size()];
        self.request(guest, queue, u32::from(opcode & 0x3f), node.into(), &body, &room);
    }
}

impl Share {
    fn request(
        &mut self,
        guest: &mut Guest,
        queue: usize,
        opcode: u32,
        node: u64,
        body: &[u8],
        room: &[u32],
    ) {
        self.unique += 2;
        // `struct fuse_in_header`: len, opcode, unique, nodeid, uid, gid, pid, total_extlen and padding.
        let mut message = Vec::new();
        message.extend((40 + body.len() as u32).to_le_bytes());
        message.extend(opcode.to_le_bytes());
        message.extend(self.unique.to_le_bytes());
        message.extend(node.to_le_bytes());
        message.resize(40, 0);
        message.extend(body);
        guest.request(queue, &[(&message, message.len() as u32)], room);
        guest.kick(queue);
    }
}

fn populated() -> TempDir {
    let dir = scratch();
    let make = |base: &Path| {
        std::fs::create_dir_all(base.join("share/dir"))?;
        std::fs::write(base.join("share/a"), "content")?;
        std::fs::write(base.join("secret"), "secret")?;
        std::os::unix::fs::symlink("../secret", base.join("share/link"))
    };
    make(dir.as_path()).unwrap();
    dir
}
