//! A runtime that answers as a test tells it to.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use runtime::error::Result;
use runtime::types::{TaskRequest, TaskResponse};
use shim::handler::TaskHandler;
use tokio::sync::{Semaphore, watch};

type Answer = Box<dyn Fn(&TaskRequest) -> Result<TaskResponse> + Send + Sync>;

pub struct FakeRuntime {
    answer: Answer,
    /// Every answer needs a permit; without a gate there are plenty.
    pub gate: Arc<Semaphore>,
    /// Requests that came in, and those that were answered.
    pub seen: Mutex<Vec<TaskRequest>>,
    pub answered: watch::Sender<usize>,
    pub end: watch::Sender<bool>,
    pub stopped: watch::Sender<bool>,
}

impl FakeRuntime {
    pub fn new(answer: impl Fn(&TaskRequest) -> Result<TaskResponse> + Send + Sync + 'static) -> Arc<Self> {
        Self::gated(Semaphore::MAX_PERMITS, answer)
    }

    /// A runtime that gives `permits` answers, and more as the gate gets more permits.
    pub fn gated(
        permits: usize,
        answer: impl Fn(&TaskRequest) -> Result<TaskResponse> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            answer: Box::new(answer),
            gate: Arc::new(Semaphore::new(permits)),
            seen: Mutex::default(),
            answered: watch::Sender::new(0),
            end: watch::Sender::new(false),
            stopped: watch::Sender::new(false),
        })
    }

    pub fn seen(&self) -> Vec<TaskRequest> {
        self.seen.lock().unwrap().clone()
    }
}

#[async_trait]
impl TaskHandler for FakeRuntime {
    async fn handle_task(&self, request: TaskRequest) -> Result<TaskResponse> {
        self.seen.lock().unwrap().push(request.clone());
        self.gate.acquire().await.unwrap().forget();
        let answer = (self.answer)(&request);
        self.answered.send_modify(|count| *count += 1);
        answer
    }

    async fn shutdown(&self) {
        self.stopped.send_replace(true);
    }

    fn watch_end(&self) -> watch::Receiver<bool> {
        self.end.subscribe()
    }
}
