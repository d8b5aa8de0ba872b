//! Tasks that watch a sandbox: the VM's end, the agent's health, out-of-memory kills.

use std::collections::HashMap;
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

/// The pod's containers, and what is known of their kills for memory.
#[derive(Default)]
pub struct Members {
    kills: Mutex<HashMap<String, Kills>>,
}

/// What is known of a container's kills for memory.
#[derive(Default)]
struct Kills {
    /// When the last event was published.
    last: Option<Instant>,
    /// Its init has ended: what comes now comes late.
    over: bool,
}

impl Members {
    /// Adds one.
    pub fn enter(&self, id: &str) {
        self.kills().insert(id.to_owned(), Kills::default());
    }

    /// Takes one away.
    pub fn leave(&self, id: &str) {
        self.kills().remove(id);
    }

    /// Whether a kill of `id` has been published.
    pub fn was_killed(&self, id: &str) -> bool {
        self.kills().get(id).is_some_and(|kills| kills.last.is_some())
    }

    /// Publishes a kill of `id`, unless it is a stranger, has ended, or had one a moment ago.
    pub fn publish_kill(&self, id: &str, events: &mpsc::UnboundedSender<Event>) -> bool {
        let mut all = self.kills();
        let Some(kills) = all.get_mut(id) else {
            return false;
        };
        if kills.over || kills.last.is_some_and(|at| at.elapsed() < OOM_INTERVAL) {
            return false;
        }
        kills.last = Some(Instant::now());
        // Within the lock: whoever finds that it was published may publish what comes after it. Nobody listens once the
        // shim ends.
        let _ = events.send(Event::TaskOom {
            container_id: id.to_owned(),
        });
        true
    }

    /// Nothing of `id` is published any more: its exit is the last that is heard of it.
    pub fn end(&self, id: &str) {
        if let Some(kills) = self.kills().get_mut(id) {
            kills.over = true;
        }
    }

    fn kills(&self) -> MutexGuard<'_, HashMap<String, Kills>> {
        self.kills.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Turns the guest's out-of-memory kills into events: of the pod's own containers, and of each at most one in
/// [`OOM_INTERVAL`]. The guest may claim what it likes, as fast as it likes.
pub(super) async fn oom(agent: Arc<dyn Agent>, members: Arc<Members>, events: mpsc::UnboundedSender<Event>) {
    loop {
        match agent.get_oom_event(wire::GetOOMEventRequest::default()).await {
            Ok(event) if members.publish_kill(&event.container_id, &events) => {}
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
    fn kill_for_memory_when_late_or_a_strangers_is_not_published() {
        let (sender, mut events) = mpsc::unbounded_channel();
        let members = Members::default();
        members.enter("c1");
        assert!(!members.publish_kill("stranger", &sender));
        assert!(!members.was_killed("c1"));

        assert!(members.publish_kill("c1", &sender));
        assert!(!members.publish_kill("c1", &sender), "a moment ago");
        assert!(members.was_killed("c1"));

        // Another of the same name has its own.
        members.enter("c1");
        members.end("c1");
        assert!(!members.publish_kill("c1", &sender), "after its exit");
        let published = std::iter::from_fn(|| events.try_recv().ok()).count();
        assert_eq!(published, 1);
    }

    #[test]
    fn vm_when_its_agent_is_silent_is_given_up_unless_kept() {
        assert!(!gives_up(UNANSWERED - 1, false));
        assert!(gives_up(UNANSWERED, false));
        assert!(!gives_up(UNANSWERED + 100, true));
    }
}
