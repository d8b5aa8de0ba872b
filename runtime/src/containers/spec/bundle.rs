//! A bundle's `config.json`.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

use oci_spec::runtime::Spec;
use serde::de::DeserializeOwned;

use crate::cri::{self, ContainerKind};
use crate::error::{Error, ErrorKind, Result};

/// Reads `config.json` of a container's `bundle`.
///
/// # Errors
/// Naming the file: `NotFound`, or `InvalidArgument` with what is wrong in it.
pub fn load_spec(bundle: &Path) -> Result<Spec> {
    let path = bundle.join(CONFIG);
    let spec: Spec = read(&path)?;
    let args = spec
        .process()
        .as_ref()
        .and_then(|process| process.args().as_ref());
    if args.is_none_or(Vec::is_empty) {
        return Err(invalid(&path, "process.args is missing or empty"));
    }
    Ok(spec)
}

/// Reads `config.json` of a sandbox's `bundle`, which describes no process and which only some clients give.
///
/// # Errors
/// As [`load_spec`]; a missing file is none.
pub fn load_sandbox_spec(bundle: &Path) -> Result<Option<Spec>> {
    match read(&bundle.join(CONFIG)) {
        Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
        read => read,
    }
}

const CONFIG: &str = "config.json";

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).map_err(|error| {
        let kind = match error.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
            _ => ErrorKind::Internal,
        };
        Error::new(kind, format!("{}: {error}", path.display()))
    })?;
    serde_json::from_str(&text).map_err(|error| invalid(path, &error.to_string()))
}

fn invalid(path: &Path, message: &str) -> Error {
    Error::new(
        ErrorKind::InvalidArgument,
        format!("{}: {message}", path.display()),
    )
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
    fn spec_of_a_sandbox_when_missing_is_none() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(load_sandbox_spec(bundle.path()).unwrap(), None);

        let path = bundle.path().join(CONFIG);
        for (text, present) in [("null", false), (r#"{"ociVersion":"1.0.2"}"#, true)] {
            fs::write(&path, text).unwrap();
            assert_eq!(
                load_sandbox_spec(bundle.path()).unwrap().is_some(),
                present,
                "{text}"
            );
        }
        fs::write(&path, "{").unwrap();
        let error = load_sandbox_spec(bundle.path()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::InvalidArgument);
    }

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
