//! `-info`: what containerd ≥ 2.0 asks before it uses the runtime.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use runtime::error::{Error, ErrorKind, Result};
use runtime::features::{self, features};

use crate::{options, version};

/// Type of the features; containerd looks for exactly this.
const FEATURES_TYPE_URL: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Tells containerd ≥ 2.2 which mounts of a root filesystem it need not make itself.
const MOUNTS_ANNOTATION: &str = "containerd.io/runtime-allow-mounts";

/// The answer, encoded. `stdin` holds the runtime options as an `Any`, or nothing.
///
/// # Errors
/// `InvalidArgument` when stdin does not decode.
pub fn info(stdin: &[u8]) -> Result<Vec<u8>> {
    let any = Any::parse_from_bytes(stdin)
        .map_err(|error| Error::new(ErrorKind::InvalidArgument, format!("options on stdin: {error}")))?;
    options::decode(Some(&any))?;
    let failed = |error: &dyn std::fmt::Display| {
        Error::new(ErrorKind::Internal, format!("encoding RuntimeInfo: {error}"))
    };
    let features = Any {
        type_url: FEATURES_TYPE_URL.to_owned(),
        value: serde_json::to_vec(&features()).map_err(|error| failed(&error))?,
        ..Default::default()
    };
    let message = RuntimeInfo {
        name: version::RUNTIME_TYPE.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: version::VERSION.to_owned(),
            revision: version::REVISION.to_owned(),
            ..Default::default()
        }),
        options: MessageField::from_option((!stdin.is_empty()).then_some(any)),
        features: MessageField::some(features),
        annotations: [(MOUNTS_ANNOTATION.to_owned(), features::MOUNT_TYPES.to_owned())].into(),
        ..Default::default()
    };
    message.write_to_bytes().map_err(|error| failed(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_when_asked_names_runtime_and_version() {
        let info = RuntimeInfo::parse_from_bytes(&info(b"").unwrap()).unwrap();

        assert_eq!(info.name, "io.containerd.kata.v2");
        assert_eq!(
            (info.version.version.as_str(), info.options.is_none()),
            (version::VERSION, true)
        );
    }

    #[test]
    fn info_when_asked_has_features_and_mounts() {
        let info = RuntimeInfo::parse_from_bytes(&info(b"").unwrap()).unwrap();

        assert_eq!(
            info.features.type_url,
            "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
        );
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        assert_eq!(features["linux"]["cgroup"]["v2"], true);
        // A promise: what is named here, this runtime mounts itself.
        let mounts = info.annotations.get("containerd.io/runtime-allow-mounts");
        assert_eq!(mounts.map(String::as_str), Some("mkdir/*"));
    }

    #[test]
    fn info_when_options_are_garbage_is_refused() {
        assert_eq!(info(b"\x0a\xff").unwrap_err().kind, ErrorKind::InvalidArgument);
    }
}
