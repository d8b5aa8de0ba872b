//! Tasks that watch a sandbox: the VM's end, the agent's health, out-of-memory kills.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocols::agent as wire;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::{SandboxEnd, SandboxState};
use crate::agent::Agent;
use crate::error::ErrorKind;
use crate::hypervisor::Hypervisor;
use crate::types::Event;

/// Console lines shown with an error, and their length.
const CONSOLE_LINES: usize = 8;
const CONSOLE_WIDTH: usize = 160;
const HEALTH_INTERVAL: Duration = Duration::from_secs(30);
/// Health checks in a row without an answer that end a VM: six minutes with the default timeout.
const UNANSWERED: u32 = 3;
/// A container that has its processes killed over and over is an event this often.
const OOM_INTERVAL: Duration = Duration::from_secs(1);
/// Pause after an unexpected answer to a long poll: never a hot loop.
const RETRY: Duration = Duration::from_secs(1);

/// Publishes the end of the VM. An end that nobody asked for is an error with the guest's last words.
pub(super) async fn vm_end(
    hypervisor: Arc<dyn Hypervisor>,
    state: watch::Sender<SandboxState>,
    sandbox: String,
) {
    let exit = hypervisor.wait_vm().await;
    let wanted = matches!(*state.borrow(), SandboxState::Stopping);
    if wanted {
        tracing::info!(sandbox, %exit, "VM ended");
    } else {
        tracing::error!(sandbox, %exit, console = console_line(hypervisor.as_ref()), "VM ended unexpectedly");
    }
    state.send_replace(SandboxState::Stopped(SandboxEnd::now(exit, wanted)));
}

/// The guest's last words in one line.
pub(super) fn console_line(hypervisor: &dyn Hypervisor) -> String {
    let lines = hypervisor.console_tail(CONSOLE_LINES);
    let lines: Vec<String> = lines
        .iter()
        .map(|line| {
            line.chars()
                .filter(|c| !c.is_control())
                .take(CONSOLE_WIDTH)
                .collect::<String>()
        })
        .filter(|line: &String| !line.trim().is_empty())
        .collect();
    if lines.is_empty() {
        "(empty)".to_owned()
    } else {
        lines.join(" | ")
    }
}

/// Asks the agent for its health from time to time. A guest that does not answer may be frozen with its host, swapping or
/// debugged: it is reported. After [`UNANSWERED`] times in a row it is ended, unless `keep_abnormal`.
pub(super) async fn health(
    agent: Arc<dyn Agent>,
    hypervisor: Arc<dyn Hypervisor>,
    sandbox: String,
    keep_abnormal: bool,
) {
    let mut unanswered = 0;
    loop {
        tokio::time::sleep(HEALTH_INTERVAL).await;
        match agent.check().await {
            Ok(_) => unanswered = 0,
            Err(error) if error.kind == ErrorKind::Unavailable => return,
            Err(error) => {
                unanswered += 1;
                tracing::warn!(sandbox, unanswered, %error, "agent health check");
            }
        }
        if gives_up(unanswered, keep_abnormal) {
            tracing::error!(
                sandbox,
                unanswered,
                "the agent does not answer: the VM is ended (runtime.keep_abnormal = false)"
            );
            if let Err(error) = hypervisor.stop_vm().await {
                tracing::error!(sandbox, %error, "ending the VM");
            }
            return;
        }
    }
}

fn gives_up(unanswered: u32, keep_abnormal: bool) -> bool {
    unanswered >= UNANSWERED && !keep_abnormal
}

/// Ids of the pod's containers.
#[derive(Default)]
pub struct Members {
    ids: Mutex<HashSet<String>>,
}

impl Members {
    /// Adds one.
    pub fn enter(&self, id: &str) {
        self.ids().insert(id.to_owned());
    }

    /// Takes one away.
    pub fn leave(&self, id: &str) {
        self.ids().remove(id);
    }

    fn contains(&self, id: &str) -> bool {
        self.ids().contains(id)
    }

    fn ids(&self) -> MutexGuard<'_, HashSet<String>> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Turns the guest's out-of-memory kills into events: of the pod's own containers, and of each at most one in
/// [`OOM_INTERVAL`]. The guest may claim what it likes, as fast as it likes.
pub(super) async fn oom(agent: Arc<dyn Agent>, members: Arc<Members>, events: mpsc::UnboundedSender<Event>) {
    let mut last: HashMap<String, Instant> = HashMap::new();
    loop {
        match agent.get_oom_event(wire::GetOOMEventRequest::default()).await {
            Ok(event) if members.contains(&event.container_id) => {
                last.retain(|_, at| at.elapsed() < OOM_INTERVAL);
                if last.contains_key(&event.container_id) {
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
                last.insert(event.container_id.clone(), Instant::now());
                // Nobody listens once the shim ends.
                let _ = events.send(Event::TaskOom {
                    container_id: event.container_id,
                });
            }
            Err(error) if matches!(error.kind, ErrorKind::Unavailable | ErrorKind::Unimplemented) => return,
            Ok(_) => tokio::time::sleep(RETRY).await,
            Err(error) => {
                tracing::debug!(%error, "out-of-memory events");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vm_when_its_agent_is_silent_is_given_up_unless_kept() {
        assert!(!gives_up(UNANSWERED - 1, false));
        assert!(gives_up(UNANSWERED, false));
        assert!(!gives_up(UNANSWERED + 100, true));
    }
}
