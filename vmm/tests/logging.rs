//! What a guest can cause is logged with a limit: nothing below the machine and its vCPUs writes with `tracing` itself, but for lines an
//! administrator's call causes, or the end of something.
//!
//! Reads the sources, as `layers.rs` does.

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::fs;
use std::path::Path;

/// Files of what a guest can reach, with the number of lines they write without a limit.
const UNLIMITED: [(&str, usize); 6] = [
    // A new limit, a resize, an image or a socket of the configuration.
    ("devices/virtio/net/handle.rs", 1),
    ("devices/virtio/block/device.rs", 1),
    ("devices/virtio/block/disk.rs", 1),
    ("devices/virtio/image.rs", 1),
    ("devices/virtio/vsock/uds.rs", 1),
    // Its thread ends.
    ("memory/pager.rs", 3),
];

fn count(folder: &Path, root: &Path, found: &mut Vec<(String, usize)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            count(&path, root, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let lines = fs::read_to_string(&path).unwrap().matches("tracing::").count();
            let name = path.strip_prefix(root).unwrap().to_string_lossy().into_owned();
            found.push((name, lines));
        }
    }
}

#[test]
fn lines_when_a_guest_can_cause_them_have_a_limit() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    count(&root, &root, &mut found);
    // The rest is the machine itself and what happens before a guest runs.
    let reachable = [
        "devices",
        "memory",
        "irq",
        "bus",
        "acpi",
        "io_loop",
        "rate_limiter",
    ];
    found.retain(|(file, _)| reachable.iter().any(|module| file.starts_with(module)));
    assert!(found.len() > 80, "{} sources found", found.len());
    let mut unlimited: Vec<_> = found.into_iter().filter(|(_, lines)| *lines > 0).collect();
    unlimited.sort();
    let mut expected: Vec<_> = UNLIMITED.map(|(file, lines)| (file.to_owned(), lines)).into();
    expected.sort();
    assert_eq!(
        unlimited, expected,
        "use `guest_log!`, or say here why it need not have a limit"
    );
}
