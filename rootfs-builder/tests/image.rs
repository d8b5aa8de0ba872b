//! The image as `rootfs-builder` writes it: what is in it, that it is the same every time, and what it says when it
//! cannot be made.

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

/// A scratch folder that goes away.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "rootfs-builder-test-{}-{}",
            std::process::id(),
            NUMBER.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A 64-bit ELF header with one program header of type `kind`: 1 is PT_LOAD, 3 is PT_INTERP.
fn elf(kind: u8) -> Vec<u8> {
    let mut bytes = vec![0; 120];
    bytes[..5].copy_from_slice(b"\x7fELF\x02");
    bytes[32] = 64;
    bytes[54] = 56;
    bytes[56] = 1;
    bytes[64] = kind;
    bytes
}

fn build(agent: &Path, output: &Path, more: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rootfs-builder"))
        .arg("--agent")
        .arg(agent)
        .arg("--output")
        .arg(output)
        .args(more)
        .output()
        .unwrap()
}

/// Names in a cpio archive, by cpio itself.
fn list(image: &Path) -> Vec<String> {
    let output = Command::new("cpio")
        .args(["-it", "--quiet"])
        .stdin(fs::File::open(image).unwrap())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect()
}

/// A kernel package with three modules, one compressed, one needing another, one built in.
fn kernel(scratch: &Scratch) -> PathBuf {
    let base = "kernel/lib/modules/6.1.0-test";
    scratch.file(&format!("{base}/kernel/virtio.ko"), b"virtio");
    let xz = Command::new("sh")
        .args(["-c", "printf fuse | xz --check=crc32 -c"])
        .output()
        .unwrap();
    scratch.file(&format!("{base}/kernel/fuse.ko.xz"), &xz.stdout);
    scratch.file(&format!("{base}/kernel/virtio-mmio.ko"), b"mmio");
    let dependencies = "kernel/virtio-mmio.ko: kernel/virtio.ko\nkernel/virtio.ko:\nkernel/fuse.ko.xz:\n";
    scratch.file(&format!("{base}/modules.dep"), dependencies.as_bytes());
    scratch.file(&format!("{base}/modules.builtin"), b"kernel/fs/ext4/ext4.ko\n");
    scratch.0.join("kernel")
}

#[test]
fn initramfs_when_built_twice_is_the_same_and_complete() {
    let scratch = Scratch::new();
    let agent = scratch.file("agent", &elf(1));
    let [one, two] = ["one", "two"].map(|name| scratch.0.join(name));

    for output in [&one, &two] {
        let run = build(&agent, output, &[]);
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        assert!(
            String::from_utf8_lossy(&run.stdout).contains("image"),
            "sizes are printed"
        );
    }

    assert!(fs::read(&one).unwrap() == fs::read(&two).unwrap());
    assert_eq!(
        list(&one),
        ["dev", "dev/console", "dev/null", "init", "newroot", "proc", "sys"]
    );
}

#[test]
fn erofs_when_built_twice_is_the_same() {
    let scratch = Scratch::new();
    let agent = scratch.file("agent", &elf(1));
    let [one, two] = ["one", "two"].map(|name| scratch.0.join(name));

    for output in [&one, &two] {
        let run = build(&agent, output, &["--format", "erofs"]);
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        std::thread::sleep(std::time::Duration::from_millis(1100));
    }

    assert!(fs::read(&one).unwrap() == fs::read(&two).unwrap());
    let magic = fs::read(&one).unwrap()[1024..1028].to_vec();
    assert_eq!(magic, 0xe0f5_e1e2_u32.to_le_bytes());
}

#[test]
fn modules_when_asked_for_come_unpacked_with_dependencies_in_load_order() {
    let scratch = Scratch::new();
    let agent = scratch.file("agent", &elf(1));
    let kernel = kernel(&scratch);
    let image = scratch.0.join("image");

    let run = build(
        &agent,
        &image,
        &[
            "--modules",
            kernel.to_str().unwrap(),
            "--module-list",
            "virtio_mmio,fuse,ext4",
        ],
    );

    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let names = list(&image);
    assert!(
        names.contains(&"lib/modules/6.1.0-test/kernel/fuse.ko".to_owned()),
        "{names:?}"
    );
    let bytes = fs::read(&image).unwrap();
    let contains = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
    assert!(contains(
        b"kernel/virtio.ko\nkernel/virtio-mmio.ko\nkernel/fuse.ko\n"
    ));
    assert!(!contains(b"\xfd7zXZ"));
}

#[test]
fn image_when_it_cannot_be_made_says_why_in_one_line_and_leaves_nothing() {
    let scratch = Scratch::new();
    let good = scratch.file("agent", &elf(1));
    let dynamic = scratch.file("dynamic", &elf(3));
    let text = scratch.file("text", b"#!/bin/sh");
    let kernel = kernel(&scratch);
    let kernel = kernel.to_str().unwrap();
    let missing = scratch.0.join("missing");
    let image = scratch.0.join("image");

    let cases: [(&Path, &[&str], &str); 5] = [
        (&missing, &[], "missing: No such file or directory"),
        (&text, &[], "text: not a 64-bit ELF file"),
        (&dynamic, &[], "dynamic: linked dynamically"),
        (
            &good,
            &["--modules", kernel, "--module-list", "frob"],
            "kernel module frob: neither in",
        ),
        (
            &good,
            &["--modules", kernel, "--kernel-release", "9.9"],
            "9.9/modules.dep: No such file",
        ),
    ];
    for (agent, more, expected) in cases {
        let run = build(agent, &image, more);
        let error = String::from_utf8(run.stderr).unwrap();
        assert!(!run.status.success());
        assert!(error.contains(expected), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(!image.exists());
    }
}
