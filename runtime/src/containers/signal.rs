//! Signals, and freezing.

use std::time::SystemTime;

use protocols::agent as wire;

use super::VirtContainerManager;
use super::container::Container;
use super::process::{Phase, Process};
use crate::error::{Error, ErrorKind, Result};
use crate::types::{Event, ProcessExit};

/// As the wire has it.
pub(super) const SIGKILL: u32 = libc::SIGKILL as u32;
const SIGTERM: u32 = libc::SIGTERM as u32;
/// The last real-time signal of Linux.
const LAST_SIGNAL: u32 = 64;

impl VirtContainerManager {
    /// Signals a process, or every process of its container.
    pub(super) async fn kill(
        &self,
        container: &Container,
        process: &Process,
        signal: u32,
        all: bool,
    ) -> Result<()> {
        if signal > LAST_SIGNAL {
            let message = format!("signal {signal} to {process}: signals are 0 to {LAST_SIGNAL}");
            return Err(Error::new(ErrorKind::InvalidArgument, message));
        }
        match process.phase() {
            Phase::Stopped(_) => Err(Error::new(
                ErrorKind::NotFound,
                format!("cannot kill {process}: it has already exited"),
            )),
            // What waits for its start is the runtime's own process and ignores everything else.
            Phase::Created if signal != SIGKILL && signal != SIGTERM => Ok(()),
            Phase::Created if process.is_init() => {
                self.kill_created(container, signal).await;
                Ok(())
            }
            Phase::Created => {
                process.exited(ProcessExit {
                    status: 128 + signal,
                    at: SystemTime::now(),
                });
                Ok(())
            }
            Phase::Starting { .. } | Phase::Running | Phase::Paused => self
                .signal(process, signal, all)
                .await
                .map_err(|error| error.context(format!("signal {signal} to {process}"))),
        }
    }

    async fn signal(&self, process: &Process, signal: u32, all: bool) -> Result<()> {
        let request = wire::SignalProcessRequest {
            container_id: process.id().container_id.clone(),
            exec_id: process.id().exec_id.clone(),
            signal,
            all,
            ..Default::default()
        };
        self.sandbox.agent().signal_process(request).await
    }

    /// A created container ends, by decree: of the signal sent, whatever it takes in the guest.
    pub(super) async fn kill_created(&self, container: &Container, signal: u32) {
        container.all_exited(ProcessExit {
            status: 128 + signal,
            at: SystemTime::now(),
        });
        // What waits there for its start is PID 1 of a namespace: it ignores everything but SIGKILL.
        if let Err(error) = self.signal(&container.init, SIGKILL, false).await {
            tracing::debug!(container = container.id, %error, "created container in the guest");
        }
    }

    /// A container whose poststart hooks have failed ends: it has been running, but nobody hears of its start.
    pub(super) async fn kill_started(&self, init: &Process) {
        if let Err(error) = self.signal(init, SIGKILL, true).await {
            // It may have ended by itself.
            tracing::debug!(%init, %error, "after a failed poststart hook");
        }
        init.fail_start(128 + SIGKILL);
    }

    /// Freezes a running container.
    pub(super) async fn pause(&self, container: &Container) -> Result<()> {
        if container.init.phase() != Phase::Running {
            return Err(container.init.wrong_state("pause"));
        }
        let request = wire::PauseContainerRequest {
            container_id: container.id.clone(),
            ..Default::default()
        };
        self.sandbox.agent().pause_container(request).await?;
        container.init.pause();
        self.publish(Event::TaskPaused {
            container_id: container.id.clone(),
        });
        Ok(())
    }

    /// Thaws a frozen container.
    pub(super) async fn resume(&self, container: &Container) -> Result<()> {
        if container.init.phase() != Phase::Paused {
            return Err(container.init.wrong_state("resume"));
        }
        let request = wire::ResumeContainerRequest {
            container_id: container.id.clone(),
            ..Default::default()
        };
        self.sandbox.agent().resume_container(request).await?;
        container.init.resume();
        self.publish(Event::TaskResumed {
            container_id: container.id.clone(),
        });
        Ok(())
    }
}
