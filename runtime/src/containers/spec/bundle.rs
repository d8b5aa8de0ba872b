//! A bundle's `config.json`.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

use oci_spec::runtime::Spec;

use crate::cri::{self, ContainerKind};
use crate::error::{Error, ErrorKind, Result};

/// Reads `config.json` of `bundle`.
///
/// # Errors
/// Naming the file: `NotFound`, or `InvalidArgument` with what is wrong in it.
pub fn load_spec(bundle: &Path) -> Result<Spec> {
    let path = bundle.join("config.json");
    let text = fs::read_to_string(&path).map_err(|error| {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
            _ => ErrorKind::Internal,
        };
        Error::new(kind, format!("{}: {error}", path.display()))
    })?;
    let invalid = |message: String| {
        Error::new(
            ErrorKind::InvalidArgument,
            format!("{}: {message}", path.display()),
        )
    };
    let spec: Spec = serde_json::from_str(&text).map_err(|error| invalid(error.to_string()))?;
    let args = spec
        .process()
        .as_ref()
        .and_then(|process| process.args().as_ref());
    if args.is_none_or(Vec::is_empty) {
        return Err(invalid("process.args is missing or empty".into()));
    }
    Ok(spec)
}

/// What the spec's annotations say the container is to its pod.
///
/// # Errors
/// `InvalidArgument` for a member that does not say of which pod.
pub fn container_kind(spec: &Spec) -> Result<ContainerKind> {
    let none = HashMap::new();
    cri::kind(spec.annotations().as_ref().unwrap_or(&none))
        .map_err(|error| Error::new(ErrorKind::InvalidArgument, format!("config.json: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spec_when_missing_or_broken_is_named() {
        let bundle = tempfile::tempdir().unwrap();
        let path = bundle.path().join("config.json").display().to_string();

        let error = load_spec(bundle.path()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::NotFound);
        assert!(error.message.starts_with(&path), "{error}");

        for text in [
            "{",
            "[]",
            r#"{"ociVersion":"1.0.2"}"#,
            r#"{"ociVersion":"1","process":{"cwd":"/","args":[]}}"#,
        ] {
            fs::write(bundle.path().join("config.json"), text).unwrap();
            let error = load_spec(bundle.path()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::InvalidArgument, "{text}");
            assert!(error.message.starts_with(&path), "{error}");
        }
    }
}
