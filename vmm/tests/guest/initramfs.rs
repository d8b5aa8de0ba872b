//! A busybox initramfs made on the spot.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use lzma_rust2::XzReader;

use super::Scratch;

/// What the tests need of a kernel whose virtio drivers are modules, in the order to load them: devices show up once all
/// drivers are there. `tests/gather` packs the same list.
const MODULES: &str = include_str!("modules");

/// An initramfs whose init runs `script` with busybox's applets, /proc, /sys and /dev in place, then powers off.
pub fn build(scratch: &Scratch, script: &str) -> PathBuf {
    build_with(scratch, &Extras::default(), script)
}

/// What a guest may need beside busybox.
#[derive(Debug, Default)]
pub struct Extras {
    /// Modules of its kernel, which init loads in this order.
    pub modules: Vec<Module>,
    /// Programs of this machine, by path; they come with their shared libraries and keep their paths.
    pub programs: Vec<PathBuf>,
}

/// The same with `extras`.
pub fn build_with(scratch: &Scratch, extras: &Extras, script: &str) -> PathBuf {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .find_map(|path| fs::read(path).ok());
    let busybox = busybox.expect("busybox-static is installed");
    // A console may come with a module: what went wrong is said when it is there.
    let init = format!(
        "#!/bin/busybox sh\n/bin/busybox --install -s /bin\n\
         mount -t proc proc /proc\nmount -t sysfs sys /sys\nmount -t devtmpfs dev /dev\n\
         for m in /mods/*.ko; do [ -e $m ] && ! insmod $m && failed=\"$failed $m\"; done\n\
         [ -e /dev/hvc0 ] && exec > /dev/hvc0 2>&1\n\
         [ -z \"$failed\" ] || echo \"cannot load$failed\"\n\
         {script}\npoweroff -f\n"
    );
    let mut archive = Archive::default();
    for folder in ["bin", "proc", "sys", "dev", "mnt", "mods"] {
        archive.add(folder, 0o040_755, &[]);
    }
    archive.add("bin/busybox", 0o100_755, &busybox);
    archive.add("init", 0o100_755, init.as_bytes());
    for (index, module) in extras.modules.iter().enumerate() {
        let name = format!("mods/{index:03}-{}.ko", module.name);
        archive.add(&name, 0o100_644, &module.content);
    }
    for program in &extras.programs {
        archive.add_program(program);
    }
    scratch.write("initramfs", &archive.finish())
}

/// A kernel module, not compressed.
#[derive(Debug, Clone)]
pub struct Module {
    name: String,
    content: Vec<u8>,
}

/// The modules the tests need from a stock kernel, with what these need, in an order in which they can be loaded. What
/// is built in is left out.
///
/// `tree` holds `lib/modules/<release>` of one release.
pub fn stock_modules(tree: &Path) -> Vec<Module> {
    let mut releases = fs::read_dir(tree.join("lib/modules")).unwrap();
    let release = releases.next().expect("a release in lib/modules").unwrap().path();
    let read = |name| fs::read_to_string(release.join(name)).unwrap();
    let (dependencies, builtin) = (read("modules.dep"), read("modules.builtin"));
    let mut entries = HashMap::new();
    for line in dependencies.lines() {
        let (path, needs) = line.split_once(':').unwrap();
        entries.insert(name_of(path), (path, needs));
    }
    let mut paths: Vec<&str> = Vec::new();
    for wanted in MODULES.lines() {
        let Some((path, needs)) = entries.get(wanted) else {
            let built_in = builtin.lines().any(|path| name_of(path) == wanted);
            assert!(built_in, "{}: no module {wanted}", release.display());
            continue;
        };
        // modules.dep(5): the last of the line comes first.
        for path in needs.split_whitespace().rev().chain([*path]) {
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
    }
    let module = |path: &&str| Module {
        name: name_of(path),
        content: read_module(&release.join(path)),
    };
    paths.iter().map(module).collect()
}

/// The kernel takes `-` and `_` for the same.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or_default();
    file.split('.').next().unwrap_or_default().replace('-', "_")
}

fn read_module(path: &Path) -> Vec<u8> {
    let stored = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    if path.extension().is_none_or(|extension| extension != "xz") {
        return stored;
    }
    let mut content = Vec::new();
    XzReader::new(&stored[..], true)
        .read_to_end(&mut content)
        .unwrap();
    content
}

fn relative(path: &Path) -> &str {
    path.to_str().unwrap().trim_start_matches('/')
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

    /// Adds `program` and what `ldd` says it needs, with the folders above them.
    fn add_program(&mut self, program: &Path) {
        let output = Command::new("ldd").arg(program).output().unwrap();
        assert!(output.status.success(), "ldd {}: {output:?}", program.display());
        // "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f...)", or the path of the loader alone.
        let text = String::from_utf8(output.stdout).unwrap();
        let libraries = text.split_whitespace().filter(|word| word.starts_with('/'));
        for file in libraries.map(Path::new).chain([program]) {
            for folder in file
                .parent()
                .unwrap()
                .ancestors()
                .collect::<Vec<_>>()
                .iter()
                .rev()
                .skip(1)
            {
                self.add(relative(folder), 0o040_755, &[]);
            }
            self.add(relative(file), 0o100_755, &fs::read(file).unwrap());
        }
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}
