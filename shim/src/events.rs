//! The runtime's events as containerd's messages.

use std::time::SystemTime;

use containerd_shim_protos::events::task as wire;
use containerd_shim_protos::shim::event::Envelope;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use runtime::types::{ContainerProcess, Event, Stdio};

use crate::convert::{path_string, timestamp, wire_mount};

/// An event packed for containerd, stamped with `time`.
///
/// # Errors
/// When the message does not encode.
pub fn envelope(namespace: &str, event: &Event, time: SystemTime) -> Result<Envelope, protobuf::Error> {
    let (topic, event) = message(event)?;
    Ok(Envelope {
        timestamp: MessageField::some(timestamp(time)),
        namespace: namespace.to_owned(),
        topic: topic.to_owned(),
        event: MessageField::some(event),
        ..Default::default()
    })
}

fn message(event: &Event) -> Result<(&'static str, Any), protobuf::Error> {
    match event {
        Event::TaskCreate {
            container_id,
            bundle,
            rootfs,
            stdio,
            pid,
        } => pack(
            "/tasks/create",
            &wire::TaskCreate {
                container_id: container_id.clone(),
                bundle: path_string(bundle),
                rootfs: rootfs.iter().map(wire_mount).collect(),
                io: MessageField::some(task_io(stdio)),
                pid: *pid,
                ..Default::default()
            },
        ),
        Event::TaskStart { container_id, pid } => pack(
            "/tasks/start",
            &wire::TaskStart {
                container_id: container_id.clone(),
                pid: *pid,
                ..Default::default()
            },
        ),
        Event::TaskExecAdded { process } => pack(
            "/tasks/exec-added",
            &wire::TaskExecAdded {
                container_id: process.container_id.clone(),
                exec_id: process.exec_id.clone(),
                ..Default::default()
            },
        ),
        Event::TaskExecStarted { process, pid } => pack(
            "/tasks/exec-started",
            &wire::TaskExecStarted {
                container_id: process.container_id.clone(),
                exec_id: process.exec_id.clone(),
                pid: *pid,
                ..Default::default()
            },
        ),
        Event::TaskExit { process, pid, exit } => pack(
            "/tasks/exit",
            &wire::TaskExit {
                container_id: process.container_id.clone(),
                id: process_id(process),
                pid: *pid,
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            },
        ),
        Event::TaskDelete { process, pid, exit } => pack(
            "/tasks/delete",
            &wire::TaskDelete {
                container_id: process.container_id.clone(),
                id: process_id(process),
                pid: *pid,
                exit_status: exit.status,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            },
        ),
        Event::TaskPaused { container_id } => pack(
            "/tasks/paused",
            &wire::TaskPaused {
                container_id: container_id.clone(),
                ..Default::default()
            },
        ),
        Event::TaskResumed { container_id } => pack(
            "/tasks/resumed",
            &wire::TaskResumed {
                container_id: container_id.clone(),
                ..Default::default()
            },
        ),
        Event::TaskOom { container_id } => pack(
            "/tasks/oom",
            &wire::TaskOOM {
                container_id: container_id.clone(),
                ..Default::default()
            },
        ),
    }
}

/// In exit and delete events init goes by the container's id, which is how clients tell it from an exec.
fn process_id(process: &ContainerProcess) -> String {
    if process.exec_id.is_empty() {
        process.container_id.clone()
    } else {
        process.exec_id.clone()
    }
}

fn task_io(stdio: &Stdio) -> wire::TaskIO {
    wire::TaskIO {
        stdin: stdio.stdin.clone(),
        stdout: stdio.stdout.clone(),
        stderr: stdio.stderr.clone(),
        terminal: stdio.terminal,
        ..Default::default()
    }
}

/// containerd's type URLs are bare message names. `NAME` has no package, and these messages all live in one.
fn pack<M: Message>(topic: &'static str, message: &M) -> Result<(&'static str, Any), protobuf::Error> {
    let value = message.write_to_bytes()?;
    Ok((
        topic,
        Any {
            type_url: format!("containerd.events.{}", M::NAME),
            value,
            ..Default::default()
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::process;
    use runtime::types::ProcessExit;
    use std::time::UNIX_EPOCH;

    fn packed(event: &Event) -> (String, String, Vec<u8>) {
        let envelope = envelope("ns", event, UNIX_EPOCH).unwrap();
        assert_eq!(envelope.namespace, "ns");
        let any = envelope.event.unwrap();
        (envelope.topic, any.type_url, any.value)
    }

    #[test]
    fn event_when_packed_has_its_topic_and_type() {
        let exit = ProcessExit {
            status: 1,
            at: UNIX_EPOCH,
        };
        let id = || "c".to_owned();
        let cases = [
            (
                Event::TaskCreate {
                    container_id: id(),
                    bundle: "/b".into(),
                    rootfs: vec![],
                    stdio: Stdio::default(),
                    pid: 1,
                },
                "/tasks/create",
                "containerd.events.TaskCreate",
            ),
            (
                Event::TaskStart {
                    container_id: id(),
                    pid: 1,
                },
                "/tasks/start",
                "containerd.events.TaskStart",
            ),
            (
                Event::TaskExecAdded {
                    process: process("c", "e"),
                },
                "/tasks/exec-added",
                "containerd.events.TaskExecAdded",
            ),
            (
                Event::TaskExecStarted {
                    process: process("c", "e"),
                    pid: 1,
                },
                "/tasks/exec-started",
                "containerd.events.TaskExecStarted",
            ),
            (
                Event::TaskExit {
                    process: process("c", ""),
                    pid: 1,
                    exit,
                },
                "/tasks/exit",
                "containerd.events.TaskExit",
            ),
            (
                Event::TaskDelete {
                    process: process("c", ""),
                    pid: 1,
                    exit,
                },
                "/tasks/delete",
                "containerd.events.TaskDelete",
            ),
            (
                Event::TaskPaused { container_id: id() },
                "/tasks/paused",
                "containerd.events.TaskPaused",
            ),
            (
                Event::TaskResumed { container_id: id() },
                "/tasks/resumed",
                "containerd.events.TaskResumed",
            ),
            (
                Event::TaskOom { container_id: id() },
                "/tasks/oom",
                "containerd.events.TaskOOM",
            ),
        ];
        for (event, topic, type_url) in cases {
            let packed = packed(&event);
            assert_eq!((packed.0.as_str(), packed.1.as_str()), (topic, type_url));
        }
    }

    #[test]
    fn exit_when_of_init_goes_by_the_container_id() {
        let exit = ProcessExit {
            status: 137,
            at: UNIX_EPOCH,
        };

        let (_, _, init) = packed(&Event::TaskExit {
            process: process("c", ""),
            pid: 9,
            exit,
        });
        let (_, _, exec) = packed(&Event::TaskExit {
            process: process("c", "e"),
            pid: 9,
            exit,
        });

        let init = wire::TaskExit::parse_from_bytes(&init).unwrap();
        let exec = wire::TaskExit::parse_from_bytes(&exec).unwrap();
        assert_eq!(
            (
                init.id.as_str(),
                init.container_id.as_str(),
                init.exit_status,
                init.pid
            ),
            ("c", "c", 137, 9)
        );
        assert_eq!((exec.id.as_str(), exec.container_id.as_str()), ("e", "c"));
    }
}
