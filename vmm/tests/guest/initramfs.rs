//! A busybox initramfs made on the spot.

use std::path::PathBuf;

use super::Scratch;

/// An initramfs whose init runs `script` with busybox's applets, /proc, /sys and /dev in place, then powers off.
///
/// `DRAGONBALL_MODULES` names a folder of kernel modules to load first, in the order of their file names.
pub fn build(scratch: &Scratch, script: &str) -> PathBuf {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .find_map(|path| std::fs::read(path).ok());
    let busybox = busybox.expect("busybox-static is installed");
    let init = format!(
        "#!/bin/busybox sh\n/bin/busybox --install -s /bin\n\
         mount -t proc proc /proc\nmount -t sysfs sys /sys\nmount -t devtmpfs dev /dev\n\
         for m in /mods/*.ko; do [ -e $m ] && insmod $m; done\n\
         [ -e /dev/hvc0 ] && exec > /dev/hvc0 2>&1\n\
         {script}\npoweroff -f\n"
    );
    let mut archive = Archive::default();
    for folder in ["bin", "proc", "sys", "dev", "mnt", "mods"] {
        archive.add(folder, 0o040_755, &[]);
    }
    archive.add("bin/busybox", 0o100_755, &busybox);
    archive.add("init", 0o100_755, init.as_bytes());
    if let Some(modules) = std::env::var_os("DRAGONBALL_MODULES") {
        for module in std::fs::read_dir(modules).unwrap().flatten() {
            let name = format!("mods/{}", module.file_name().to_string_lossy());
            archive.add(&name, 0o100_644, &std::fs::read(module.path()).unwrap());
        }
    }
    scratch.write("initramfs", &archive.finish())
}

/// A cpio archive in the "newc" format (Linux Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        let links = 1 + u32::from(mode & 0o040_000 != 0);
        self.bytes.extend_from_slice(b"070701");
        let size = u32::try_from(content.len()).unwrap();
        let name_size = u32::try_from(name.len() + 1).unwrap();
        for field in [self.inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}
