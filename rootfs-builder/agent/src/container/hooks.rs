//! Hooks that run in the guest.
//!
//! Of a container's own hooks these are the two of the container namespace, which libcontainer runs: createContainer, whose
//! program is one of the guest's, and startContainer, whose program is one of the container's. All others are the host's.
//!
//! And those of the guest's image: programs in `guest_hook_path/prestart`, `poststart` and `poststop`, which run for every
//! container, in the guest, outside of the container. They are looked for once, when the sandbox is created.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};
use oci_spec::runtime::{Hook, HookBuilder, Hooks, Spec};

use super::spec::SpecError;

/// Bound of a hook of the guest's image, seconds.
const TIMEOUT: i64 = 30;

/// The hooks of the guest's image.
#[derive(Clone, Debug, Default)]
pub struct GuestHooks {
    prestart: Vec<Hook>,
    /// Run after a container's program has been started.
    pub poststart: Vec<Hook>,
    /// Run after a container has been removed.
    pub poststop: Vec<Hook>,
}

impl GuestHooks {
    /// Those below `folder`. A folder that is missing or has none is warned about: somebody has asked for it.
    pub fn find(folder: &Path) -> Self {
        let hooks = Self {
            prestart: find(folder, "prestart"),
            poststart: find(folder, "poststart"),
            poststop: find(folder, "poststop"),
        };
        if hooks.prestart.is_empty() && hooks.poststart.is_empty() && hooks.poststop.is_empty() {
            tracing::warn!(
                path = %folder.display(),
                "guest_hook_path: no executable in its folders prestart, poststart and poststop"
            );
        }
        hooks
    }

    /// Adds those that libcontainer runs to a container's.
    pub fn add_to(&self, spec: &mut Spec) {
        if self.prestart.is_empty() {
            return;
        }
        let mut hooks = spec.hooks().clone().unwrap_or_default();
        // Deprecated by the specification; Kata's name for the folder.
        #[allow(deprecated)]
        hooks.set_prestart(Some(self.prestart.clone()));
        spec.set_hooks(Some(hooks));
    }
}

/// The programs in `folder/stage`, by their names. Kata's rules: no links, and any bit that lets somebody execute them.
fn find(folder: &Path, stage: &str) -> Vec<Hook> {
    let programs = |folder: &Path| -> io::Result<Vec<PathBuf>> {
        let mut programs = Vec::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            let executable = entry.metadata()?.permissions().mode() & 0o111 != 0;
            if entry.file_type()?.is_file() && executable {
                programs.push(entry.path());
            }
        }
        programs.sort();
        Ok(programs)
    };
    let folder = folder.join(stage);
    let found = match programs(&folder) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            tracing::warn!(path = %folder.display(), %error, "guest hooks");
            Vec::new()
        }
    };
    let hook = |path: PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let args = [name.into_owned(), stage.to_owned()];
        let hook = HookBuilder::default().path(path).args(args).timeout(TIMEOUT);
        // It cannot fail: a path is all that a hook needs.
        hook.build().unwrap_or_default()
    };
    found.into_iter().map(hook).collect()
}

/// Leaves the hooks in `spec` that are the guest's.
///
/// # Errors
/// A program of a createContainer hook is not in the guest.
pub(super) fn keep_guests(spec: &mut Spec) -> Result<(), SpecError> {
    let Some(hooks) = spec.hooks().clone() else {
        return Ok(());
    };
    for hook in hooks.create_container().iter().flatten() {
        access(hook.path(), AccessFlags::X_OK).map_err(|source| SpecError::Hook {
            path: hook.path().clone(),
            source,
        })?;
    }
    let mut kept = Hooks::default();
    kept.set_create_container(hooks.create_container().clone());
    kept.set_start_container(hooks.start_container().clone());
    spec.set_hooks((kept != Hooks::default()).then_some(kept));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(hooks: &str) -> Spec {
        serde_json::from_str(&format!(r#"{{"ociVersion": "1.1.0", "hooks": {hooks}}}"#)).unwrap()
    }

    #[test]
    fn hooks_when_kept_are_the_containers_namespaces() {
        let mut both = spec(
            r#"{"prestart": [{"path": "/a"}], "poststop": [{"path": "/b"}],
            "createContainer": [{"path": "/bin/sh"}], "startContainer": [{"path": "/only/in/the/container"}]}"#,
        );
        keep_guests(&mut both).unwrap();
        let kept = serde_json::to_value(both.hooks()).unwrap();
        let expected = serde_json::json!({"createContainer": [{"path": "/bin/sh"}],
            "startContainer": [{"path": "/only/in/the/container"}]});
        assert_eq!(kept, expected);

        let mut none = spec(r#"{"prestart": [{"path": "/a"}]}"#);
        keep_guests(&mut none).unwrap();
        assert!(none.hooks().is_none());
    }

    #[test]
    fn create_container_hook_when_not_in_the_guest_is_refused_by_name() {
        let mut missing = spec(r#"{"createContainer": [{"path": "/opt/on/the/host"}]}"#);
        let error = keep_guests(&mut missing).unwrap_err().to_string();
        assert!(error.contains("createContainer hook /opt/on/the/host"), "{error}");
        assert!(error.contains("ENOENT"), "{error}");
    }

    #[test]
    fn guest_hooks_when_found_are_programs_in_order() {
        let folder = std::env::temp_dir().join(format!("agent-hooks-{}", std::process::id()));
        for (name, mode) in [("20-b", 0o755), ("10-a", 0o500), ("plain", 0o644)] {
            let path = folder.join("poststart").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::create_dir_all(folder.join("poststart/folder")).unwrap();
        std::os::unix::fs::symlink("/bin/sh", folder.join("poststart/link")).unwrap();

        let hooks = GuestHooks::find(&folder);

        let names: Vec<_> = hooks
            .poststart
            .iter()
            .map(|hook| hook.args().clone().unwrap())
            .collect();
        assert_eq!(names, [["10-a", "poststart"], ["20-b", "poststart"]]);
        assert!(hooks.prestart.is_empty() && hooks.poststop.is_empty());
        fs::remove_dir_all(folder).unwrap();
    }
}
