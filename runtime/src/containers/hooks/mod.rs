//! OCI hooks: programs that the runtime runs at fixed points of a container's life.
//!
//! Where each runs follows from the specification's two places. What it calls the runtime namespace is the host, as far as a
//! hook looks at the container from outside; what it calls the container namespace is in the guest:
//!
//! | hook | where | when |
//! |---|---|---|
//! | prestart, createRuntime | host, network of the host | during Create, the rootfs is mounted, the pod's network namespace exists |
//! | createContainer | guest, the container's namespaces | by libcontainer, before the guest's pivot_root |
//! | startContainer | guest, inside of the container | by libcontainer, before the program is executed |
//! | poststart | host | the program runs |
//! | poststop | host | the container is deleted ([`super::poststop`]) |
//!
//! A hook of the host's gets the container's state on its stdin, with the pid of a thread that is in the pod's network
//! namespace ([`super::host_pid`]): what a CNI plugin or libnetwork puts into `/proc/PID/ns/net` is found when the network is
//! scanned again, at Start.
//!
//! Failures are runc's: prestart and createRuntime fail the Create, which undoes everything; poststart fails the Start, and
//! the container is killed; poststop's are logged and the next one runs. Whoever has got as far as running a hook has
//! its poststop hooks run, once.

mod run;
mod state;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::runtime::{ContainerState, Hook, Hooks, LinuxNamespaceType, Spec};

use self::state::State;
use super::host_pid::HostPid;
use super::poststop::{Poststop, Records};
use crate::error::{Error, ErrorKind, Result};
use crate::host::blocking;
use crate::sandbox::{namespace, place_of};

pub(super) use run::run;

/// The hooks of a container that run on the host.
#[derive(Debug, Clone)]
pub(super) struct HostHooks {
    hooks: Arc<Hooks>,
    state: Arc<State>,
    records: Records,
}

/// A list of hooks, by its name in config.json.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Prestart,
    CreateRuntime,
    CreateContainer,
    StartContainer,
    Poststart,
    Poststop,
}

impl Stage {
    const ALL: [Self; 6] = [
        Self::Prestart,
        Self::CreateRuntime,
        Self::CreateContainer,
        Self::StartContainer,
        Self::Poststart,
        Self::Poststop,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Prestart => "prestart",
            Self::CreateRuntime => "createRuntime",
            Self::CreateContainer => "createContainer",
            Self::StartContainer => "startContainer",
            Self::Poststart => "poststart",
            Self::Poststop => "poststop",
        }
    }

    fn of(self, hooks: &Hooks) -> &[Hook] {
        // Deprecated by the specification, and what Docker's networking uses.
        #[allow(deprecated)]
        let list = match self {
            Self::Prestart => hooks.prestart(),
            Self::CreateRuntime => hooks.create_runtime(),
            Self::CreateContainer => hooks.create_container(),
            Self::StartContainer => hooks.start_container(),
            Self::Poststart => hooks.poststart(),
            Self::Poststop => hooks.poststop(),
        };
        list.as_deref().unwrap_or_default()
    }
}

/// A hook as errors and the log name it.
fn name(stage: &str, number: usize, hook: &Hook) -> String {
    format!("{stage} hook #{number} {}", hook.path().display())
}

/// Refuses hooks that cannot be run anywhere. To be asked before a VM is booted for them.
///
/// # Errors
/// `InvalidArgument` naming the hook and its field.
pub(super) fn check(spec: &Spec) -> Result<()> {
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    for stage in Stage::ALL {
        for (number, hook) in stage.of(hooks).iter().enumerate() {
            let refused = |why: String| {
                let name = name(stage.name(), number, hook);
                Err(Error::new(ErrorKind::InvalidArgument, format!("{name}: {why}")))
            };
            if !hook.path().is_absolute() {
                return refused("its path must be absolute".into());
            }
            if let Some(timeout) = hook.timeout().filter(|timeout| *timeout <= 0) {
                return refused(format!("timeout {timeout}: must be greater than 0 seconds"));
            }
            let env = hook.env().iter().flatten();
            if let Some(entry) = env.clone().find(|entry| !entry.contains('=')) {
                return refused(format!("env {entry:?}: must be NAME=VALUE"));
            }
            if env
                .chain(hook.args().iter().flatten())
                .any(|text| text.contains('\0'))
            {
                return refused("args and env must not contain a NUL byte".into());
            }
        }
    }
    Ok(())
}

/// Takes those hooks out of `spec` that are not the guest's.
pub(super) fn leave_to_guest(spec: &mut Spec) {
    let guests = spec.hooks().as_ref().map(|hooks| {
        let mut guests = Hooks::default();
        guests.set_create_container(hooks.create_container().clone());
        guests.set_start_container(hooks.start_container().clone());
        guests
    });
    spec.set_hooks(guests.filter(|hooks| *hooks != Hooks::default()));
}

/// A network namespace for a pod whose spec asks for one without saying where, and whose hooks are to fill it: nerdctl's
/// and Docker's way. Nobody else could put anything into it. It stays as long as the pid that is returned.
///
/// # Errors
/// Of [`HostPid::park_in_new_netns`].
pub(crate) fn netns_for_hooks(spec: &Spec) -> Result<Option<HostPid>> {
    let fills = spec.hooks().as_ref().is_some_and(|hooks| {
        let fillers = [Stage::Prestart, Stage::CreateRuntime];
        fillers.iter().any(|stage| !stage.of(hooks).is_empty())
    });
    let network = namespace(spec, LinuxNamespaceType::Network);
    let has_its_own = network.is_some_and(|network| place_of(network).is_none());
    (fills && has_its_own)
        .then(HostPid::park_in_new_netns)
        .transpose()
}

impl HostHooks {
    /// Those of container `id`, whose spec is `spec` and whose sandbox' state folder is `state_folder`; `None` when there
    /// are none.
    pub(super) fn of(id: &str, bundle: &Path, spec: &Spec, state_folder: PathBuf) -> Option<Self> {
        let hooks = spec.hooks().as_ref()?;
        let on_host = [
            Stage::Prestart,
            Stage::CreateRuntime,
            Stage::Poststart,
            Stage::Poststop,
        ];
        if on_host.iter().all(|stage| stage.of(hooks).is_empty()) {
            return None;
        }
        Some(Self {
            hooks: Arc::new(hooks.clone()),
            state: Arc::new(State::new(id, bundle, spec)),
            records: Records::of(&state_folder),
        })
    }

    /// Runs prestart, then createRuntime, with `pid` as the container's; from now on its poststop hooks are due.
    ///
    /// # Errors
    /// Of the first hook that fails; the others do not run.
    pub(super) async fn create(&self, pid: &HostPid) -> Result<()> {
        self.note_poststop().await?;
        for stage in [Stage::Prestart, Stage::CreateRuntime] {
            self.run_all(stage, ContainerState::Creating, pid).await?;
        }
        Ok(())
    }

    /// Runs poststart.
    ///
    /// # Errors
    /// Of the first hook that fails; the others do not run.
    pub(super) async fn started(&self, pid: &HostPid) -> Result<()> {
        self.run_all(Stage::Poststart, ContainerState::Running, pid).await
    }

    /// Runs poststop, if it is due and has not been run.
    pub(super) async fn stopped(&self) {
        let (records, id) = (self.records.clone(), self.state.id().to_owned());
        let taken = blocking("poststop hooks", move || Ok(records.take(&id))).await;
        match taken {
            Ok(Some(poststop)) => poststop.run().await,
            Ok(None) => {}
            Err(error) => tracing::error!(container = self.state.id(), %error, "poststop hooks do not run"),
        }
    }

    async fn note_poststop(&self) -> Result<()> {
        let hooks = Stage::Poststop.of(&self.hooks);
        if hooks.is_empty() {
            return Ok(());
        }
        let poststop = Poststop {
            container: self.state.id().to_owned(),
            bundle: self.state.bundle().to_owned(),
            hooks: hooks.to_vec(),
            state: self.state.json(ContainerState::Stopped, None)?,
        };
        let records = self.records.clone();
        blocking("poststop hooks", move || records.write(&poststop)).await
    }

    async fn run_all(&self, stage: Stage, status: ContainerState, pid: &HostPid) -> Result<()> {
        let hooks = stage.of(&self.hooks);
        if hooks.is_empty() {
            return Ok(());
        }
        let state = self.state.json(status, Some(pid.tid()))?;
        for (number, hook) in hooks.iter().enumerate() {
            let name = name(stage.name(), number, hook);
            run(hook, self.state.bundle(), state.as_bytes())
                .await
                .map_err(|error| Error::from(error).context(&name))?;
            tracing::debug!(container = self.state.id(), "{name}");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
