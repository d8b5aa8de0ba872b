//! Running processes: registering an exec, starting init or an exec, the size of a terminal.

use std::sync::Arc;

use oci_spec::runtime::{BoxBuilder, Process as OciProcess};
use protobuf::MessageField;
use protocols::agent as wire;
use protocols::oci_convert::process_to_wire;

use super::VirtContainerManager;
use super::container::Container;
use super::exit::UNKNOWN_STATUS;
use super::process::{Phase, Process};
use super::spec::amend_process;
use crate::error::{Error, ErrorKind, Result};
use crate::paths::check_id;
use crate::sandbox::Sandbox;
use crate::types::{Event, ExecProcessRequest};

impl VirtContainerManager {
    /// Registers an exec; the guest hears of it when it is started.
    pub(super) fn add_exec(&self, request: ExecProcessRequest) -> Result<()> {
        let container = self.container(&request.process.container_id)?;
        check_id("exec", &request.process.exec_id)?;
        if !matches!(
            container.init.phase(),
            Phase::Running | Phase::Paused | Phase::Created
        ) {
            return Err(container.init.wrong_state("execute a process in"));
        }
        let invalid = |message: String| {
            let exec = &request.process.exec_id;
            Error::new(
                ErrorKind::InvalidArgument,
                format!("process {exec} of container {}: {message}", container.id),
            )
        };
        let mut spec: OciProcess =
            serde_json::from_slice(&request.spec_json).map_err(|error| invalid(error.to_string()))?;
        if spec.args().as_ref().is_none_or(Vec::is_empty) {
            return Err(invalid("args is missing or empty".into()));
        }
        spec.set_terminal(Some(request.stdio.terminal));
        amend_process(&mut spec);
        let (id, pid) = (request.process.clone(), container.host.pid.tid());
        let process = Process::new(id, pid, request.stdio, self.events()).with_spec(spec);
        container.add_exec(Arc::new(process))?;
        self.publish(Event::TaskExecAdded {
            process: request.process,
        });
        Ok(())
    }

    /// Runs a created process. Returns the host pid that stands for it.
    pub(super) async fn start(&self, container: Arc<Container>, process: Arc<Process>) -> Result<u32> {
        if !process.is_init() && container.init.phase() != Phase::Running {
            return Err(container.init.wrong_state("start a process in"));
        }
        process.begin_start()?;
        let started = match process.spec() {
            None => self.start_init(&container).await,
            Some(spec) => {
                let mut spec = spec.clone();
                // Programs ask for it when they start.
                if let Some((width, height)) = process.take_size() {
                    let size = BoxBuilder::default().width(width).height(height).build();
                    // It only fails for a side that was left out.
                    spec.set_console_size(size.ok());
                }
                self.start_exec(&container, &process, &spec).await
            }
        };
        if let Err(error) = started {
            // 127 as shells say for a command that cannot be found.
            process.fail_start(if error.kind == ErrorKind::NotFound {
                127
            } else {
                UNKNOWN_STATUS
            });
            return Err(error.context(format!("start {process}")));
        }
        if let Some((width, height)) = process.take_size()
            && let Err(error) = self.resize_in_guest(&process, width, height).await
        {
            tracing::warn!(%process, %error, "terminal size");
        }
        if process.is_init()
            && let Some(hooks) = &container.host.hooks
            && let Err(error) = hooks.started(&container.host.pid).await
        {
            self.kill_started(&process).await;
            return Err(error.context(format!("start {process}")));
        }
        process.finish_start();
        let pid = process.host_pid();
        if !process.is_init() {
            self.spawn_waiter(container, process);
        }
        Ok(pid)
    }

    async fn start_init(&self, container: &Container) -> Result<()> {
        // docker and nerdctl make interfaces between the creation of a container and its start.
        self.sandbox.rescan_network().await?;
        // Its terminal exists since its creation.
        if let Some((width, height)) = container.init.take_size()
            && let Err(error) = self.resize_in_guest(&container.init, width, height).await
        {
            tracing::warn!(container = container.id, %error, "terminal size");
        }
        let request = wire::StartContainerRequest {
            container_id: container.id.clone(),
            ..Default::default()
        };
        self.sandbox.agent().start_container(request).await
    }

    async fn start_exec(&self, container: &Container, process: &Process, spec: &OciProcess) -> Result<()> {
        let streams = self.open_streams(&container.id, process.stdio()).await?;
        let io = self.attach(streams)?;
        let request = wire::ExecProcessRequest {
            container_id: container.id.clone(),
            exec_id: process.id().exec_id.clone(),
            process: MessageField::some(process_to_wire(spec)),
            stdin_port: io.stdin_port,
            stdout_port: io.stdout_port,
            stderr_port: io.stderr_port,
            ..Default::default()
        };
        if let Err(error) = self.sandbox.agent().exec_process(request).await {
            io.close();
            return Err(error);
        }
        process.set_io(io);
        Ok(())
    }

    /// Changes the size of a terminal, now or when the process starts.
    pub(super) async fn resize(&self, process: &Process, width: u32, height: u32) -> Result<()> {
        if process.remember_size(width, height) {
            return Ok(());
        }
        self.resize_in_guest(process, width, height).await
    }

    async fn resize_in_guest(&self, process: &Process, width: u32, height: u32) -> Result<()> {
        let request = wire::TtyWinResizeRequest {
            container_id: process.id().container_id.clone(),
            exec_id: process.id().exec_id.clone(),
            row: height,
            column: width,
            ..Default::default()
        };
        self.sandbox.agent().tty_win_resize(request).await
    }
}
