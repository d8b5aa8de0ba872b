//! A runtime that answers as a test tells it to.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use runtime::error::Result;
use runtime::handler::{SandboxHandler, TaskHandler};
use runtime::sandbox::{SandboxEnd, SandboxStatus};
use runtime::types::{
    ContainerProcess, ContainerStats, CreateContainerRequest, CreateSandboxRequest, DeletedProcess,
    ExecProcessRequest, ProcessExit, ProcessState, StartedSandbox, UpdateContainerRequest,
};
use tokio::sync::{Semaphore, watch};

/// The pid that stands for every container.
pub const CONTAINER_PID: u32 = 4711;

/// A call that came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    Create(CreateContainerRequest),
    Start(ContainerProcess),
    Delete(ContainerProcess),
    Exec(ExecProcessRequest),
    Kill(ContainerProcess, u32, bool),
    Wait(ContainerProcess),
    State(ContainerProcess),
    ResizePty(ContainerProcess, u32, u32),
    CloseIo(ContainerProcess),
    Pause(String),
    Resume(String),
    Pids(String),
    Connect(String),
    Stats(String),
    Update(UpdateContainerRequest),
    Shutdown(String, bool),
    CreateSandbox(Box<CreateSandboxRequest>),
    StartSandbox(String),
    StopSandbox(String, Option<Duration>),
    WaitSandbox(String),
    SandboxStatus(String),
    PingSandbox(String),
    SandboxMetrics(String),
    ShutdownSandbox(String),
}

/// What a test has the runtime say.
#[derive(Debug)]
pub enum Answer {
    Done,
    Pid(u32),
    Pids(Vec<u32>),
    Exit(ProcessExit),
    State(ProcessState),
    Stats(Box<ContainerStats>),
    Shutdown(bool),
    Started(StartedSandbox),
    End(SandboxEnd),
    Status(Box<SandboxStatus>),
}

type Answers = Box<dyn Fn(&Call) -> Result<Answer> + Send + Sync>;

pub struct FakeRuntime {
    answers: Answers,
    /// Every answer needs a permit; without a gate there are plenty.
    pub gate: Arc<Semaphore>,
    /// Calls that came in, and those that were answered.
    pub seen: Mutex<Vec<Call>>,
    pub answered: watch::Sender<usize>,
    pub end: watch::Sender<bool>,
    pub stopped: watch::Sender<bool>,
    /// Whether a Wait is ever answered.
    answers_waits: AtomicBool,
}

impl FakeRuntime {
    pub fn new(answers: impl Fn(&Call) -> Result<Answer> + Send + Sync + 'static) -> Arc<Self> {
        Self::gated(Semaphore::MAX_PERMITS, answers)
    }

    /// A runtime that gives `permits` answers, and more as the gate gets more permits.
    pub fn gated(
        permits: usize,
        answers: impl Fn(&Call) -> Result<Answer> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            answers: Box::new(answers),
            gate: Arc::new(Semaphore::new(permits)),
            seen: Mutex::default(),
            answered: watch::Sender::new(0),
            end: watch::Sender::new(false),
            stopped: watch::Sender::new(false),
            answers_waits: AtomicBool::new(true),
        })
    }

    /// From now on, whoever waits waits for ever.
    pub fn never_answer_waits(&self) {
        self.answers_waits.store(false, Ordering::Relaxed);
    }

    pub fn seen(&self) -> Vec<Call> {
        self.seen.lock().unwrap().clone()
    }

    async fn answer(&self, call: Call) -> Result<Answer> {
        self.seen.lock().unwrap().push(call.clone());
        let waits = matches!(call, Call::Wait(_) | Call::WaitSandbox(_));
        if waits && !self.answers_waits.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        self.gate.acquire().await.unwrap().forget();
        let answer = (self.answers)(&call);
        self.answered.send_modify(|count| *count += 1);
        answer
    }
}

/// What is in an answer of the right kind; another kind is a mistake of the test.
macro_rules! expect {
    ($answer:expr, $kind:ident) => {
        match $answer? {
            Answer::$kind(value) => Result::<_>::Ok(value),
            other => panic!("the test answers with {other:?}"),
        }
    };
}

#[async_trait]
impl TaskHandler for FakeRuntime {
    async fn create_container(&self, request: CreateContainerRequest) -> Result<u32> {
        expect!(self.answer(Call::Create(request)).await, Pid)
    }

    async fn start_process(&self, process: &ContainerProcess) -> Result<u32> {
        expect!(self.answer(Call::Start(process.clone())).await, Pid)
    }

    async fn delete_process(&self, process: &ContainerProcess) -> Result<DeletedProcess> {
        let exit: Result<ProcessExit> = expect!(self.answer(Call::Delete(process.clone())).await, Exit);
        exit.map(|exit| DeletedProcess {
            pid: CONTAINER_PID,
            exit,
        })
    }

    async fn exec_process(&self, request: ExecProcessRequest) -> Result<()> {
        self.answer(Call::Exec(request)).await.map(drop)
    }

    async fn kill_process(&self, process: &ContainerProcess, signal: u32, all: bool) -> Result<()> {
        self.answer(Call::Kill(process.clone(), signal, all))
            .await
            .map(drop)
    }

    async fn wait_process(&self, process: &ContainerProcess) -> Result<ProcessExit> {
        expect!(self.answer(Call::Wait(process.clone())).await, Exit)
    }

    async fn state_process(&self, process: &ContainerProcess) -> Result<ProcessState> {
        expect!(self.answer(Call::State(process.clone())).await, State)
    }

    async fn resize_process_pty(&self, process: &ContainerProcess, width: u32, height: u32) -> Result<()> {
        self.answer(Call::ResizePty(process.clone(), width, height))
            .await
            .map(drop)
    }

    async fn close_process_io(&self, process: &ContainerProcess) -> Result<()> {
        self.answer(Call::CloseIo(process.clone())).await.map(drop)
    }

    async fn pause_container(&self, container: &str) -> Result<()> {
        self.answer(Call::Pause(container.into())).await.map(drop)
    }

    async fn resume_container(&self, container: &str) -> Result<()> {
        self.answer(Call::Resume(container.into())).await.map(drop)
    }

    async fn pids(&self, container: &str) -> Result<Vec<u32>> {
        expect!(self.answer(Call::Pids(container.into())).await, Pids)
    }

    async fn connect_container(&self, container: &str) -> Result<u32> {
        expect!(self.answer(Call::Connect(container.into())).await, Pid)
    }

    async fn stats_container(&self, container: &str) -> Result<ContainerStats> {
        expect!(self.answer(Call::Stats(container.into())).await, Stats).map(|stats| *stats)
    }

    async fn update_container(&self, request: UpdateContainerRequest) -> Result<()> {
        self.answer(Call::Update(request)).await.map(drop)
    }

    async fn shutdown_container(&self, container: &str, now: bool) -> Result<bool> {
        expect!(self.answer(Call::Shutdown(container.into(), now)).await, Shutdown)
    }

    async fn shutdown(&self) {
        self.stopped.send_replace(true);
    }

    fn watch_end(&self) -> watch::Receiver<bool> {
        self.end.subscribe()
    }
}

#[async_trait]
impl SandboxHandler for FakeRuntime {
    async fn create_sandbox(&self, request: CreateSandboxRequest) -> Result<()> {
        self.answer(Call::CreateSandbox(Box::new(request)))
            .await
            .map(drop)
    }

    async fn start_sandbox(&self, id: &str) -> Result<StartedSandbox> {
        expect!(self.answer(Call::StartSandbox(id.into())).await, Started)
    }

    async fn stop_sandbox(&self, id: &str, timeout: Option<Duration>) -> Result<()> {
        self.answer(Call::StopSandbox(id.into(), timeout)).await.map(drop)
    }

    async fn wait_sandbox(&self, id: &str) -> Result<SandboxEnd> {
        expect!(self.answer(Call::WaitSandbox(id.into())).await, End)
    }

    async fn sandbox_status(&self, id: &str) -> Result<SandboxStatus> {
        expect!(self.answer(Call::SandboxStatus(id.into())).await, Status).map(|status| *status)
    }

    async fn ping_sandbox(&self, id: &str) -> Result<()> {
        self.answer(Call::PingSandbox(id.into())).await.map(drop)
    }

    async fn stats_sandbox(&self, id: &str) -> Result<ContainerStats> {
        expect!(self.answer(Call::SandboxMetrics(id.into())).await, Stats).map(|stats| *stats)
    }

    async fn shutdown_sandbox(&self, id: &str) -> Result<()> {
        self.answer(Call::ShutdownSandbox(id.into())).await.map(drop)
    }
}
