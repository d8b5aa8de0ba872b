//! What containerd may ask of a shim's sandbox, one typed method for each call of its Sandbox service.
//!
//! A sandbox that is created here has no container that stands for it: it lives from `start_sandbox` until
//! `stop_sandbox`, or until its VM dies, whatever its containers do. What it has to say about itself and about its
//! containers, it says until `shutdown_sandbox`.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;

use super::{Instance, RuntimeHandlerManager};
use crate::containers::load_sandbox_spec;
use crate::error::{Error, ErrorKind, Result};
use crate::instance::{Life, RuntimeInstance};
use crate::sandbox::{Sandbox, SandboxConfig, SandboxEnd, SandboxState, SandboxStatus};
use crate::types::{ContainerStats, CreateSandboxRequest, StartedSandbox};

/// Serves the requests about the one sandbox of a shim process.
///
/// Errors: `NotFound` for another sandbox than the shim's, `AlreadyExists` for a step that was done, `FailedPrecondition`
/// for one whose turn has not come or is over. Whoever calls a method that changes something drives it to its end; only
/// waiting may be given up.
#[async_trait]
pub trait SandboxHandler: Send + Sync + 'static {
    /// Makes a sandbox that waits for its start. Nothing runs yet.
    async fn create_sandbox(&self, request: CreateSandboxRequest) -> Result<()>;
    /// Boots it; containers can be created afterwards.
    async fn start_sandbox(&self, id: &str) -> Result<StartedSandbox>;
    /// Ends the VM and its containers within `timeout`, if there is one, and takes away what the sandbox has on the host.
    /// Idempotent.
    async fn stop_sandbox(&self, id: &str, timeout: Option<Duration>) -> Result<()>;
    /// Waits for the end: a stop, or the death of the VM.
    async fn wait_sandbox(&self, id: &str) -> Result<SandboxEnd>;
    /// What is known about it.
    async fn sandbox_status(&self, id: &str) -> Result<SandboxStatus>;
    /// Whether it runs.
    async fn ping_sandbox(&self, id: &str) -> Result<()>;
    /// Figures of all its containers together.
    async fn stats_sandbox(&self, id: &str) -> Result<ContainerStats>;
    /// Stops it if need be and lets the shim end.
    async fn shutdown_sandbox(&self, id: &str) -> Result<()>;
}

#[async_trait]
impl SandboxHandler for RuntimeHandlerManager {
    async fn create_sandbox(&self, request: CreateSandboxRequest) -> Result<()> {
        self.check_sandbox_id(&request.sandbox_id)?;
        if !self.enter_creating() {
            return match *self.instance.borrow() {
                Instance::Ended => Err(self.wrong_state("has ended")),
                _ => Err(self.done_already("exists")),
            };
        }
        let made = self.make_sandbox(request).await;
        let next = made
            .as_ref()
            .map_or(Instance::None, |made| Instance::Made(made.clone()));
        self.instance.send_replace(next);
        made.map(drop)
    }

    async fn start_sandbox(&self, id: &str) -> Result<StartedSandbox> {
        self.check_sandbox_id(id)?;
        let instance = self.enter_starting()?;
        let started = instance.sandbox.start().await;
        if started.is_err() {
            instance.wind_down().await;
        }
        self.instance.send_replace(Instance::Ready(instance.clone()));
        started?;
        Ok(StartedSandbox {
            pid: std::process::id(),
            created_at: instance.sandbox.ready_since().unwrap_or_else(SystemTime::now),
        })
    }

    async fn stop_sandbox(&self, id: &str, timeout: Option<Duration>) -> Result<()> {
        self.check_sandbox_id(id)?;
        if matches!(*self.instance.borrow(), Instance::None) {
            return Err(self.wrong_state("has not been created"));
        }
        let Some(timeout) = timeout else {
            self.stop_instance().await;
            return Ok(());
        };
        // Given up, half an end would be left: it goes on, and the next stop waits for it.
        match tokio::time::timeout(timeout, self.stop_instance()).await {
            Ok(()) => Ok(()),
            Err(_) => {
                let message = format!("sandbox {id} has not ended {timeout:?} after it was told to");
                Err(Error::new(ErrorKind::DeadlineExceeded, message))
            }
        }
    }

    async fn wait_sandbox(&self, id: &str) -> Result<SandboxEnd> {
        let sandbox = self.instance_of(id)?.sandbox.clone();
        sandbox.wait().await
    }

    async fn sandbox_status(&self, id: &str) -> Result<SandboxStatus> {
        self.instance_of(id)?.sandbox.status().await
    }

    async fn ping_sandbox(&self, id: &str) -> Result<()> {
        self.instance_of(id)?.sandbox.require_running()
    }

    async fn stats_sandbox(&self, id: &str) -> Result<ContainerStats> {
        let instance = self.instance_of(id)?;
        instance.sandbox.require_running()?;
        instance.containers.stats_of_all().await
    }

    async fn shutdown_sandbox(&self, id: &str) -> Result<()> {
        self.check_sandbox_id(id)?;
        self.wind_down().await;
        self.end.send_replace(true);
        Ok(())
    }
}

impl RuntimeHandlerManager {
    fn check_sandbox_id(&self, id: &str) -> Result<()> {
        if id == self.context.sandbox_id {
            return Ok(());
        }
        let message = format!(
            "sandbox {id}: this is the shim of sandbox {}",
            self.context.sandbox_id
        );
        Err(Error::new(ErrorKind::NotFound, message))
    }

    fn done_already(&self, what: &str) -> Error {
        let message = format!("sandbox {} {what} already", self.context.sandbox_id);
        Error::new(ErrorKind::AlreadyExists, message)
    }

    /// The sandbox `id`, whatever it does.
    fn instance_of(&self, id: &str) -> Result<Arc<RuntimeInstance>> {
        self.check_sandbox_id(id)?;
        match &*self.instance.borrow() {
            Instance::Made(instance) | Instance::Starting(instance) | Instance::Ready(instance) => {
                Ok(instance.clone())
            }
            Instance::None | Instance::Creating => Err(self.wrong_state("has not been created")),
            Instance::Ended => Err(self.wrong_state("has ended")),
        }
    }

    async fn make_sandbox(&self, request: CreateSandboxRequest) -> Result<Arc<RuntimeInstance>> {
        let spec = match &request.pod {
            Some(_) => None,
            None => load_sandbox_spec(&request.bundle)?,
        };
        let options = request.options.clone();
        let config = SandboxConfig::from_request(request, spec.as_ref())?;
        let sandbox = self
            .recipe
            .sandbox(&self.context, &options, config, self.events.clone())?;
        let events = self.events.clone();
        Ok(RuntimeInstance::new(
            &self.context,
            Arc::new(sandbox),
            Life::OfItsOwn,
            events,
        ))
    }

    /// Made → Starting.
    fn enter_starting(&self) -> Result<Arc<RuntimeInstance>> {
        let mut made = None;
        self.replace(|instance| {
            if let Instance::Made(instance) = instance {
                made = Some(instance.clone());
            }
            made.clone().map(Instance::Starting)
        });
        if let Some(made) = made {
            return Ok(made);
        }
        Err(match &*self.instance.borrow() {
            Instance::None | Instance::Creating => self.wrong_state("has not been created"),
            Instance::Ended => self.wrong_state("has ended"),
            Instance::Ready(instance)
                if matches!(*instance.sandbox.watch_state().borrow(), SandboxState::Stopped(_)) =>
            {
                self.wrong_state("has ended")
            }
            Instance::Made(_) | Instance::Starting(_) | Instance::Ready(_) => {
                self.done_already("has been started")
            }
        })
    }
}
