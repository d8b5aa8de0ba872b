use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::*;
use crate::error::{Error, ErrorKind};
use crate::types::RuntimeOptions;

fn body(text: &str) -> Result<ConfigFile, ConfigError> {
    let options = RuntimeOptions {
        config_body: text.as_bytes().to_vec(),
        ..Default::default()
    };
    let file = load_with(&options, None, &[])?;
    file.config.validate(&file.origins)?;
    Ok(file)
}

fn message(text: &str) -> String {
    let error = Error::from(body(text).expect_err(text));
    assert_eq!(error.kind, ErrorKind::InvalidArgument, "{error}");
    assert!(!error.message.contains('\n'), "one line: {error}");
    error.message
}

#[test]
fn shipped_file_when_loaded_is_the_defaults() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/configuration-dragonball.toml");
    let options = RuntimeOptions {
        config_path: path.display().to_string(),
        ..Default::default()
    };

    let file = load_with(&options, None, &[]).unwrap();

    assert_eq!(file.warnings, Vec::<String>::new());
    let mut expected = TomlConfig::default();
    expected.hypervisor.dragonball.image = Some(DEFAULT_IMAGE.into());
    assert_eq!(file.config, expected);
    file.config.validate(&file.origins).unwrap();
}

#[test]
fn defaults_apply_when_nothing_is_found() {
    let missing = Path::new("/nonexistent/configuration.toml");

    let file = load_with(&RuntimeOptions::default(), None, &[missing]).unwrap();

    assert_eq!(file.config, TomlConfig::default());
    assert_eq!(
        file.config.hypervisor.dragonball.boot_asset(),
        BootAsset::Image(DEFAULT_IMAGE.into())
    );
}

#[test]
fn search_when_several_are_given_prefers_body_options_environment() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, memory: u32| -> PathBuf {
        let path = folder.path().join(name);
        fs::write(
            &path,
            format!("[hypervisor.dragonball]\ndefault_memory = {memory}\n"),
        )
        .unwrap();
        path
    };
    let (named, environment, listed) = (write("a.toml", 201), write("b.toml", 202), write("c.toml", 203));
    let mut options = RuntimeOptions {
        config_path: named.display().to_string(),
        config_body: b"[hypervisor.dragonball]\ndefault_memory = 200\n".to_vec(),
        ..RuntimeOptions::default()
    };
    let memory = |options: &RuntimeOptions, environment: Option<&Path>| {
        let file = load_with(options, environment, &[Path::new("/nonexistent"), &listed]).unwrap();
        file.config.hypervisor.dragonball.default_memory
    };

    assert_eq!(memory(&options, Some(&environment)), 200);
    options.config_body.clear();
    assert_eq!(memory(&options, Some(&environment)), 201);
    options.config_path.clear();
    assert_eq!(memory(&options, Some(&environment)), 202);
    assert_eq!(memory(&options, None), 203);
}

#[test]
fn file_when_named_and_missing_is_not_found() {
    let options = RuntimeOptions {
        config_path: "/nonexistent/kata.toml".into(),
        ..Default::default()
    };

    let error = Error::from(load_with(&options, None, &[]).unwrap_err());

    assert_eq!(error.kind, ErrorKind::NotFound);
    assert_eq!(
        error.message,
        "configuration /nonexistent/kata.toml: no such file"
    );
}

#[test]
fn drop_ins_when_several_apply_in_order_and_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("configuration.toml");
    let drop_ins = folder.path().join("config.d");
    fs::create_dir(&drop_ins).unwrap();
    fs::write(
        &base,
        "[hypervisor.dragonball]\ndefault_memory = 512\nkernel_params = \"a\"\n",
    )
    .unwrap();
    fs::write(
        drop_ins.join("50-b.toml"),
        "[hypervisor.dragonball]\ndefault_memory = 3\n",
    )
    .unwrap();
    fs::write(
        drop_ins.join("10-a.toml"),
        "[hypervisor.dragonball]\ndefault_memory = 1024\n",
    )
    .unwrap();
    fs::write(drop_ins.join("99-z.conf"), "not toml").unwrap();
    let options = RuntimeOptions {
        config_path: base.display().to_string(),
        ..Default::default()
    };

    let file = load_with(&options, None, &[]).unwrap();

    assert_eq!(file.config.hypervisor.dragonball.default_memory, 3);
    assert_eq!(file.config.hypervisor.dragonball.kernel_params, "a");
    let error = file.config.validate(&file.origins).unwrap_err().to_string();
    assert!(
        error.contains("50-b.toml") && error.contains("default_memory = 3"),
        "{error}"
    );
}

#[test]
fn keys_when_unknown_or_unusable_are_named() {
    let file = body(
        "[hypervisor.dragonball]\ndefault_memroy = 1\nenable_hugepages = true\ndisable_seccomp = false\n\
         [hypervisor.qemu]\npath = \"/usr/bin/qemu\"\n[runtime]\nuse_passfd_io = false\n[agent.kata.mem_agent]\n\
         mem_agent_enable = true\n[hypervisor.dragonball.factory]\nenable_template = true\n",
    )
    .unwrap();

    let all = file.warnings.join("\n");
    for expected in [
        "unknown key hypervisor.dragonball.default_memroy",
        "hypervisor.dragonball.enable_hugepages = true has no effect",
        "unknown key hypervisor.qemu",
        "runtime.use_passfd_io = false has no effect",
        "mem_agent_enable",
        "enable_template",
    ] {
        assert!(all.contains(expected), "{expected} in\n{all}");
    }
    assert!(!all.contains("disable_seccomp"), "harmless value: {all}");
}

#[test]
fn values_when_bad_name_key_value_and_range() {
    let table = "[hypervisor.dragonball]\n";
    for (line, expected) in [
        ("default_vcpus = 0", "default_vcpus = 0: must be 1 to 254"),
        ("default_vcpus = 300", "default_vcpus = 300: must be 1 to 254"),
        (
            "disable_seccomp = true\nseccomp_log_only = true",
            "seccomp_log_only = true: needs filters: disable_seccomp must be false",
        ),
        (
            "default_vcpus = 4\ndefault_maxvcpus = 2",
            "must not exceed default_maxvcpus = 2",
        ),
        (
            "default_maxvcpus = 1000",
            "default_maxvcpus = 1000: must be 0 (the host's) to 254",
        ),
        (
            "default_memory = 8",
            "default_memory = 8: must be 64 to 1048576 MiB",
        ),
        (
            "image = \"/a\"\ninitrd = \"/b\"",
            "image = \"/a\": and initrd exclude each other",
        ),
        ("kernel_params = \"a\\nb\"", "must be one line"),
    ] {
        let text = message(&format!("{table}{line}\n"));
        assert!(text.contains(expected), "{text}");
        assert!(
            text.starts_with("configuration of the create request: hypervisor.dragonball."),
            "{text}"
        );
    }
}

#[test]
fn words_when_unknown_name_line_key_and_what_is_allowed() {
    for (text, expected) in [
        (
            "[hypervisor.dragonball]\nshared_fs = \"virtio-9p\"\n",
            "hypervisor.dragonball.shared_fs = \"virtio-9p\": must be one of inline-virtio-fs, virtio-fs",
        ),
        (
            "[hypervisor.dragonball]\nvirtio_fs_cache = \"some\"\n",
            "hypervisor.dragonball.virtio_fs_cache = \"some\": must be one of never, auto, always",
        ),
        (
            "[hypervisor.dragonball]\ncpu_template = \"T2\"\n",
            "hypervisor.dragonball.cpu_template = \"T2\": must be one of none, x86-64-v2, x86-64-v3, x86-64-v4",
        ),
        (
            "[runtime]\nhypervisor_name = \"qemu\"\n",
            "runtime.hypervisor_name = \"qemu\": must be one of dragonball",
        ),
    ] {
        let expected = format!("configuration of the create request, line 2: {expected}");
        assert_eq!(message(text), expected);
    }
}

#[test]
fn files_when_malformed_name_the_line() {
    let text = message("[hypervisor.dragonball]\ndefault_memory = [\n");
    assert!(text.contains("line 2") || text.contains("line 3"), "{text}");
    let text = message("[hypervisor.dragonball]\nenable_nested_virtualization = \"yes\"\n");
    assert!(
        text.contains("line 2") && text.contains("expected a boolean"),
        "{text}"
    );
    let text = message("[hypervisor.dragonball]\n\ndefault_memory = \"much\"\n");
    assert!(text.contains("line 3") && text.contains("expected u64"), "{text}");
}

#[test]
fn assets_when_missing_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("vmlinux");
    let mut file = body(&format!(
        "[hypervisor.dragonball]\nkernel = {kernel:?}\ninitrd = \"/nonexistent/initrd\"\n"
    ))
    .unwrap();

    let error = Error::from(
        file.config
            .hypervisor
            .dragonball
            .check_assets(&file.origins)
            .unwrap_err(),
    );
    assert_eq!(error.kind, ErrorKind::NotFound);
    assert!(error.message.contains(&kernel.display().to_string()), "{error}");

    fs::write(&kernel, "x").unwrap();
    let error = file
        .config
        .hypervisor
        .dragonball
        .check_assets(&file.origins)
        .unwrap_err()
        .to_string();
    assert!(error.contains("initrd = \"/nonexistent/initrd\""), "{error}");

    file.config.hypervisor.dragonball.initrd = Some(folder.path().into());
    let error = file
        .config
        .hypervisor
        .dragonball
        .check_assets(&file.origins)
        .unwrap_err()
        .to_string();
    assert!(error.contains("is a directory"), "{error}");
}

#[test]
fn sizes_when_fractional_round_up_in_range() {
    let mut config = HypervisorConfig {
        default_vcpus: 1.2,
        ..Default::default()
    };
    assert_eq!(config.boot_vcpus(), 2);
    config.default_maxvcpus = 1;
    assert_eq!(config.max_vcpus(), 2, "never below the boot count");
    config.default_vcpus = -1.0;
    assert!(config.boot_vcpus() >= 1);
    config.virtio_fs_extra_args = vec!["--thread-pool-size=4".into()];
    assert_eq!(config.virtio_fs_threads(), 4);
}

fn annotated(text: &str, annotations: &[(&str, &str)]) -> (ConfigFile, Vec<String>) {
    let mut file = body(text).unwrap();
    let annotations: HashMap<String, String> = annotations
        .iter()
        .map(|(name, value)| (format!("io.katacontainers.config.{name}"), (*value).to_owned()))
        .collect();
    let warnings = annotations::apply(&mut file, &annotations).unwrap();
    (file, warnings)
}

#[test]
fn annotations_when_not_allowed_are_warned_about() {
    let (file, warnings) = annotated(
        "",
        &[
            ("hypervisor.default_vcpus", "4"),
            ("hypervisor.default_memory", "4096"),
            ("hypervisor.kernel_params", "foo=bar"),
            ("hypervisor.kernel", "/evil"),
            ("hypervisor.machine_type", "q35"),
            ("agent.enable_tracing", "true"),
            ("runtime.create_container_timeout", "60"),
        ],
    );

    let hypervisor = &file.config.hypervisor.dragonball;
    assert_eq!((hypervisor.default_vcpus, hypervisor.default_memory), (4.0, 4096));
    assert_eq!(hypervisor.kernel_params, "foo=bar");
    assert_eq!(hypervisor.kernel, Path::new("/usr/share/kata-containers/vmlinux"));
    assert_eq!(file.config.agent.kata.create_container_timeout, 60);
    let all = warnings.join("\n");
    assert!(
        all.contains("hypervisor.kernel is not in enable_annotations"),
        "{all}"
    );
    assert!(
        all.contains("hypervisor.machine_type is not in enable_annotations"),
        "{all}"
    );
    assert!(all.contains("agent.enable_tracing has no effect"), "{all}");
    assert_eq!(warnings.len(), 3, "{all}");
}

#[test]
fn enable_annotations_when_a_pattern_matches_allows() {
    let (file, warnings) = annotated(
        "[hypervisor.dragonball]\nenable_annotations = [\".*\"]\ninitrd = \"/initrd\"\n",
        &[
            ("hypervisor.image", "/pod.img"),
            ("hypervisor.kernel", "/pod.kernel"),
        ],
    );

    assert!(warnings.is_empty(), "{warnings:?}");
    assert_eq!(
        file.config.hypervisor.dragonball.boot_asset(),
        BootAsset::Image("/pod.img".into())
    );
    assert_eq!(file.config.hypervisor.dragonball.kernel, Path::new("/pod.kernel"));
    assert!(file.config.validate(&file.origins).is_ok());
}

#[test]
fn annotation_when_its_value_is_bad_is_named() {
    let mut file = body("").unwrap();
    let name = "io.katacontainers.config.hypervisor.default_memory";
    let annotations = HashMap::from([(name.to_owned(), "lots".to_owned())]);
    let error = annotations::apply(&mut file, &annotations)
        .unwrap_err()
        .to_string();
    assert!(error.contains(name) && error.contains("\"lots\""), "{error}");

    let annotations = HashMap::from([(name.to_owned(), "1".to_owned())]);
    annotations::apply(&mut file, &annotations).unwrap();
    let error = file.config.validate(&file.origins).unwrap_err().to_string();
    assert!(error.starts_with(&format!("annotation {name}: ")), "{error}");
}

#[test]
fn seccomp_when_a_pod_asks_cannot_be_switched_off() {
    let on = "[runtime]\ndisable_guest_seccomp = false\n";
    let (file, warnings) = annotated(on, &[("runtime.disable_guest_seccomp", "true")]);
    assert!(!file.config.runtime.disable_guest_seccomp);
    assert_eq!(warnings.len(), 1);

    let (file, _) = annotated("", &[("runtime.disable_guest_seccomp", "false")]);
    assert!(!file.config.runtime.disable_guest_seccomp);
}

#[test]
fn disable_new_netns_when_interfaces_are_asked_for_too_is_refused() {
    for text in [
        "[runtime]\ndisable_new_netns = true\n",
        "[runtime]\ndisable_new_netns = true\ninternetworking_model = \"macvtap\"\n",
    ] {
        let message = message(text);
        assert!(
            message.contains("runtime.disable_new_netns") && message.contains("internetworking_model"),
            "{message}"
        );
    }
    let file = body("[runtime]\ndisable_new_netns = true\ninternetworking_model = \"none\"\n").unwrap();
    assert!(file.config.runtime.disable_new_netns);
    assert_eq!(file.warnings, Vec::<String>::new());

    let (file, warnings) = annotated(
        "",
        &[
            ("runtime.disable_new_netns", "true"),
            ("runtime.internetworking_model", "none"),
        ],
    );
    assert_eq!(warnings, Vec::<String>::new());
    assert!(file.config.runtime.disable_new_netns);
    file.config.validate(&file.origins).unwrap();
}

/// Code of the runtime without tests, apart from the parts of the configuration that only write it down.
fn code_that_acts() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut folders, mut code) = (vec![root], String::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() {
                folders.push(path);
            } else if !["tests.rs", "validate.rs", "annotations.rs", "inert.rs"].contains(&name) {
                let text = fs::read_to_string(&path).unwrap();
                code.push_str(text.split("#[cfg(test)]\nmod tests {").next().unwrap());
            }
        }
    }
    code
}

/// Keys whose only use is that a value other than what this runtime does is refused.
const ONE_CHOICE: [&str; 4] = [
    "hypervisor.dragonball.shared_fs",
    "runtime.name",
    "runtime.hypervisor_name",
    "runtime.agent_name",
];

#[test]
fn keys_when_in_the_shipped_file_reach_code_that_acts_on_them() {
    let text = include_str!("../../config/configuration-dragonball.toml");
    // Keys that are shown as comments count, too.
    let text = text.replace("\n# initrd = ", "\ninitrd = ");
    let shipped: toml::Table = text.parse().unwrap();
    // A chain of calls may be broken into lines.
    let code: String = code_that_acts().split_whitespace().collect();
    let reads = |owners: &[&str], key: &str| {
        owners.iter().any(|owner| {
            let field = format!("{owner}.{key}");
            code.match_indices(&field).any(|(at, _)| {
                let rest = &code[at + field.len()..];
                // A longer name, or a value being given to it, is no reading.
                !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_')
                    && (!rest.starts_with('=') || rest.starts_with("=="))
            })
        })
    };
    let mut keys = Vec::new();
    for (section, owners) in [
        ("hypervisor.dragonball", &["self", "config", "hypervisor"][..]),
        ("hypervisor.dragonball.factory", &["factory"]),
        ("agent.kata", &["self", "config", "kata"]),
        ("runtime", &["runtime"]),
    ] {
        let table = section
            .split('.')
            .fold(&shipped, |table, part| table[part].as_table().unwrap());
        for (key, _) in table.iter().filter(|(_, value)| !value.is_table()) {
            keys.push((format!("{section}.{key}"), reads(owners, key)));
        }
    }
    assert!(keys.len() > 30, "{keys:?}");
    let annotated = "hypervisor.dragonball.enable_annotations";
    let unread: Vec<_> = keys
        .iter()
        .filter(|(key, read)| !read && !ONE_CHOICE.contains(&key.as_str()) && key != annotated)
        .collect();
    assert_eq!(unread, Vec::<&(String, bool)>::new());
}

#[test]
fn keys_when_no_longer_honoured_are_named() {
    let file =
        body("[agent.kata]\ndial_timeout_ms = 20\n[hypervisor.dragonball.factory]\ntemplate_path = \"/x\"\n")
            .unwrap();
    let all = file.warnings.join("\n");
    assert!(
        all.contains("agent.kata.dial_timeout_ms = 20 has no effect"),
        "{all}"
    );
    assert!(all.contains("template_path = \"/x\" has no effect"), "{all}");

    let kata = "[agent.kata]\ndial_timeout_ms = 10\n[hypervisor.dragonball.factory]\n\
                template_path = \"/run/vc/vm/template\"\n";
    assert_eq!(
        body(kata).unwrap().warnings,
        Vec::<String>::new(),
        "Kata's shipped values"
    );
}
