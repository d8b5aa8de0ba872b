//! Holds the floors of this crate: a module imports only what stands before it in [`FLOORS`].

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The modules of the crate, lowest first.
const FLOORS: &[&str] = &[
    "error",
    "cri",
    "types",
    "paths",
    "timeline",
    "host",
    "config",
    "hypervisor",
    "agent",
    "resource",
    "sandbox",
    "containers",
    "instance",
    "handler",
    "check",
    "features",
];

/// Modules that call the VMM. `check` asks what a host can do before there is a VM.
const KNOW_THE_VMM: &[&str] = &["hypervisor", "check"];

fn floor(module: &str) -> usize {
    FLOORS
        .iter()
        .position(|floor| *floor == module)
        .unwrap_or_else(|| panic!("module {module} has no place in FLOORS"))
}

/// Sources that end up in the library, without their tests: module, path and lines of code.
fn sources() -> Vec<(String, PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let relative = path.strip_prefix(&root).unwrap();
            let first = relative.components().next().unwrap().as_os_str();
            let module = Path::new(first).file_stem().unwrap().to_str().unwrap();
            let only_in_tests = ["tests.rs", "fake.rs", "fuzzing.rs", "layers.rs"].contains(&name);
            if name == "lib.rs" || only_in_tests || relative.iter().any(|part| part == "tests") {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            found.push((module.to_owned(), relative.to_owned(), code(&text)));
        }
    }
    found
}

/// Without comments and without the tests at the end.
fn code(text: &str) -> String {
    let text = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap();
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.map(|line| format!("{line}\n")).collect()
}

/// Modules of this crate that `code` names: `crate::error` and the like.
fn imports(code: &str) -> BTreeSet<&str> {
    code.match_indices("crate::")
        .map(|(at, prefix)| &code[at + prefix.len()..])
        .map(|rest| {
            let end = rest
                .find(|c: char| !c.is_alphanumeric() && c != '_')
                .unwrap_or(rest.len());
            &rest[..end]
        })
        .collect()
}

#[test]
fn modules_when_they_import_look_down() {
    let sources = sources();
    assert!(sources.len() > 30, "the sources are found: {}", sources.len());
    let mut upwards = Vec::new();
    for (module, path, code) in &sources {
        for import in imports(code) {
            if import != module && floor(import) >= floor(module) {
                upwards.push(format!("{} imports {import}", path.display()));
            }
        }
    }
    assert_eq!(upwards, Vec::<String>::new());
}

#[test]
fn vmm_when_it_is_called_is_called_by_the_hypervisor() {
    for (module, path, code) in sources() {
        let knows = code.contains("dragonball::");
        assert!(
            !knows || KNOW_THE_VMM.contains(&module.as_str()),
            "{} calls the VMM past the Hypervisor trait",
            path.display()
        );
    }
}

#[test]
fn crate_when_built_knows_no_containerd_type() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let manifest = fs::read_to_string(manifest).unwrap();
    assert!(manifest.contains("\n[dependencies]\n") && !manifest.contains("containerd"));
}

#[test]
fn imports_when_in_comments_or_tests_do_not_count() {
    let text = "use crate::error::Error;\n// crate::types\nlet x = crate::paths::y;\n\n#[cfg(test)]\nmod tests {\nuse crate::host;\n}\n";
    let code = code(text);
    assert_eq!(imports(&code), BTreeSet::from(["error", "paths"]));
}
