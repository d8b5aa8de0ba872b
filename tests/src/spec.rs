//! A container from a config.json of a test's own: for what `ctr` has no flag for.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::case::{Case, Container};
use crate::image;

/// Writes the config.json of a busybox container with `hooks` that runs `script`, for `ctr run --config`, and makes its rootfs; both are
/// in a folder of the test's.
///
/// # Panics
/// When a file cannot be written.
#[track_caller]
pub fn write(case: &Case, container: &Container<'_>, script: &str, hooks: &Value) -> PathBuf {
    let folder = case.folder(container.id());
    let root = folder.join("rootfs");
    fs::create_dir_all(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    image::unpack(&case.daemon().settings.busybox, &root)
        .unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    let namespaces = ["pid", "ipc", "uts", "mount", "network"].map(|kind| json!({"type": kind}));
    let mount = |kind: &str, at: &str| json!({"destination": at, "type": kind, "source": kind});
    let config = json!({
        "ociVersion": "1.0.2",
        "root": {"path": root},
        "process": {
            "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}, "args": ["sh", "-c", script],
        },
        "hooks": hooks,
        "mounts": [mount("proc", "/proc"), mount("tmpfs", "/dev")],
        "linux": {
            "namespaces": namespaces.to_vec(),
            "cgroupsPath": format!("/{}/{}", case.daemon().namespace(), container.id()),
        },
    });
    let path = folder.join("config.json");
    fs::write(&path, config.to_string()).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    path
}
