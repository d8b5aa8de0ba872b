//! The floors of the house: each module imports only what lies below it.
//!
//! Reads the sources, because the compiler does not mind circles inside a crate. Tests, and what only tests and fuzzing
//! have, may look at everything.

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

/// Modules of the crate, from the ground up. A new one gets its place here.
const FLOORS: [&str; 20] = [
    "guest_log",
    "interrupted",
    "confinement",
    "descriptors",
    "kvm",
    "lifecycle",
    "rate_limiter",
    "io_loop",
    "memory",
    "bus",
    "irq",
    "acpi",
    "boot",
    "devices",
    "vcpu",
    "config",
    "probe",
    "vm",
    // Only tests and fuzzing have it.
    "fuzzing",
    "lib",
];

/// What all virtio devices share, from the ground up. Above it: the devices, which know neither each other nor a transport,
/// and the transports, which know no device.
const VIRTIO_FLOORS: [&str; 8] = [
    "counter",
    "state",
    "interrupt",
    "device",
    "queue",
    "worker",
    "config",
    "image",
];

/// A source file and what it names of the crate, as paths like `["devices", "virtio", "Interrupt"]`.
struct Source {
    module: Vec<String>,
    names: Vec<Vec<String>>,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut sources = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") && !is_test(&path) {
                let module = module_of(path.strip_prefix(&root).unwrap());
                let names = names(&fs::read_to_string(&path).unwrap(), &module);
                sources.push(Source { module, names });
            }
        }
    }
    assert!(sources.len() > 100, "{} sources found", sources.len());
    sources
}

/// By name: what `#[cfg(test)]` or `cfg(any(test, feature = "fuzzing"))` keeps out of the library.
fn is_test(path: &Path) -> bool {
    let test = |name: &str| {
        name.starts_with("test_")
            || ["tests", "tests.rs", "properties.rs", "fake.rs", "fuzzing"].contains(&name)
            // A network in memory, in place of a TAP.
            || path.ends_with("net/socket.rs")
    };
    path.iter().any(|part| test(&part.to_string_lossy()))
}

fn module_of(relative: &Path) -> Vec<String> {
    let stem = relative.with_extension("");
    let mut module: Vec<String> = stem
        .iter()
        .map(|part| part.to_string_lossy().into_owned())
        .collect();
    if module.last().is_some_and(|last| last == "mod") {
        module.pop();
    }
    module
}

/// Everything `text` names by `crate::` or `super::`, outside of comments and of the tests at its end.
fn names(text: &str, module: &[String]) -> Vec<Vec<String>> {
    let code: String = text
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or_default()
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join("\n");
    let mut names = Vec::new();
    for (root, depth) in [("crate::", None), ("super::", Some(1))] {
        let mut rest = code.as_str();
        while let Some(at) = rest.find(root) {
            let before = rest[..at].chars().next_back();
            rest = &rest[at + root.len()..];
            // `pub(super)` and the second half of `super::super::` are none.
            if before.is_some_and(|c| c.is_alphanumeric() || matches!(c, '_' | ':')) {
                continue;
            }
            let mut depth = depth;
            while let (Some(up), Some(more)) = (depth, rest.strip_prefix("super::")) {
                (depth, rest) = (Some(up + 1), more);
            }
            let base = depth.map_or(&[][..], |up| &module[..module.len().saturating_sub(up)]);
            tree(rest, base.to_vec(), &mut names);
        }
    }
    names
}

/// Follows a use tree or a path; returns what is left after it.
fn tree<'t>(text: &'t str, mut path: Vec<String>, names: &mut Vec<Vec<String>>) -> &'t str {
    let text = text.trim_start();
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = tree(rest, path.clone(), names).trim_start();
            rest = rest.strip_prefix(',').unwrap_or(rest).trim_start();
            if let Some(rest) = rest.strip_prefix('}') {
                return rest;
            }
            assert!(!rest.is_empty(), "a use tree without end");
        }
    }
    let end = text
        .find(|c: char| !c.is_alphanumeric() && c != '_' && c != '*')
        .unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    if !name.is_empty() && name != "self" {
        path.push(name.to_owned());
    }
    if let Some(rest) = rest.strip_prefix("::") {
        return tree(rest, path, names);
    }
    names.push(path);
    let rest = rest.trim_start();
    match rest.strip_prefix("as ") {
        Some(alias) => alias.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_'),
        None => rest,
    }
}

fn floor(name: &str) -> usize {
    FLOORS
        .iter()
        .position(|floor| *floor == name)
        .unwrap_or_else(|| panic!("module {name} has no floor: put it into FLOORS in {}", file!()))
}

#[test]
fn modules_when_they_name_others_name_only_what_lies_below() {
    let mut wrong = Vec::new();
    for source in sources() {
        let own = &source.module[0];
        if own == "lib" {
            continue;
        }
        for name in &source.names {
            let other = &name[0];
            if other != own && floor(other) >= floor(own) {
                wrong.push(format!("{}: {}", source.module.join("::"), name.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A part of `devices/virtio`: `None` for a type that its `mod.rs` shows.
fn part(name: &[String]) -> Option<&str> {
    let part = name.get(2).map(String::as_str)?;
    part.starts_with(|c: char| c.is_lowercase()).then_some(part)
}

#[test]
fn virtio_devices_and_transports_when_they_name_others_do_not_know_each_other() {
    let virtio = |path: &[String]| path.len() > 2 && path[0] == "devices" && path[1] == "virtio";
    let shared = |part: &str| VIRTIO_FLOORS.iter().position(|floor| *floor == part);
    let mut wrong = Vec::new();
    let mut devices = 0;
    for source in sources().iter().filter(|source| virtio(&source.module)) {
        let Some(own) = part(&source.module) else { continue };
        devices += usize::from(source.module.len() == 3 && shared(own).is_none());
        for name in source.names.iter().filter(|name| virtio(name)) {
            let Some(other) = part(name) else { continue };
            let below = match (shared(own), shared(other)) {
                (Some(own), Some(other)) => other <= own,
                (Some(_), None) => false,
                (None, Some(_)) => true,
                (None, None) => own == other,
            };
            // A function of `mod.rs`, not a module.
            if !below && other != "read_space" {
                wrong.push(format!("{}: {}", source.module.join("::"), name.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(devices >= 9, "{devices} devices found");
}

#[test]
fn names_when_trees_nest_are_all_found_and_comments_are_not() {
    let text = "use crate::a::{self, B, c::{D as E, f}};\n// crate::no\npub(super) fn x() { super::super::y::z(); crate::g::h() }\n\
                #[cfg(test)]\nmod tests {\n use crate::no; }";
    let module: Vec<String> = ["p", "q", "r"].map(str::to_owned).to_vec();
    let found: Vec<String> = names(text, &module).iter().map(|name| name.join("::")).collect();
    assert_eq!(found, ["a", "a::B", "a::c::D", "a::c::f", "g::h", "p::y::z"]);
    assert_eq!(
        module_of(&PathBuf::from("devices/virtio/mod.rs")),
        ["devices", "virtio"]
    );
}
