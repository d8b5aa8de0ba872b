//! Generates the wire messages and ttrpc stubs (async client and server) into `OUT_DIR`. No protoc needed.

use std::path::PathBuf;
use std::{env, fs, io};

const PROTOS: [&str; 5] = ["agent", "csi", "health", "oci", "types"];
const SERVICES: [&str; 2] = ["agent", "health"];
/// Lints that generated code does not keep to. It unwraps descriptors of its own messages.
const GENERATED: &str = "missing_docs, clippy::semicolon_if_nothing_returned, clippy::unwrap_used";

fn main() -> io::Result<()> {
    let out_dir =
        PathBuf::from(env::var_os("OUT_DIR").ok_or_else(|| io::Error::other("OUT_DIR is not set"))?);
    let inputs: Vec<String> = PROTOS.iter().map(|name| format!("protos/{name}.proto")).collect();
    for input in &inputs {
        println!("cargo::rerun-if-changed={input}");
    }
    ttrpc_codegen::Codegen::new()
        .out_dir(&out_dir)
        .include("protos")
        .inputs(&inputs)
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            ..Default::default()
        })
        .run()?;

    // The generated files start with inner attributes, so they can only be compiled as files of their own:
    // lib.rs includes this list of `mod` items and the compiler finds the files beside it.
    let modules = PROTOS.iter().map(|name| (*name).to_owned());
    let stubs = SERVICES.iter().map(|name| format!("{name}_ttrpc"));
    let list: String = modules
        .chain(stubs)
        .map(|name| format!("#[allow({GENERATED})]\npub mod {name};\n"))
        .collect();
    fs::write(out_dir.join("modules.rs"), list)
}
