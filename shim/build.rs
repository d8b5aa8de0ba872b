//! Generates the messages that containerd-shim-protos lacks, and records the revision for `-version`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

use ttrpc_codegen::Codegen;

/// Files of protos/.
const MESSAGES: [&str; 4] = ["cri", "runc_options", "runtimeoptions", "streaming"];
/// Lints that generated code does not keep to. It unwraps descriptors of its own messages.
const GENERATED: &str = "missing_docs, clippy::semicolon_if_nothing_returned, clippy::unwrap_used";

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    Codegen::new()
        .inputs(MESSAGES.map(|name| format!("protos/{name}.proto")))
        .include("protos")
        .rust_protobuf()
        .out_dir(&out)
        .run()?;
    // A generated file starts with inner attributes, so it must be a module file: options.rs, pod.rs and streaming_service.rs
    // include such a line.
    for name in MESSAGES {
        let line = format!("#[allow({GENERATED})]\nmod {name};\n");
        std::fs::write(out.join(format!("wire_{name}.rs")), line)?;
        println!("cargo::rerun-if-changed=protos/{name}.proto");
    }

    // A tarball without git builds too: its revision is "unknown".
    println!(
        "cargo::rustc-env=SHIM_REVISION={}",
        revision().as_deref().unwrap_or("unknown")
    );
    for file in ["../.git/HEAD", "../.git/logs/HEAD"] {
        if Path::new(file).exists() {
            println!("cargo::rerun-if-changed={file}");
        }
    }
    Ok(())
}

fn revision() -> Option<String> {
    let output = Command::new("git")
        .args(["rev-parse", "--short=12", "HEAD"])
        .output()
        .ok()?;
    let revision = String::from_utf8(output.stdout).ok()?;
    (output.status.success() && !revision.trim().is_empty()).then(|| revision.trim().to_owned())
}
