//! containerd's event stream, as `ctr events` prints it.

use std::time::Duration;

use serde_json::Value;

use crate::command::{Error, Input, Running};
use crate::containerd::Containerd;

/// One event about a container.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Such as `/tasks/exit`.
    pub topic: String,
    /// The event's fields.
    pub body: Value,
}

impl Event {
    /// Parses a line of `ctr events`: timestamp, namespace, topic, JSON.
    fn parse(line: &str) -> Option<Self> {
        let topic_start = line.find(" /")? + 1;
        let (topic, body) = line.get(topic_start..)?.split_once(' ')?;
        Some(Self {
            topic: topic.to_owned(),
            body: serde_json::from_str(body).ok()?,
        })
    }

    /// The container the event is about.
    pub fn container(&self) -> &str {
        let field = |name: &str| self.body.get(name).and_then(Value::as_str);
        field("container_id").or_else(|| field("id")).unwrap_or_default()
    }

    /// The process the event is about: the exec's id, or the container's for its first process.
    pub fn process(&self) -> &str {
        let field = |name: &str| {
            self.body
                .get(name)
                .and_then(Value::as_str)
                .filter(|id| !id.is_empty())
        };
        field("exec_id")
            .or_else(|| field("id"))
            .unwrap_or_else(|| self.container())
    }

    /// `exit_status` of an exit or delete event; protobuf's JSON leaves zero out.
    pub fn exit_status(&self) -> u64 {
        self.body.get("exit_status").and_then(Value::as_u64).unwrap_or(0)
    }
}

/// A running subscription.
pub struct Events(Running);

impl Events {
    /// Subscribes, and returns once events arrive.
    ///
    /// # Errors
    /// When `ctr events` does not start or shows nothing.
    pub fn subscribe(daemon: &Containerd) -> Result<Self, Error> {
        let events = daemon.ctr_start(["events"], Input::Null)?;
        // The subscription has no acknowledgement: provoke events until one is seen.
        for attempt in 0.. {
            let label = format!("e2e.subscribed={attempt}");
            daemon.ctr(["namespaces", "label", daemon.namespace(), &label])?;
            let seen = events.wait_out("an event", Duration::from_secs(1), |out| {
                out.contains(" /namespaces/")
            });
            if seen.is_ok() || attempt == 60 {
                seen?;
                break;
            }
        }
        Ok(Self(events))
    }

    /// The task events of one container so far, in order.
    pub fn of(&self, container: &str) -> Vec<Event> {
        parse(&self.0.out(), container)
    }

    /// Waits until the container's task events satisfy `done`, and returns them.
    ///
    /// # Errors
    /// When they do not within `limit`; `what` names what was awaited.
    pub fn wait(
        &self,
        container: &str,
        what: &str,
        limit: Duration,
        done: impl Fn(&[Event]) -> bool,
    ) -> Result<Vec<Event>, Error> {
        self.0.wait_out(what, limit, |out| done(&parse(out, container)))?;
        Ok(self.of(container))
    }
}

/// The position of the first event with this topic and process.
pub fn position(events: &[Event], topic: &str, process: &str) -> Option<usize> {
    events
        .iter()
        .position(|event| event.topic == topic && event.process() == process)
}

fn parse(out: &str, container: &str) -> Vec<Event> {
    // The last line may be half written.
    let whole = out.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole
        .lines()
        .filter_map(Event::parse)
        .filter(|event| event.topic.starts_with("/tasks/") && event.container() == container)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_when_lines_are_mixed_keeps_whole_task_events_of_the_container() {
        let out = "2026-11-23 14:00:00.1 +0000 UTC ns /tasks/exit {\"container_id\":\"a\",\"id\":\"x\",\"exit_status\":7}\n\
                   2026-11-23 14:00:00.2 +0000 UTC ns /tasks/start {\"container_id\":\"b\",\"pid\":1}\n\
                   2026-11-23 14:00:00.2 +0000 UTC ns /containers/create {\"id\":\"a\"}\n\
                   2026-11-23 14:00:00.3 +0000 UTC ns /tasks/delete {\"container_id\":\"a\",\"pi";
        let events = parse(out, "a");
        assert_eq!(events.len(), 1);
        let exit = events.first().unwrap();
        assert_eq!(
            (exit.topic.as_str(), exit.process(), exit.exit_status()),
            ("/tasks/exit", "x", 7)
        );
        assert_eq!(position(&events, "/tasks/exit", "x"), Some(0));
    }
}
