//! A runtime that answers as a test tells it to.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use runtime::error::Result;
use runtime::handler::TaskHandler;
use runtime::types::{
    ContainerProcess, ContainerStats, CreateContainerRequest, ExecProcessRequest, ProcessExit, ProcessState,
};
use tokio::sync::{Semaphore, watch};

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
    Update(String, Vec<u8>),
    Shutdown(String, bool),
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
        })
    }

    pub fn seen(&self) -> Vec<Call> {
        self.seen.lock().unwrap().clone()
    }

    async fn answer(&self, call: Call) -> Result<Answer> {
        self.seen.lock().unwrap().push(call.clone());
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
            Answer::$kind(value) => Ok(value),
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

    async fn delete_process(&self, process: &ContainerProcess) -> Result<ProcessExit> {
        expect!(self.answer(Call::Delete(process.clone())).await, Exit)
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

    async fn update_container(&self, container: &str, resources: &[u8]) -> Result<()> {
        self.answer(Call::Update(container.into(), resources.to_vec()))
            .await
            .map(drop)
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
