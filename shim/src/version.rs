//! Names and version of the binary.

/// Name of the binary.
pub const NAME: &str = "containerd-shim-kata-v2";

/// Runtime type as users write it: `ctr run --runtime io.containerd.kata.v2`.
pub const RUNTIME_TYPE: &str = "io.containerd.kata.v2";

/// Version of the release.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Git revision the binary was built from; `unknown` outside a checkout.
pub const REVISION: &str = env!("SHIM_REVISION");

/// What `-version` prints.
pub fn text() -> String {
    format!(
        "{NAME}:\n  Version: {VERSION}\n  Revision: {REVISION}\n  Runtime type: {RUNTIME_TYPE}\n  Runtime: {}\n",
        runtime::handler::version()
    )
}
