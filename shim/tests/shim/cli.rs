//! The command line, without a sandbox.

use std::process::Command;

use crate::harness::{SHIM, failure, run, stderr, stdout};
use containerd_shim_protos::types::introspection::RuntimeInfo;
use protobuf::Message;

fn shim(words: &[&str], stdin: &[u8]) -> std::process::Output {
    let mut command = Command::new(SHIM);
    command.args(words);
    run(command, stdin)
}

#[test]
fn version_when_asked_names_program_revision_and_runtime() {
    for flag in ["-v", "-version", "--version"] {
        let output = shim(&[flag], b"");

        assert!(output.status.success());
        let text = stdout(&output);
        for part in [
            "containerd-shim-kata-v2",
            env!("CARGO_PKG_VERSION"),
            "Revision: ",
            "io.containerd.kata.v2",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(stderr(&output), "");
    }
}

#[test]
fn help_when_asked_lists_the_flags() {
    let output = shim(&["-help"], b"");

    assert!(output.status.success() && stdout(&output).contains("-publish-binary"));
}

#[test]
fn info_when_asked_is_protobuf() {
    // Any{type_url: "runtimeoptions.v1.Options", value: Options{config_path: "/c"}}
    let stdin = b"\x0a\x19runtimeoptions.v1.Options\x12\x04\x12\x02/c";

    let output = shim(&["-info"], stdin);

    let info = RuntimeInfo::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!(
        (info.name.as_str(), info.options.type_url.as_str()),
        ("io.containerd.kata.v2", "runtimeoptions.v1.Options")
    );
    assert_eq!(stderr(&output), "");
}

#[test]
fn command_line_when_unusable_fails_with_one_line() {
    let cases: [(&[&str], &str); 5] = [
        (&["-id"], "containerd-shim-kata-v2: flag -id needs a value"),
        (
            &["-namespace", "n", "-id", "i", "restart"],
            "unknown action \"restart\"",
        ),
        (&["-namespace", "n", "start"], "action start needs flag -id"),
        (
            &["-namespace", "n", "-id", "a/b", "start"],
            "flag -id: \"a/b\" is not a containerd identifier",
        ),
        (&["-namespace", "n", "-id", "i"], "run i: no socket to serve"),
    ];
    for (words, message) in cases {
        let output = shim(words, b"");

        assert!(failure(&output).contains(message), "{output:?}");
    }
}

#[test]
fn flag_when_unknown_is_only_a_warning() {
    let output = shim(&["-frobnicate", "-version"], b"");

    assert!(output.status.success());
    assert_eq!(
        stderr(&output),
        "containerd-shim-kata-v2: unknown flag -frobnicate ignored\n"
    );
}
