//! Configurations that cannot work, and those that can although something in them is unknown.

use crate::refusal::{
    assert_no_panic, assert_refused_with, begin, begin_with_linux_guests, configuration, file_of,
    with_hypervisor_key, write,
};

const INVALID: &str = "invalid argument";
const NOT_FOUND: &str = "not found";

/// One key changed to a value that is refused.
#[track_caller]
fn refuses(name: &str, key: &str, value: impl Into<toml::Value>, code: &str, words: &[&str]) {
    let Some(case) = begin(name) else { return };
    let config = write(&case, &with_hypervisor_key(key, value));
    assert_refused_with(&case, &config, code, words);
}

#[test]
fn kernel_when_missing_is_named() {
    refuses(
        "no-kernel",
        "kernel",
        "/nowhere/vmlinux",
        NOT_FOUND,
        &["kernel", "/nowhere/vmlinux"],
    );
}

#[test]
fn image_when_missing_is_named() {
    refuses(
        "no-image",
        "image",
        "/nowhere/agent.erofs",
        NOT_FOUND,
        &["image", "/nowhere/agent.erofs"],
    );
}

#[test]
fn kernel_when_truncated_is_named() {
    let Some(case) = begin_with_linux_guests("short-kernel") else {
        return;
    };
    let whole = std::fs::read(file_of("kernel")).unwrap();
    let short = case.daemon().dir().join("short-vmlinux");
    std::fs::write(&short, whole.get(..whole.len() / 3).unwrap()).unwrap();
    let name = short.display().to_string();
    let config = write(&case, &with_hypervisor_key("kernel", name.clone()));
    assert_refused_with(&case, &config, INVALID, &["kernel", &name]);
}

#[test]
fn kernel_when_only_its_header_is_left_is_named() {
    let Some(case) = begin_with_linux_guests("header-kernel") else {
        return;
    };
    let whole = std::fs::read(file_of("kernel")).unwrap();
    let short = case.daemon().dir().join("header-vmlinux");
    std::fs::write(&short, whole.get(..40).unwrap()).unwrap();
    let name = short.display().to_string();
    let config = write(&case, &with_hypervisor_key("kernel", name.clone()));
    assert_refused_with(&case, &config, INVALID, &["kernel", &name]);
}

#[test]
fn kernel_when_empty_is_named() {
    let Some(case) = begin_with_linux_guests("empty-kernel") else {
        return;
    };
    let empty = case.daemon().dir().join("empty-vmlinux");
    std::fs::write(&empty, "").unwrap();
    let name = empty.display().to_string();
    let config = write(&case, &with_hypervisor_key("kernel", name.clone()));
    assert_refused_with(&case, &config, INVALID, &["kernel", &name]);
}

/// Another file as the kernel.
#[track_caller]
fn refuses_kernel(name: &str, file: &str) {
    let Some(case) = begin_with_linux_guests(name) else {
        return;
    };
    let config = write(&case, &with_hypervisor_key("kernel", file));
    assert_refused_with(&case, &config, INVALID, &["kernel", file]);
}

#[test]
fn kernel_when_it_is_no_kernel_is_named() {
    refuses_kernel("no-elf", "/etc/passwd");
}

#[test]
fn kernel_when_it_is_another_program_is_named() {
    // An ELF file, but not one to boot.
    refuses_kernel("other-elf", "/bin/sh");
}

#[test]
fn memory_when_below_the_minimum_is_refused() {
    refuses(
        "little-memory",
        "default_memory",
        16,
        INVALID,
        &["default_memory", "16"],
    );
}

#[test]
fn memory_when_zero_is_refused() {
    refuses(
        "no-memory",
        "default_memory",
        0,
        INVALID,
        &["default_memory", "0"],
    );
}

#[test]
fn vcpus_when_zero_are_refused() {
    refuses("no-vcpus", "default_vcpus", 0, INVALID, &["default_vcpus", "0"]);
}

#[test]
fn vcpus_when_too_many_are_refused() {
    refuses(
        "many-vcpus",
        "default_vcpus",
        100_000,
        INVALID,
        &["default_vcpus", "100000"],
    );
}

#[test]
fn configuration_when_not_toml_is_refused_with_its_line() {
    let Some(case) = begin("no-toml") else { return };
    let config = write(
        &case,
        "[hypervisor.dragonball]\nkernel = \"/x\ndefault_vcpus = 1\n",
    );
    let name = config.display().to_string();
    assert_refused_with(&case, &config, INVALID, &[&name, "line 2"]);
}

#[test]
fn configuration_when_type_is_wrong_names_the_line() {
    refuses(
        "wrong-type",
        "default_memory",
        "plenty",
        INVALID,
        &["bad.toml", "line ", "plenty"],
    );
}

#[test]
fn configuration_when_missing_is_named() {
    let Some(case) = begin("no-config") else { return };
    let config = case.daemon().dir().join("absent.toml");
    let name = config.display().to_string();
    assert_refused_with(&case, &config, NOT_FOUND, &[&name]);
}

#[test]
fn annotation_when_value_is_invalid_is_named() {
    let Some(case) = begin("bad-annotation") else {
        return;
    };
    let container = case.container();
    let annotation = "io.katacontainers.config.hypervisor.default_memory=lots";
    let done = container
        .run(&["true"])
        .flag("--rm")
        .option("--annotation", annotation)
        .output();
    crate::refusal::assert_refusal(&done, INVALID, &["default_memory", "lots"]);
    assert_no_panic(&case);
}

#[test]
fn configuration_when_a_key_is_unknown_works_and_warns() {
    let Some(case) = begin_with_linux_guests("unknown-key") else {
        return;
    };
    let mut table = configuration();
    table.insert("colour".to_owned(), "red".into());
    let table = table
        .to_string()
        .replace("[hypervisor.dragonball]", "[hypervisor.dragonball]\nflavour = 3");
    let config = write(&case, &table);
    let container = case.container();
    let run = container.run(&["echo", "works"]).flag("--rm");
    let done = run
        .option("--runtime-config-path", &config.display().to_string())
        .output()
        .expect_code(0);
    assert_eq!(done.out(), "works\n");
    let log = std::fs::read_to_string(case.daemon().log()).unwrap();
    for key in ["colour", "flavour"] {
        let warned = log
            .lines()
            .any(|l| l.contains(key) && l.contains("unknown") && l.contains("level=warn"));
        assert!(warned, "no warning names {key}");
    }
}
