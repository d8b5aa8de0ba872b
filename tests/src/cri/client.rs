//! The calls of CRI v1, as kubelet makes them.

use tonic::Status;

use super::spdy::{self, Connection};
use super::wire::*;
use crate::containerd::Containerd;
use crate::grpc::Client;

/// A client of one containerd's CRI plugin.
pub struct CriClient {
    client: Client,
}

impl CriClient {
    /// Connects to a containerd.
    ///
    /// # Errors
    /// When the socket does not answer.
    pub fn connect(daemon: &Containerd) -> Result<Self, Box<dyn std::error::Error>> {
        Ok(Self {
            client: Client::connect(daemon)?,
        })
    }

    /// The conditions that do not hold; empty when runtime and network are ready.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn unready(&self) -> Result<Vec<String>, Status> {
        let answer: StatusResponse = self.client.call("runtime.v1.RuntimeService/Status", Empty {})?;
        let conditions = answer.status.unwrap_or_default().conditions;
        let failed = conditions.into_iter().filter(|condition| !condition.status);
        Ok(failed
            .map(|condition| format!("{}: {}", condition.r#type, condition.message))
            .collect())
    }

    /// The image's id; `None` while CRI does not know it.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn image(&self, name: &str) -> Result<Option<Image>, Status> {
        let request = ImageStatusRequest {
            image: Some(ImageSpec {
                image: name.to_owned(),
            }),
        };
        let answer: ImageStatusResponse = self.client.call("runtime.v1.ImageService/ImageStatus", request)?;
        Ok(answer.image)
    }

    /// Runs a sandbox under this handler; returns its id.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn run_pod(&self, config: PodSandboxConfig, handler: &str) -> Result<String, Status> {
        let request = RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: handler.to_owned(),
        };
        let answer: RunPodSandboxResponse = self
            .client
            .call("runtime.v1.RuntimeService/RunPodSandbox", request)?;
        Ok(answer.pod_sandbox_id)
    }

    /// Stops a sandbox and everything in it.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn stop_pod(&self, id: &str) -> Result<(), Status> {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        self.call("runtime.v1.RuntimeService/StopPodSandbox", request)
    }

    /// Removes a sandbox and everything in it.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn remove_pod(&self, id: &str) -> Result<(), Status> {
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        self.call("runtime.v1.RuntimeService/RemovePodSandbox", request)
    }

    /// The sandbox's status, with containerd's own view of it in `info`.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn pod_status(&self, id: &str) -> Result<PodSandboxStatusResponse, Status> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: id.to_owned(),
            verbose: true,
        };
        self.client
            .call("runtime.v1.RuntimeService/PodSandboxStatus", request)
    }

    /// Creates a container in a sandbox; returns its id.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn create(
        &self,
        pod: &str,
        config: ContainerConfig,
        sandbox: PodSandboxConfig,
    ) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox),
        };
        let answer: CreateContainerResponse = self
            .client
            .call("runtime.v1.RuntimeService/CreateContainer", request)?;
        Ok(answer.container_id)
    }

    /// Starts a created container.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn start(&self, id: &str) -> Result<(), Status> {
        let request = StartContainerRequest {
            container_id: id.to_owned(),
        };
        self.call("runtime.v1.RuntimeService/StartContainer", request)
    }

    /// Stops a container: SIGTERM, and SIGKILL after `timeout` seconds.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn stop(&self, id: &str, timeout: i64) -> Result<(), Status> {
        let request = StopContainerRequest {
            container_id: id.to_owned(),
            timeout,
        };
        self.call("runtime.v1.RuntimeService/StopContainer", request)
    }

    /// Removes a container.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn remove(&self, id: &str) -> Result<(), Status> {
        let request = RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        self.call("runtime.v1.RuntimeService/RemoveContainer", request)
    }

    /// The container's status.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn status(&self, id: &str) -> Result<ContainerStatus, Status> {
        let request = ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        let answer: ContainerStatusResponse = self
            .client
            .call("runtime.v1.RuntimeService/ContainerStatus", request)?;
        answer.status.ok_or_else(|| Status::not_found("empty answer"))
    }

    /// Runs a command to its end, or until `timeout` seconds have passed; 0 is no limit.
    ///
    /// # Errors
    /// What containerd answers: `DEADLINE_EXCEEDED` when the time was up.
    pub fn exec_sync(&self, id: &str, command: &[&str], timeout: i64) -> Result<ExecSyncResponse, Status> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: words(command),
            timeout,
        };
        self.client.call("runtime.v1.RuntimeService/ExecSync", request)
    }

    /// Runs a command with streams.
    ///
    /// # Errors
    /// What containerd answers, or a fault of the stream.
    pub fn exec(&self, id: &str, command: &[&str], tty: bool) -> Result<Connection, spdy::Error> {
        let request = ExecRequest {
            container_id: id.to_owned(),
            cmd: words(command),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        let answer: Stream = self.client.call("runtime.v1.RuntimeService/Exec", request)?;
        Connection::open(&answer.url, spdy::REMOTE_COMMAND, spdy::command_streams(tty))
    }

    /// Attaches to a container's first process.
    ///
    /// # Errors
    /// What containerd answers, or a fault of the stream.
    pub fn attach(&self, id: &str, tty: bool) -> Result<Connection, spdy::Error> {
        let request = AttachRequest {
            container_id: id.to_owned(),
            stdin: true,
            tty,
            stdout: true,
            stderr: !tty,
        };
        let answer: Stream = self.client.call("runtime.v1.RuntimeService/Attach", request)?;
        Connection::open(&answer.url, spdy::REMOTE_COMMAND, spdy::command_streams(tty))
    }

    /// Opens one connection to a port of the pod's localhost.
    ///
    /// # Errors
    /// What containerd answers, or a fault of the stream.
    pub fn port_forward(&self, pod: &str, port: u16) -> Result<Connection, spdy::Error> {
        let request = PortForwardRequest {
            pod_sandbox_id: pod.to_owned(),
            port: vec![port.into()],
        };
        let answer: Stream = self
            .client
            .call("runtime.v1.RuntimeService/PortForward", request)?;
        Connection::open(&answer.url, spdy::PORT_FORWARD, spdy::port_streams(port))
    }

    /// What a container uses.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn stats(&self, id: &str) -> Result<ContainerStats, Status> {
        let request = ContainerStatsRequest {
            container_id: id.to_owned(),
        };
        let answer: ContainerStatsResponse = self
            .client
            .call("runtime.v1.RuntimeService/ContainerStats", request)?;
        answer.stats.ok_or_else(|| Status::not_found("empty answer"))
    }

    /// What a sandbox uses.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn pod_stats(&self, id: &str) -> Result<LinuxPodSandboxStats, Status> {
        let request = PodSandboxStatsRequest {
            pod_sandbox_id: id.to_owned(),
        };
        let answer: PodSandboxStatsResponse = self
            .client
            .call("runtime.v1.RuntimeService/PodSandboxStats", request)?;
        let linux = answer.stats.and_then(|stats| stats.linux);
        linux.ok_or_else(|| Status::not_found("empty answer"))
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn update(&self, id: &str, linux: LinuxContainerResources) -> Result<(), Status> {
        let request = UpdateContainerResourcesRequest {
            container_id: id.to_owned(),
            linux: Some(linux),
        };
        self.call("runtime.v1.RuntimeService/UpdateContainerResources", request)
    }

    /// Has the container's log written to a new file: the old one was moved away.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn reopen_log(&self, id: &str) -> Result<(), Status> {
        let request = ReopenContainerLogRequest {
            container_id: id.to_owned(),
        };
        self.call("runtime.v1.RuntimeService/ReopenContainerLog", request)
    }

    /// A call whose answer says nothing.
    fn call<Q>(&self, method: &'static str, request: Q) -> Result<(), Status>
    where
        Q: prost::Message + Send + Sync + 'static,
    {
        self.client.call::<_, Empty>(method, request).map(drop)
    }
}

fn words(command: &[&str]) -> Vec<String> {
    command.iter().map(|&word| word.to_owned()).collect()
}
