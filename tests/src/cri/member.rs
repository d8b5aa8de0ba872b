//! One container of a pod.

use std::path::PathBuf;

use tonic::Status;

use super::pod::Pod;
use super::wire::*;
use crate::command::eventually;

/// A container being put together.
pub struct MemberSpec<'a> {
    pub(super) pod: &'a Pod<'a>,
    /// What CRI is asked for.
    pub config: ContainerConfig,
}

impl<'a> MemberSpec<'a> {
    /// Changes what CRI is asked for.
    pub fn with(mut self, change: impl FnOnce(&mut ContainerConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Changes its limits.
    pub fn limits(self, change: impl FnOnce(&mut LinuxContainerResources)) -> Self {
        self.with(|config| {
            let linux = config.linux.get_or_insert_default();
            change(linux.resources.get_or_insert_default());
        })
    }

    /// Changes its namespaces.
    pub fn namespaces(self, change: impl FnOnce(&mut NamespaceOption)) -> Self {
        self.with(|config| {
            let linux = config.linux.get_or_insert_default();
            let context = linux.security_context.get_or_insert_default();
            change(context.namespace_options.get_or_insert_default());
        })
    }

    /// Mounts a folder or file of the host's.
    pub fn mount(self, host_path: &str, container_path: &str) -> Self {
        self.with(|config| {
            config.mounts.push(Mount {
                host_path: host_path.to_owned(),
                container_path: container_path.to_owned(),
                readonly: false,
            });
        })
    }

    /// Creates it.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn try_create(self) -> Result<Member<'a>, Status> {
        let pod = self.pod;
        let log = PathBuf::from(&pod.config.log_directory).join(&self.config.log_path);
        let id = pod
            .pods
            .client()
            .create(&pod.id, self.config, pod.config.clone())?;
        Ok(Member { pod, id, log })
    }

    /// Creates it.
    #[track_caller]
    pub fn create(self) -> Member<'a> {
        self.try_create()
            .unwrap_or_else(|e| panic!("CreateContainer: {e}"))
    }

    /// Creates and starts it.
    #[track_caller]
    pub fn start(self) -> Member<'a> {
        let member = self.create();
        member.start();
        member
    }
}

/// A container of a pod; it goes with the pod.
pub struct Member<'a> {
    pod: &'a Pod<'a>,
    id: String,
    log: PathBuf,
}

/// What a command left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Its exit code.
    pub code: i32,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

impl Member<'_> {
    /// The id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Starts it.
    #[track_caller]
    pub fn start(&self) {
        let started = self.pod.pods.client().start(&self.id);
        started.unwrap_or_else(|e| panic!("StartContainer {}: {e}", self.id));
    }

    /// Stops it: SIGTERM, and SIGKILL when the limit has passed.
    #[track_caller]
    pub fn stop(&self) {
        let seconds = i64::try_from(self.pod.pods.limit().as_secs()).unwrap_or(i64::MAX);
        let stopped = self.pod.pods.client().stop(&self.id, seconds);
        stopped.unwrap_or_else(|e| panic!("StopContainer {}: {e}", self.id));
    }

    /// Removes it.
    #[track_caller]
    pub fn remove(&self) {
        let removed = self.pod.pods.client().remove(&self.id);
        removed.unwrap_or_else(|e| panic!("RemoveContainer {}: {e}", self.id));
    }

    /// What containerd says of it.
    #[track_caller]
    pub fn status(&self) -> ContainerStatus {
        let status = self.pod.pods.client().status(&self.id);
        status.unwrap_or_else(|e| panic!("ContainerStatus {}: {e}", self.id))
    }

    /// Waits for its end, and returns what containerd says of it then.
    #[track_caller]
    pub fn wait(&self) -> ContainerStatus {
        let mut status = self.status();
        let ended = eventually(self.pod.pods.limit(), || {
            status = self.status();
            status.state() == ContainerState::Exited
        });
        assert!(ended, "container {} still runs: {status:?}", self.id);
        status
    }

    /// Runs a command in it to its end.
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> Output {
        let done = self.pod.pods.client().exec_sync(&self.id, command, 0);
        let done = done.unwrap_or_else(|e| panic!("ExecSync {command:?} in {}: {e}", self.id));
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Output {
            code: done.exit_code,
            out: text(done.stdout),
            err: text(done.stderr),
        }
    }

    /// Runs a script in it that must succeed, and returns what it printed.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        let done = self.exec(&["sh", "-c", script]);
        assert_eq!(done.code, 0, "{script:?} in {}: {done:?}", self.id);
        done.out
    }

    /// The path of its log file.
    pub fn log_path(&self) -> &std::path::Path {
        &self.log
    }

    /// The lines of its log so far: stream, tag (`F`ull or `P`artial) and text.
    #[track_caller]
    pub fn log(&self) -> Vec<LogLine> {
        let text =
            std::fs::read_to_string(&self.log).unwrap_or_else(|e| panic!("log {}: {e}", self.log.display()));
        text.lines().map(LogLine::parse).collect()
    }

    /// Waits until its log satisfies `done`, and returns it.
    #[track_caller]
    pub fn wait_log(&self, what: &str, done: impl Fn(&[LogLine]) -> bool) -> Vec<LogLine> {
        let mut lines = Vec::new();
        let seen = eventually(self.pod.pods.limit(), || {
            // There from the start; read while it is written.
            lines = std::fs::read_to_string(&self.log)
                .map(|text| text.lines().map(LogLine::parse).collect())
                .unwrap_or_default();
            done(&lines)
        });
        assert!(seen, "no {what} in the log of {}: {lines:?}", self.id);
        lines
    }
}

/// A line of a container's log, as CRI has it: `TIME STREAM TAG TEXT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// `stdout` or `stderr`.
    pub stream: String,
    /// `F`, or `P` where the line goes on.
    pub tag: String,
    /// The text.
    pub text: String,
}

impl LogLine {
    fn parse(line: &str) -> Self {
        let mut parts = line.splitn(4, ' ').skip(1).map(str::to_owned);
        let mut next = || parts.next().unwrap_or_default();
        Self {
            stream: next(),
            tag: next(),
            text: next(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_line_when_text_has_spaces_keeps_them() {
        let line = LogLine::parse("2026-11-28T00:00:00.1Z stdout F a  b ");
        assert_eq!(
            (line.stream.as_str(), line.tag.as_str(), line.text.as_str()),
            ("stdout", "F", "a  b ")
        );
    }
}
