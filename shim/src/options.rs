//! The options of the runtime class: which configuration it asks for. They come with the create request of a container, and
//! for a sandbox on stdin of `start`.

use protobuf::Message;
use protobuf::well_known_types::any::Any;
use runtime::error::{Error, ErrorKind, Result};
use runtime::types::RuntimeOptions;

include!(concat!(env!("OUT_DIR"), "/wire_runc_options.rs"));
include!(concat!(env!("OUT_DIR"), "/wire_runtimeoptions.rs"));

/// Message name; some containerd releases put a host or package in front of it.
const OPTIONS: &str = "runtimeoptions.v1.Options";
/// runc's, which `ctr`, docker and containerd's client library send to any runtime.
const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";

/// Whether `any` holds options of the runtime.
pub fn is_options(any: &Any) -> bool {
    any.type_url.ends_with(OPTIONS)
}

/// Reads the options; none is fine.
///
/// # Errors
/// `InvalidArgument` when the value does not decode.
pub fn decode(any: Option<&Any>) -> Result<RuntimeOptions> {
    let Some(any) = any.filter(|any| !any.type_url.is_empty() || !any.value.is_empty()) else {
        return Ok(RuntimeOptions::default());
    };
    if any.type_url.ends_with(RUNC_OPTIONS) {
        let runc: runc_options::Options = parse(any)?;
        if runc.special_fields.unknown_fields().iter().next().is_some() {
            tracing::warn!(type_url = %any.type_url, "of runc's options only the cgroup of the shim is honoured");
        }
        return Ok(RuntimeOptions {
            shim_cgroup: runc.shim_cgroup,
            ..RuntimeOptions::default()
        });
    }
    if !is_options(any) {
        tracing::warn!(type_url = %any.type_url, "options of another runtime ignored");
        return Ok(RuntimeOptions::default());
    }
    let options: runtimeoptions::Options = parse(any)?;
    Ok(RuntimeOptions {
        config_path: options.config_path,
        config_body: options.config_body,
        shim_cgroup: String::new(),
    })
}

fn parse<M: Message>(any: &Any) -> Result<M> {
    M::parse_from_bytes(&any.value).map_err(|error| {
        Error::new(
            ErrorKind::InvalidArgument,
            format!("options {}: {error}", any.type_url),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(type_url: &str, value: &[u8]) -> Any {
        Any {
            type_url: type_url.to_owned(),
            value: value.to_vec(),
            ..Default::default()
        }
    }

    #[test]
    fn options_when_of_any_type_url_have_the_path() {
        // Field 2 (config_path), length 2, "/c"; field 3 (config_body), length 1, "x".
        let value = b"\x12\x02/c\x1a\x01x";
        for url in [
            "runtimeoptions.v1.Options",
            "cri.runtimeoptions.v1.Options",
            "type.googleapis.com/runtimeoptions.v1.Options",
        ] {
            let options = decode(Some(&any(url, value))).unwrap();

            assert_eq!(
                (options.config_path.as_str(), options.config_body.as_slice()),
                ("/c", &b"x"[..]),
                "{url}"
            );
        }
    }

    #[test]
    fn options_when_absent_or_foreign_are_the_default() {
        assert_eq!(decode(None).unwrap(), RuntimeOptions::default());
        assert_eq!(decode(Some(&Any::new())).unwrap(), RuntimeOptions::default());
        assert_eq!(
            decode(Some(&any("some.other.Options", b"\x08\x01"))).unwrap(),
            RuntimeOptions::default()
        );
    }

    #[test]
    fn options_when_runcs_have_the_cgroup_of_the_shim() {
        // Field 1 (no_pivot_root), true; field 3 (shim_cgroup), length 2, "/s".
        let options = decode(Some(&any("containerd.runc.v1.Options", b"\x08\x01\x1a\x02/s"))).unwrap();

        assert_eq!(options.shim_cgroup, "/s");
        assert_eq!(
            (options.config_path.as_str(), options.config_body.is_empty()),
            ("", true)
        );
    }

    #[test]
    fn options_when_garbage_are_an_invalid_argument() {
        let error = decode(Some(&any(OPTIONS, b"\x12\xff"))).unwrap_err();

        assert_eq!(error.kind, ErrorKind::InvalidArgument);
        assert!(error.message.contains(OPTIONS), "{error}");
    }
}
