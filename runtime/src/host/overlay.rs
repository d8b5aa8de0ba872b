//! Overlay mounts with more layers than a page of options holds.
//!
//! mount(2) takes one page of options, about 53 of containerd's layer paths; overlayfs takes 500 layers. So the folders
//! are opened, and the options name them by descriptor, relative to the thread's own folder of descriptors: four bytes
//! a layer, on every kernel, wherever the layers are.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Longest option string of mount(2): the kernel copies one page and ends it with a NUL (fs/namespace.c,
/// `copy_mount_options`).
pub const MAX_OPTIONS: usize = 4095;

/// Mounts an overlay on `target` whose `options` (comma separated, as for mount(2)) may be longer than [`MAX_OPTIONS`].
///
/// # Errors
/// What opening a layer or mounting said.
pub fn mount_long(source: &str, target: &Path, flags: MsFlags, options: &str) -> io::Result<()> {
    let target = std::path::absolute(target)?;
    let (short, layers) = by_descriptor(options)?;
    let source = source.to_owned();
    // The working folder belongs to the process: use a thread that has one of its own.
    let mounter = std::thread::Builder::new()
        .name("overlay".into())
        .spawn(move || {
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::chdir("/proc/thread-self/fd")?;
            mount(
                Some(source.as_str()),
                &target,
                Some("overlay"),
                flags,
                Some(short.as_str()),
            )
        })?;
    let mounted = mounter.join().unwrap_or(Err(nix::Error::EIO));
    drop(layers);
    Ok(mounted?)
}

/// `options` with every folder replaced by the number of its descriptor, and the descriptors.
fn by_descriptor(options: &str) -> io::Result<(String, Vec<File>)> {
    let mut layers = Vec::new();
    let mut open = |path: &str| -> io::Result<String> {
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC)
            .open(path)
            .map_err(|error| io::Error::new(error.kind(), format!("layer {path}: {error}")))?;
        let name = file.as_raw_fd().to_string();
        layers.push(file);
        Ok(name)
    };
    let mut short = Vec::new();
    for option in split_unescaped(options, ',') {
        short.push(match option.split_once('=') {
            Some(("lowerdir", paths)) => {
                let names: io::Result<Vec<_>> = split_unescaped(paths, ':')
                    .into_iter()
                    .map(|path| open(&unescape(path)))
                    .collect();
                format!("lowerdir={}", names?.join(":"))
            }
            Some((key @ ("upperdir" | "workdir"), path)) => format!("{key}={}", open(&unescape(path))?),
            _ => option.to_owned(),
        });
    }
    Ok((short.join(","), layers))
}

/// Splits at `separator`, except after a backslash (overlayfs.rst: colons and commas of paths are escaped).
fn split_unescaped(text: &str, separator: char) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut begin, mut escaped) = (0, false);
    for (index, character) in text.char_indices() {
        if character == separator && !escaped {
            parts.push(&text[begin..index]);
            begin = index + separator.len_utf8();
        }
        escaped = character == '\\' && !escaped;
    }
    parts.push(&text[begin..]);
    parts
}

fn unescape(path: &str) -> String {
    let mut characters = path.chars();
    let mut plain = String::with_capacity(path.len());
    while let Some(character) = characters.next() {
        plain.push(match character {
            '\\' => characters.next().unwrap_or('\\'),
            other => other,
        });
    }
    plain
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::host::mounts::{mount_request, remove_tree};
    use crate::types::Mount;

    /// `count` layers with paths as long as containerd's, each with a file of its own, on a tmpfs: a layer on another
    /// overlay may not be allowed.
    fn layers(folder: &Path, count: usize) -> Vec<String> {
        let tmpfs = Mount {
            fs_type: "tmpfs".into(),
            source: "tmpfs".into(),
            ..Default::default()
        };
        mount_request(&tmpfs, folder).unwrap();
        let layer = |number: usize| {
            let name = format!("io.containerd.snapshotter.v1.overlayfs/snapshots/with:colon,{number}/fs");
            let path = folder.join(name);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join(format!("file{number}")), number.to_string()).unwrap();
            path.display().to_string().replace(':', "\\:").replace(',', "\\,")
        };
        (0..count).map(layer).collect()
    }

    #[test]
    fn overlay_when_of_120_layers_has_the_files_of_all() {
        let folder = tempfile::tempdir().unwrap();
        let lower = layers(folder.path(), 120);
        for name in ["upper", "work", "target"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let path = |name: &str| folder.path().join(name).display().to_string();
        let target = folder.path().join("target");
        let request = Mount {
            fs_type: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                format!("lowerdir={}", lower.join(":")),
                format!("upperdir={}", path("upper")),
                format!("workdir={}", path("work")),
            ],
            ..Default::default()
        };
        assert!(request.options.join(",").len() > 2 * MAX_OPTIONS);

        mount_request(&request, &target).unwrap();

        for number in [0, 52, 119] {
            let text = fs::read_to_string(target.join(format!("file{number}"))).unwrap();
            assert_eq!(text, number.to_string());
        }
        fs::write(target.join("new"), "x").unwrap();
        assert!(folder.path().join("upper/new").exists());
        remove_tree(&target).unwrap();
        crate::host::mounts::unmount_below(folder.path()).unwrap();
    }

    #[test]
    fn overlay_when_a_layer_is_missing_names_it() {
        let error = by_descriptor("lowerdir=/:/nonexistent/layer,volatile").unwrap_err();
        assert!(error.to_string().contains("/nonexistent/layer"), "{error}");
    }

    #[test]
    fn overlay_options_when_escaped_are_not_split() {
        assert_eq!(split_unescaped("a\\,b,c", ','), ["a\\,b", "c"]);
        assert_eq!(unescape("a\\,b\\\\c"), "a,b\\c");
        let (short, layers) = by_descriptor("volatile,lowerdir=/:/tmp,index=off").unwrap();
        assert_eq!(layers.len(), 2);
        let lower = format!("{}:{}", layers[0].as_raw_fd(), layers[1].as_raw_fd());
        assert_eq!(short, format!("volatile,lowerdir={lower},index=off"));
    }
}
