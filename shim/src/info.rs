//! `-info`: what containerd ≥ 2.0 asks before it uses the runtime.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use runtime::error::{Error, ErrorKind, Result};

use crate::{options, version};

/// The answer, encoded. `stdin` holds the runtime options as an `Any`, or nothing.
///
/// # Errors
/// `InvalidArgument` when stdin does not decode.
pub fn info(stdin: &[u8]) -> Result<Vec<u8>> {
    let any = Any::parse_from_bytes(stdin)
        .map_err(|error| Error::new(ErrorKind::InvalidArgument, format!("options on stdin: {error}")))?;
    options::decode(Some(&any))?;
    let message = RuntimeInfo {
        name: version::RUNTIME_TYPE.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: version::VERSION.to_owned(),
            revision: version::REVISION.to_owned(),
            ..Default::default()
        }),
        options: MessageField::from_option((!stdin.is_empty()).then_some(any)),
        ..Default::default()
    };
    message
        .write_to_bytes()
        .map_err(|error| Error::new(ErrorKind::Internal, format!("encoding RuntimeInfo: {error}")))
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
        // containerd ≥ 2.2 takes "containerd.io/runtime-allow-mounts" as a promise to mount erofs and loop files ourselves.
        assert!(info.annotations.is_empty());
    }

    #[test]
    fn info_when_options_are_garbage_is_refused() {
        assert_eq!(info(b"\x0a\xff").unwrap_err().kind, ErrorKind::InvalidArgument);
    }
}
