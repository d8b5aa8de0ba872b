//! One process: a state machine that publishes its events in order, each exactly once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use tokio::sync::{OnceCell, mpsc, watch};

use super::io::ProcessIo;
use crate::error::{Error, ErrorKind, Result};
use crate::types::{ContainerProcess, Event, ProcessExit, ProcessStatus, Stdio};

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Exists, does not run.
    Created,
    /// The agent has been asked to run it. An exit seen now is published after the start.
    Starting {
        /// Exit seen while starting.
        exit: Option<ProcessExit>,
    },
    /// Runs.
    Running,
    /// Frozen.
    Paused,
    /// Has ended.
    Stopped(ProcessExit),
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting { .. } => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped(_) => "stopped",
        }
    }
}

/// A process of a container.
pub(super) struct Process {
    id: ContainerProcess,
    /// The pid that stands for its container on the host.
    host_pid: u32,
    stdio: Stdio,
    /// What an exec runs; init is in the container's spec.
    spec: Option<oci_spec::runtime::Process>,
    phase: watch::Sender<Phase>,
    events: mpsc::UnboundedSender<Event>,
    io: Mutex<Option<Arc<ProcessIo>>>,
    /// CloseIO has been asked for, maybe before there was anything to close.
    stdin_closed: AtomicBool,
    /// Set by the one removal.
    deleted: OnceCell<ProcessExit>,
    /// Terminal size (width, height) asked for before the start.
    size: Mutex<Option<(u32, u32)>>,
}

impl Process {
    /// A process of the container that `host_pid` stands for.
    pub(super) fn new(
        id: ContainerProcess,
        host_pid: u32,
        stdio: Stdio,
        events: mpsc::UnboundedSender<Event>,
    ) -> Self {
        let phase = watch::Sender::new(Phase::Created);
        Self {
            id,
            host_pid,
            stdio,
            spec: None,
            phase,
            events,
            io: Mutex::default(),
            stdin_closed: AtomicBool::new(false),
            deleted: OnceCell::new(),
            size: Mutex::default(),
        }
    }

    /// Makes it an exec that runs `spec`.
    pub(super) fn with_spec(mut self, spec: oci_spec::runtime::Process) -> Self {
        self.spec = Some(spec);
        self
    }

    pub(super) fn spec(&self) -> Option<&oci_spec::runtime::Process> {
        self.spec.as_ref()
    }

    pub(super) fn id(&self) -> &ContainerProcess {
        &self.id
    }

    pub(super) fn host_pid(&self) -> u32 {
        self.host_pid
    }

    pub(super) fn stdio(&self) -> &Stdio {
        &self.stdio
    }

    pub(super) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    pub(super) fn is_init(&self) -> bool {
        self.id.exec_id.is_empty()
    }

    /// Status and exit as State reports them.
    pub(super) fn status(&self) -> (ProcessStatus, Option<ProcessExit>) {
        match self.phase() {
            Phase::Created | Phase::Starting { .. } => (ProcessStatus::Created, None),
            Phase::Running => (ProcessStatus::Running, None),
            Phase::Paused => (ProcessStatus::Paused, None),
            Phase::Stopped(exit) => (ProcessStatus::Stopped, Some(exit)),
        }
    }

    /// An error about this process being in the wrong state for `action`.
    pub(super) fn wrong_state(&self, action: &str) -> Error {
        let message = format!("cannot {action} {self}: it is {}", self.phase().name());
        Error::new(ErrorKind::FailedPrecondition, message)
    }

    /// Created → Starting.
    pub(super) fn begin_start(&self) -> Result<()> {
        let changed = self.phase.send_if_modified(|phase| {
            let created = *phase == Phase::Created;
            if created {
                *phase = Phase::Starting { exit: None };
            }
            created
        });
        if changed {
            Ok(())
        } else {
            Err(self.wrong_state("start"))
        }
    }

    /// Starting → Running, or Stopped when the process has already ended. Publishes the start, then the exit.
    pub(super) fn finish_start(&self) {
        self.phase.send_if_modified(|phase| {
            let Phase::Starting { exit } = *phase else {
                return false;
            };
            self.publish(self.start_event());
            match exit {
                Some(exit) => {
                    self.publish(self.exit_event(exit));
                    *phase = Phase::Stopped(exit);
                }
                None => *phase = Phase::Running,
            }
            true
        });
        self.after_exit();
    }

    /// Starting → Stopped: it never ran. containerd knows of init since its creation and hears of its end.
    pub(super) fn fail_start(&self, status: u32) {
        self.phase.send_if_modified(|phase| {
            let Phase::Starting { exit } = *phase else {
                return false;
            };
            let exit = exit.unwrap_or(ProcessExit {
                status,
                at: SystemTime::now(),
            });
            if self.is_init() {
                self.publish(self.exit_event(exit));
            }
            *phase = Phase::Stopped(exit);
            true
        });
        self.after_exit();
    }

    /// Any phase → Stopped, publishing the exit; nothing happens when it already was.
    pub(super) fn exited(&self, exit: ProcessExit) {
        self.phase.send_if_modified(|phase| match *phase {
            Phase::Stopped(_) | Phase::Starting { exit: Some(_) } => false,
            Phase::Starting { exit: None } => {
                *phase = Phase::Starting { exit: Some(exit) };
                true
            }
            Phase::Created | Phase::Running | Phase::Paused => {
                // An exec that was never started has nothing to report.
                if self.is_init() || *phase != Phase::Created {
                    self.publish(self.exit_event(exit));
                }
                *phase = Phase::Stopped(exit);
                true
            }
        });
        self.after_exit();
    }

    /// Running → Paused.
    pub(super) fn pause(&self) {
        self.phase
            .send_if_modified(|phase| replace(phase, Phase::Running, Phase::Paused));
    }

    /// Paused → Running.
    pub(super) fn resume(&self) {
        self.phase
            .send_if_modified(|phase| replace(phase, Phase::Paused, Phase::Running));
    }

    /// Waits for the end, from any phase.
    pub(super) async fn wait(&self) -> Result<ProcessExit> {
        let mut phase = self.phase.subscribe();
        let ended = phase.wait_for(|phase| matches!(phase, Phase::Stopped(_))).await;
        match ended.as_deref() {
            Ok(Phase::Stopped(exit)) => Ok(*exit),
            _ => Err(Error::new(
                ErrorKind::Internal,
                format!("{self}: removed while it was waited for"),
            )),
        }
    }

    /// Takes the streams into use.
    pub(super) fn set_io(&self, io: Arc<ProcessIo>) {
        *self.io.lock().unwrap_or_else(PoisonError::into_inner) = Some(io.clone());
        if self.stdin_closed.load(Ordering::SeqCst) {
            io.close_stdin();
        }
        // It may have ended in the meantime.
        self.after_exit();
    }

    pub(super) fn io(&self) -> Option<Arc<ProcessIo>> {
        self.io.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends stdin once the client has let go of it, now or as soon as there are streams.
    pub(super) fn close_stdin(&self) {
        self.stdin_closed.store(true, Ordering::SeqCst);
        if let Some(io) = self.io() {
            io.close_stdin();
        }
    }

    /// Runs `removal`, once: a removal at the same time waits for the first one and then finds nothing, and one that has
    /// failed can be tried again.
    ///
    /// # Errors
    /// Of `removal`, and `NotFound` when the process has been removed already.
    pub(super) async fn remove_once(
        &self,
        removal: impl Future<Output = Result<ProcessExit>>,
    ) -> Result<ProcessExit> {
        let mut mine = false;
        let exit = self
            .deleted
            .get_or_try_init(|| async {
                let exit = removal.await?;
                mine = true;
                Ok::<_, Error>(exit)
            })
            .await?;
        if mine {
            return Ok(*exit);
        }
        Err(Error::new(ErrorKind::NotFound, format!("{self} does not exist")))
    }

    /// Remembers a terminal size for the start; false once it runs.
    pub(super) fn remember_size(&self, width: u32, height: u32) -> bool {
        let waits = matches!(self.phase(), Phase::Created | Phase::Starting { .. });
        if waits {
            *self.size.lock().unwrap_or_else(PoisonError::into_inner) = Some((width, height));
        }
        waits
    }

    pub(super) fn take_size(&self) -> Option<(u32, u32)> {
        self.size.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// A process that has ended reads nothing any more. Its output goes on until the guest closes it.
    fn after_exit(&self) {
        if matches!(self.phase(), Phase::Stopped(_))
            && let Some(io) = self.io()
        {
            io.end_stdin();
        }
    }

    fn start_event(&self) -> Event {
        let pid = self.host_pid;
        if self.is_init() {
            Event::TaskStart {
                container_id: self.id.container_id.clone(),
                pid,
            }
        } else {
            Event::TaskExecStarted {
                process: self.id.clone(),
                pid,
            }
        }
    }

    fn exit_event(&self, exit: ProcessExit) -> Event {
        if self.is_init() {
            crate::timeline::mark_at("exit", exit.at);
        }
        Event::TaskExit {
            process: self.id.clone(),
            pid: self.host_pid,
            exit,
        }
    }

    /// Called inside of a phase change, so events have the order of the changes.
    fn publish(&self, event: Event) {
        // Nobody listens once the shim ends.
        let _ = self.events.send(event);
    }
}

impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.is_init() {
            write!(f, "container {}", self.id.container_id)
        } else {
            write!(
                f,
                "process {} of container {}",
                self.id.exec_id, self.id.container_id
            )
        }
    }
}

fn replace(phase: &mut Phase, from: Phase, to: Phase) -> bool {
    let matches = *phase == from;
    if matches {
        *phase = to;
    }
    matches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(exec_id: &str) -> (Arc<Process>, mpsc::UnboundedReceiver<Event>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let id = ContainerProcess {
            container_id: "c".into(),
            exec_id: exec_id.into(),
        };
        (Arc::new(Process::new(id, 7, Stdio::default(), sender)), receiver)
    }

    fn exit(status: u32) -> ProcessExit {
        ProcessExit {
            status,
            at: SystemTime::now(),
        }
    }

    fn names(events: &mut mpsc::UnboundedReceiver<Event>) -> Vec<&'static str> {
        let mut names = Vec::new();
        while let Ok(event) = events.try_recv() {
            names.push(match event {
                Event::TaskStart { .. } => "start",
                Event::TaskExecStarted { .. } => "exec-started",
                Event::TaskExit { .. } => "exit",
                _ => "other",
            });
        }
        names
    }

    #[test]
    fn exit_when_seen_during_start_is_published_after_it() {
        let (process, mut events) = process("");
        process.begin_start().unwrap();
        process.exited(exit(3));
        assert_eq!(names(&mut events), Vec::<&str>::new());

        process.finish_start();

        assert_eq!(names(&mut events), ["start", "exit"]);
        assert!(matches!(
            process.phase(),
            Phase::Stopped(ProcessExit { status: 3, .. })
        ));
    }

    #[test]
    fn exit_when_reported_twice_is_published_once() {
        let (process, mut events) = process("e");
        process.begin_start().unwrap();
        process.finish_start();
        process.exited(exit(1));
        process.exited(exit(137));

        assert_eq!(names(&mut events), ["exec-started", "exit"]);
        assert!(matches!(
            process.phase(),
            Phase::Stopped(ProcessExit { status: 1, .. })
        ));
    }

    #[test]
    fn start_when_not_created_is_refused() {
        let (process, _events) = process("");
        process.begin_start().unwrap();
        assert_eq!(
            process.begin_start().unwrap_err().kind,
            ErrorKind::FailedPrecondition
        );
        process.finish_start();
        assert_eq!(
            process.begin_start().unwrap_err().kind,
            ErrorKind::FailedPrecondition
        );
        process.exited(exit(0));
        let error = process.begin_start().unwrap_err();
        assert_eq!(error.message, "cannot start container c: it is stopped");
    }

    #[test]
    fn start_when_it_fails_is_an_exit_of_init_only() {
        let (init, mut events) = process("");
        init.begin_start().unwrap();
        init.fail_start(127);
        assert_eq!(names(&mut events), ["exit"]);

        let (exec, mut events) = process("e");
        exec.begin_start().unwrap();
        exec.fail_start(127);
        assert_eq!(names(&mut events), Vec::<&str>::new());
        assert!(matches!(
            exec.phase(),
            Phase::Stopped(ProcessExit { status: 127, .. })
        ));
    }

    #[test]
    fn death_when_only_created_is_published_for_init_only() {
        let (init, mut events) = process("");
        init.exited(exit(137));
        assert_eq!(names(&mut events), ["exit"]);
        let (exec, mut events) = process("e");
        exec.exited(exit(137));
        assert_eq!(names(&mut events), Vec::<&str>::new());
    }

    #[test]
    fn pause_when_not_running_does_nothing() {
        let (process, _events) = process("");
        process.pause();
        assert_eq!(process.phase(), Phase::Created);
        process.begin_start().unwrap();
        process.finish_start();
        process.pause();
        assert_eq!(process.status().0, ProcessStatus::Paused);
        process.resume();
        assert_eq!(process.status().0, ProcessStatus::Running);
    }

    #[tokio::test]
    async fn waiters_when_before_and_after_the_exit_see_one_status() {
        let (process, _events) = process("");
        let waiters: Vec<_> = (0..20)
            .map(|_| {
                let process = process.clone();
                tokio::spawn(async move { process.wait().await.unwrap().status })
            })
            .collect();
        tokio::task::yield_now().await;
        process.begin_start().unwrap();
        process.finish_start();
        process.exited(exit(42));

        for waiter in waiters {
            assert_eq!(waiter.await.unwrap(), 42);
        }
        assert_eq!(process.wait().await.unwrap().status, 42);
    }
}
