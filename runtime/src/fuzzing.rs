//! Entry functions of the fuzz targets in `runtime/fuzz`: one for each kind of text or message that comes from outside and is
//! read here. Not part of the API.
//!
//! A target fails by a panic (also that of an overflow), a sanitizer's report, or not coming to an end. Nothing is set up, and
//! nothing on the host is changed; a specification may have a file read that it names as /etc/resolv.conf.

// Of tests and fuzzing.
#![allow(clippy::expect_used)]

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use oci_spec::runtime::Spec;
use protobuf::Message;
use protocols::agent::StatsContainerResponse;
use protocols::oci_convert::{spec_from_wire, spec_to_wire};

use crate::agent::logs;
use crate::config::{self, MAX_VCPUS, annotations};
use crate::containers::spec::bundle::container_kind;
use crate::containers::spec::{GuestSpec, amend};
use crate::containers::{pod_stats, stats};
use crate::host::{journal, mountinfo};
use crate::resource::cpu_mem::InitialSizeManager;
use crate::sandbox::SandboxConfig;
use crate::types::RuntimeOptions;

/// Runs one input.
pub type Target = fn(&[u8]);

/// What a target is called and what runs it. A target is also a file in `runtime/fuzz/fuzz_targets` and an entry in its
/// `Cargo.toml`; a test checks that they agree.
pub const TARGETS: &[(&str, Target)] = &[
    ("agent_log", agent_log),
    ("agent_stats", agent_stats),
    ("config", config),
    ("journal", journal),
    ("mountinfo", mountinfo),
    ("spec", spec),
];

/// A line of the agent's log, which is the guest's word.
pub fn agent_log(data: &[u8]) {
    let line = String::from_utf8_lossy(data);
    let (_, text) = logs::parse(line.trim_end());
    // A log event cannot grow without end: what comes out is what went in, with the names of fields and separators.
    assert!(
        text.len() <= line.len() * 6 + 16,
        "{} from {}",
        text.len(),
        line.len()
    );
}

/// Any bytes as the agent's answer to StatsContainer: figures of two containers, then those of their pod.
pub fn agent_stats(data: &[u8]) {
    let Ok(response) = StatsContainerResponse::parse_from_bytes(data) else {
        return;
    };
    let one = stats::convert(response.clone(), true);
    let other = stats::convert(response, false);
    let both = pod_stats::together(&[one.clone(), other]);
    assert!(both.pids_current >= one.pids_current && both.memory.usage >= one.memory.usage);
    assert_eq!(both.network, one.network);
}

/// A configuration file; behind a zero byte lines `name=value`, each an annotation of the pod: of Kata's prefix, and of
/// containerd's for the size of the pod.
pub fn config(data: &[u8]) {
    let mut parts = data.splitn(2, |byte| *byte == 0);
    let options = RuntimeOptions {
        config_body: parts.next().unwrap_or_default().to_vec(),
        ..Default::default()
    };
    let Ok(mut file) = config::load_with(&options, None, &[]) else {
        return;
    };
    let lines = String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let mut annotations = HashMap::new();
    for (name, value) in lines.lines().filter_map(|line| line.split_once('=')) {
        annotations.insert(format!("io.katacontainers.config.{name}"), value.to_owned());
        annotations.insert(format!("io.kubernetes.cri.sandbox-{name}"), value.to_owned());
    }
    if annotations::apply(&mut file, &annotations).is_err() {
        return;
    }
    let mut pod = Spec::default();
    pod.set_annotations(Some(annotations));
    InitialSizeManager::new(&pod).setup_config(&mut file);
    if file.config.validate(&file.origins).is_err() {
        return;
    }
    let hypervisor = &file.config.hypervisor.dragonball;
    let (boot, most) = (hypervisor.boot_vcpus(), hypervisor.max_vcpus());
    assert!(
        (1..=most).contains(&boot) && most <= MAX_VCPUS,
        "{boot} of {most}"
    );
    assert!(hypervisor.virtio_fs_threads() > 0);
    assert!(!hypervisor.kernel_params.contains('\n'));
}

/// Any bytes as the journal of a crashed shim. Nothing is undone.
pub fn journal(data: &[u8]) {
    let entries = journal::entries(Path::new("journal"), data);
    let mut written = Vec::new();
    for undo in &entries {
        // Serde writes no path that is not UTF-8, and reads none.
        written.extend(journal::line_of(undo).expect("it was read from a line"));
    }
    assert_eq!(journal::entries(Path::new("written"), &written), entries);
    // A torn line, the last of a crash, costs none before it.
    written.extend(b"{\"undo\":\"unmo");
    assert_eq!(journal::entries(Path::new("torn"), &written), entries);
}

/// Any bytes as /proc/self/mountinfo: names of mount points are anybody's who can mount.
pub fn mountinfo(data: &[u8]) {
    let points = mountinfo::mount_points(data);
    assert!(points.len() <= data.split(|byte| *byte == b'\n').count());
    let length: usize = points
        .iter()
        .map(|point| point.as_os_str().as_bytes().len())
        .sum();
    assert!(length <= data.len(), "{length} of {}", data.len());
}

/// A `config.json`: what pod it makes, and what the guest gets of it.
pub fn spec(data: &[u8]) {
    let Ok(mut spec) = serde_json::from_slice::<Spec>(data) else {
        return;
    };
    let pod = SandboxConfig::from_spec("fuzzed", &spec);
    assert_eq!(pod.id, "fuzzed");
    let Ok(kind) = container_kind(&spec) else { return };
    let guest = GuestSpec {
        container: "fuzzed".into(),
        rootfs: "/rootfs".into(),
        bundle: "/bundle".into(),
        ..Default::default()
    };
    if amend(&mut spec, guest, &kind).is_err() {
        return;
    }
    let wire = spec_to_wire(&spec);
    if let Ok(back) = spec_from_wire(&wire) {
        assert_eq!(spec_to_wire(&back), wire, "what the agent reads is what was sent");
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn folder() -> &'static Path {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz"))
    }

    fn seeds(target: &str) -> Vec<Vec<u8>> {
        let entries = fs::read_dir(folder().join("seeds").join(target)).unwrap();
        let seeds: Vec<_> = entries
            .map(|entry| fs::read(entry.unwrap().path()).unwrap())
            .collect();
        assert!(!seeds.is_empty(), "{target} has no corpus");
        seeds
    }

    /// Each byte of each seed is once left out, once another one, and once the last: so that no target rots.
    #[test]
    fn targets_when_given_their_corpus_and_what_is_like_it_survive() {
        for (name, target) in TARGETS {
            target(&[]);
            for seed in seeds(name) {
                target(&seed);
                // A few hundred places of a long one.
                for at in (0..seed.len()).step_by(seed.len() / 256 + 1) {
                    let (before, rest) = seed.split_at(at);
                    let (byte, after) = rest.split_first().unwrap();
                    target(before);
                    target(&[before, after].concat());
                    target(&[before, &[byte.wrapping_add(1)], after].concat());
                    target(&[before, &[0xff], after].concat());
                }
            }
        }
    }

    #[test]
    fn targets_when_listed_agree_with_the_fuzz_crate() {
        let manifest = fs::read_to_string(folder().join("Cargo.toml")).unwrap();
        let mut files: Vec<_> = fs::read_dir(folder().join("fuzz_targets"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        assert_eq!(manifest.matches("[[bin]]").count(), files.len());
        for path in &files {
            let name = path.file_stem().unwrap().to_str().unwrap();
            assert!(
                manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")),
                "{name}"
            );
            seeds(name);
        }
        for (name, _) in TARGETS {
            let source = fs::read_to_string(folder().join(format!("fuzz_targets/{name}.rs"))).unwrap();
            assert!(
                source.contains(&format!("runtime::fuzzing::{name}(data)")),
                "{name}"
            );
        }
    }
}
