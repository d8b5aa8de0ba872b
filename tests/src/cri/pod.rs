//! One pod: what it is made of, and what is known of it.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tonic::Status;

use super::member::{Member, MemberSpec};
use super::pods::Pods;
use super::private::host;
use super::wire::*;
use crate::image::BUSYBOX;

/// A container's first process that only waits.
const SLEEPER: &str = "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done";

/// A pod being put together.
pub struct PodSpec<'a> {
    pub(super) pods: &'a Pods,
    /// The runtime handler.
    pub handler: String,
    /// What CRI is asked for.
    pub config: PodSandboxConfig,
}

impl<'a> PodSpec<'a> {
    /// Changes what CRI is asked for.
    pub fn with(mut self, change: impl FnOnce(&mut PodSandboxConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Sets an annotation.
    pub fn annotation(self, key: &str, value: &str) -> Self {
        self.with(|config| {
            config.annotations.insert(key.to_owned(), value.to_owned());
        })
    }

    /// Maps a TCP port of the host's.
    pub fn port(self, host_port: u16, container_port: u16) -> Self {
        self.with(|config| {
            config.port_mappings.push(PortMapping {
                protocol: Protocol::Tcp.into(),
                container_port: container_port.into(),
                host_port: host_port.into(),
                host_ip: String::new(),
            });
        })
    }

    /// Sets the namespaces of the pod's containers.
    pub fn namespaces(self, change: impl FnOnce(&mut NamespaceOption)) -> Self {
        self.with(|config| {
            let linux = config.linux.get_or_insert_default();
            let context = linux.security_context.get_or_insert_default();
            change(context.namespace_options.get_or_insert_default());
        })
    }

    /// Runs it.
    #[track_caller]
    pub fn run(self) -> Pod<'a> {
        let handler = self.handler.clone();
        match self.try_run() {
            Ok(pod) => pod,
            Err(e) => panic!("RunPodSandbox under {handler}: {e}"),
        }
    }

    /// Runs it, or says why it does not.
    ///
    /// # Errors
    /// What containerd answers.
    pub fn try_run(self) -> Result<Pod<'a>, Status> {
        let id = self.pods.client().run_pod(self.config.clone(), &self.handler)?;
        Ok(Pod {
            pods: self.pods,
            id,
            config: self.config,
            next: AtomicU32::new(0),
            gone: AtomicBool::new(false),
        })
    }
}

/// A pod.
pub struct Pod<'a> {
    pub(super) pods: &'a Pods,
    pub(super) id: String,
    pub(super) config: PodSandboxConfig,
    next: AtomicU32,
    gone: AtomicBool,
}

impl<'a> Pod<'a> {
    /// The sandbox's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What containerd says of it.
    #[track_caller]
    pub fn status(&self) -> PodSandboxStatusResponse {
        let status = self.pods.client().pod_status(&self.id);
        status.unwrap_or_else(|e| panic!("PodSandboxStatus {}: {e}", self.id))
    }

    /// Whether it is ready.
    #[track_caller]
    pub fn ready(&self) -> bool {
        let status = self.status().status.unwrap_or_default();
        status.state() == PodSandboxState::Ready
    }

    /// Its addresses, the first one first.
    #[track_caller]
    pub fn addresses(&self) -> Vec<IpAddr> {
        let network = self
            .status()
            .status
            .and_then(|status| status.network)
            .unwrap_or_default();
        let more = network.additional_ips.iter().map(|more| &more.ip);
        std::iter::once(&network.ip)
            .chain(more)
            .map(|ip| ip.parse().unwrap_or_else(|e| panic!("address {ip:?}: {e}")))
            .collect()
    }

    /// Its first address.
    #[track_caller]
    pub fn address(&self) -> IpAddr {
        let addresses = self.addresses();
        *addresses
            .first()
            .unwrap_or_else(|| panic!("pod {} has no address", self.id))
    }

    /// The path of its network namespace on the host.
    #[track_caller]
    pub fn netns(&self) -> PathBuf {
        let info = self.status().info;
        let found = info
            .values()
            .filter_map(|text| serde_json::from_str(text).ok())
            .find_map(|value: Value| netns_in(&value));
        found.unwrap_or_else(|| panic!("no network namespace in the status of {}: {info:?}", self.id))
    }

    /// Runs a program of the host's in its network namespace.
    #[track_caller]
    pub fn in_netns(&self, words: &[&str]) -> String {
        let entry = format!("--net={}", self.netns().display());
        let words = [&["nsenter", &entry], words].concat();
        host(&words).expect_code(0).out()
    }

    /// The host's busybox, which is the containers' too.
    ///
    /// # Panics
    /// When there is none.
    pub fn busybox(&self) -> &str {
        let candidates = &self.pods.case().daemon().settings.busybox;
        let found = candidates.iter().find(|path| path.exists());
        found
            .and_then(|path| path.to_str())
            .unwrap_or_else(|| panic!("no busybox at {candidates:?}"))
    }

    /// The limit of one wait.
    pub fn limit(&self) -> Duration {
        self.pods.limit()
    }

    /// The process id of its shim.
    #[track_caller]
    pub fn shim(&self) -> u32 {
        let found = crate::diagnosis::processes_mentioning(&self.id);
        let line = found.iter().find(|line| line.contains("containerd-shim"));
        line.and_then(|line| line.split(' ').next()?.parse().ok())
            .unwrap_or_else(|| panic!("no shim of {} among {found:?}", self.id))
    }

    /// A container in it, being put together: busybox with this command.
    pub fn container(&self, command: &[&str]) -> MemberSpec<'_> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let name = format!("container{number}");
        let config = ContainerConfig {
            log_path: format!("{}-{name}.log", self.id),
            metadata: Some(ContainerMetadata { name, attempt: 0 }),
            image: Some(ImageSpec {
                image: BUSYBOX.to_owned(),
            }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            linux: Some(LinuxContainerConfig {
                security_context: Some(LinuxContainerSecurityContext {
                    // Those of the pod.
                    namespace_options: self
                        .config
                        .linux
                        .as_ref()
                        .and_then(|linux| linux.security_context.as_ref())
                        .and_then(|context| context.namespace_options.clone()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        MemberSpec { pod: self, config }
    }

    /// A running web server on port 8080 whose answer is `body`, and a line feed.
    #[track_caller]
    pub fn web(&self, body: &str) -> Member<'_> {
        let script = format!("mkdir /www; echo '{body}' >/www/index.html; exec httpd -f -p 8080 -h /www");
        self.container(&["sh", "-c", &script]).start()
    }

    /// A running container that only waits.
    #[track_caller]
    pub fn sleeping(&self) -> Member<'_> {
        self.container(&["sh", "-c", SLEEPER]).start()
    }

    /// Stops it.
    #[track_caller]
    pub fn stop(&self) {
        let stopped = self.pods.client().stop_pod(&self.id);
        stopped.unwrap_or_else(|e| panic!("StopPodSandbox {}: {e}", self.id));
    }

    /// Removes it.
    #[track_caller]
    pub fn remove(&self) {
        let removed = self.pods.client().remove_pod(&self.id);
        removed.unwrap_or_else(|e| panic!("RemovePodSandbox {}: {e}", self.id));
        self.gone.store(true, Ordering::Relaxed);
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // The guest's console log goes away with the pod, so the report comes first.
        if thread::panicking() {
            self.pods.case().report();
        }
        if !self.gone.load(Ordering::Relaxed) {
            // For cleaning up: what fails is left for the leftover checks to find.
            let _ = self.pods.client().stop_pod(&self.id);
            let _ = self.pods.client().remove_pod(&self.id);
        }
    }
}

/// A path below `/run/netns` anywhere in containerd's view of a sandbox, whose layout differs between versions.
fn netns_in(value: &Value) -> Option<PathBuf> {
    match value {
        Value::String(text) => {
            let below = text.starts_with("/var/run/netns/") || text.starts_with("/run/netns/");
            below.then(|| PathBuf::from(text))
        }
        Value::Array(values) => values.iter().find_map(netns_in),
        Value::Object(fields) => fields.values().find_map(netns_in),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn netns_in_when_deep_in_the_status_is_found() {
        let value = serde_json::json!({"a": [1, {"path": "/proc/1"}, {"path": "/var/run/netns/cni-1"}]});
        assert_eq!(netns_in(&value), Some("/var/run/netns/cni-1".into()));
    }
}
