//! The state of a container as hooks get it, on their stdin.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{ContainerState, Spec, StateBuilder};

use crate::error::{Error, ErrorKind, Result};

/// What does not change while the container lives.
#[derive(Debug)]
pub(super) struct State {
    id: String,
    bundle: PathBuf,
    version: String,
    annotations: std::collections::HashMap<String, String>,
}

impl State {
    pub(super) fn new(id: &str, bundle: &Path, spec: &Spec) -> Self {
        Self {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            version: spec.version().clone(),
            annotations: spec.annotations().clone().unwrap_or_default(),
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// As JSON. A container that has stopped has no pid.
    pub(super) fn json(&self, status: ContainerState, pid: Option<u32>) -> Result<String> {
        let failed = |error: &dyn std::fmt::Display| {
            let message = format!("state of container {} for its hooks: {error}", self.id);
            Error::new(ErrorKind::Internal, message)
        };
        let mut state = StateBuilder::default()
            .version(self.version.clone())
            .id(self.id.clone())
            .status(status)
            .bundle(self.bundle.clone())
            .annotations(self.annotations.clone())
            .build()
            .map_err(|error| failed(&error))?;
        // The kernel's ids fit.
        state.set_pid(pid.and_then(|pid| i32::try_from(pid).ok()));
        serde_json::to_string(&state).map_err(|error| failed(&error))
    }
}
