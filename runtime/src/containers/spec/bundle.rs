//! A bundle's `config.json`.

use std::fs;
use std::io;
use std::path::Path;

use oci_spec::runtime::Spec;

use crate::error::{Error, ErrorKind, Result};

/// What a container is to its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerType {
    /// The pause container that stands for the pod.
    PodSandbox,
    /// A container in an existing pod.
    PodContainer,
    /// A container that is its own pod (`ctr run`, `nerdctl run`).
    SingleContainer,
}

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

/// What the annotations of containerd's CRI, CRI-O or dockershim say.
pub fn container_type(spec: &Spec) -> ContainerType {
    let annotations = spec.annotations().as_ref();
    let get = |name: &str| annotations.and_then(|map| map.get(name)).map(String::as_str);
    let text = get("io.kubernetes.cri.container-type")
        .or_else(|| get("io.kubernetes.cri-o.ContainerType"))
        .or_else(|| get("io.kubernetes.docker.type"))
        .or_else(|| get("io.katacontainers.pkg.oci.container_type"));
    match text {
        Some("sandbox" | "podsandbox" | "pod_sandbox") => ContainerType::PodSandbox,
        Some("container" | "pod_container") => ContainerType::PodContainer,
        _ => ContainerType::SingleContainer,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_and_broken_specs_are_named() {
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

    #[test]
    fn container_type_follows_the_annotations() {
        let of = |json: &str| container_type(&serde_json::from_str(json).unwrap());
        assert_eq!(of(r#"{"ociVersion":"1"}"#), ContainerType::SingleContainer);
        assert_eq!(
            of(r#"{"ociVersion":"1","annotations":{"io.kubernetes.cri.container-type":"sandbox"}}"#),
            ContainerType::PodSandbox
        );
        assert_eq!(
            of(r#"{"ociVersion":"1","annotations":{"io.kubernetes.cri-o.ContainerType":"container"}}"#),
            ContainerType::PodContainer
        );
    }
}
