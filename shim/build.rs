//! Generates the messages that containerd-shim-protos lacks, and records the revision for `-version`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

use ttrpc_codegen::Codegen;

const PROTOS: [&str; 3] = [
    "protos/runc_options.proto",
    "protos/runtimeoptions.proto",
    "protos/streaming.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    Codegen::new()
        .inputs(PROTOS)
        .include("protos")
        .rust_protobuf()
        .out_dir(&out)
        .run()?;
    // A generated file starts with inner attributes, so it must be a module file: options.rs includes the one line,
    // streaming_service.rs the other.
    let modules = [
        ("wire.rs", &["runc_options", "runtimeoptions"][..]),
        ("streaming_wire.rs", &["streaming"][..]),
    ];
    for (file, modules) in modules {
        let lines = modules.iter().map(|module| format!("#[allow(missing_docs)]\nmod {module};\n"));
        std::fs::write(out.join(file), lines.collect::<String>())?;
    }
    for proto in PROTOS {
        println!("cargo::rerun-if-changed={proto}");
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
