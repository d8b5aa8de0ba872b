//! Pods of one test: each is stopped and removed when the test ends.
//!
//! Everything here panics on failure, as assertions do, after collecting the logs.

use std::collections::HashMap;
use std::fmt::Debug;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use tonic::Status;

use super::client::CriClient;
use super::cni::Subnets;
use super::config::{Cri, Series, handler};
use super::private::{self, host};
use super::wire::*;
use crate::case::Case;
use crate::command::eventually;
use crate::containerd::Containerd;
use crate::image::{BUSYBOX, PAUSE};
use crate::settings::Settings;

/// A container's first process that only waits.
const SLEEPER: &str = "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done";

/// One containerd of each series, because starting one takes seconds under emulation.
static SHARED: [OnceLock<Arc<Containerd>>; 3] = [OnceLock::new(), OnceLock::new(), OnceLock::new()];
/// Numbers of the containerds beside the shared ones.
static NEXT: AtomicU8 = AtomicU8::new(3);

/// A test that makes pods: its containerd's CRI, and the runtime its pods run under.
pub struct Pods {
    case: Case,
    client: CriClient,
    vm: bool,
    sandbox_api: bool,
    /// Addresses of the networks.
    pub subnets: Subnets,
    next: AtomicU32,
}

impl Pods {
    /// Plays `scenario` under runc, then under the runtime that is tested, and asserts that both have the same result, which is
    /// returned. Beside other tests.
    ///
    /// # Panics
    /// When the results differ.
    #[track_caller]
    pub fn like_runc<T: PartialEq + Debug>(name: &str, series: Series, scenario: impl Fn(&Self) -> T) -> T {
        Self::compare(name, series, false, false, scenario)
    }

    /// The same while no other test runs.
    ///
    /// # Panics
    /// When the results differ.
    #[track_caller]
    pub fn like_runc_alone<T: PartialEq + Debug>(
        name: &str,
        series: Series,
        scenario: impl Fn(&Self) -> T,
    ) -> T {
        Self::compare(name, series, true, false, scenario)
    }

    /// The same with sandboxes that are the shim's own (Sandbox API), where the tested runtime has them.
    ///
    /// # Panics
    /// When the results differ.
    #[track_caller]
    pub fn like_runc_sandbox_api<T: PartialEq + Debug>(name: &str, scenario: impl Fn(&Self) -> T) -> T {
        Self::compare(name, Series::V2_1, false, true, scenario)
    }

    #[track_caller]
    fn compare<T: PartialEq + Debug>(
        name: &str,
        series: Series,
        alone: bool,
        sandbox_api: bool,
        scenario: impl Fn(&Self) -> T,
    ) -> T {
        let daemon = shared(series);
        let begin = |name: &str| {
            if alone {
                Case::begin_alone_on(name, Arc::clone(&daemon))
            } else {
                Case::begin_on(name, Arc::clone(&daemon))
            }
        };
        let subnets = Subnets::new(series as u8);
        let expected = scenario(&Self::on(begin(&format!("{name}-runc")), subnets, false, false));
        if !daemon.settings.is_vm_runtime() || !daemon.settings.linux_guests {
            return expected;
        }
        let result = scenario(&Self::on(begin(name), subnets, true, sandbox_api));
        let runtime = &daemon.settings.runtime;
        assert_eq!(result, expected, "{runtime} (left) is not like runc (right)");
        result
    }

    /// Pods of the tested runtime on a containerd of their own.
    ///
    /// # Panics
    /// When it does not start.
    #[track_caller]
    pub fn on_its_own(name: &str, settings: Settings, series: Series) -> Self {
        let (daemon, subnets) = start(settings, series, NEXT.fetch_add(1, Ordering::Relaxed));
        let vm = daemon.settings.is_vm_runtime() && daemon.settings.linux_guests;
        Self::on(Case::begin_on(name, Arc::new(daemon)), subnets, vm, false)
    }

    /// Pods on the same containerd, under runc or under the tested runtime.
    pub fn beside(&self, vm: bool) -> Self {
        let case = Case::begin_on(&format!("{}-{vm}", self.case.name()), self.case.shared());
        Self::on(case, self.subnets, vm, false)
    }

    fn on(case: Case, subnets: Subnets, vm: bool, sandbox_api: bool) -> Self {
        let client = CriClient::connect(case.daemon()).unwrap_or_else(|e| panic!("{e}"));
        Self {
            case,
            client,
            vm,
            sandbox_api,
            subnets,
            next: AtomicU32::new(0),
        }
    }

    /// The test.
    pub fn case(&self) -> &Case {
        &self.case
    }

    /// The CRI client.
    pub fn client(&self) -> &CriClient {
        &self.client
    }

    /// Whether these pods are virtual machines.
    pub fn vm(&self) -> bool {
        self.vm
    }

    /// The limit of one wait.
    pub fn limit(&self) -> Duration {
        self.case.limit()
    }

    /// Runs a program beyond the host's links, where the networks `macvlan`, `ipvlan` and `vlan` lead.
    #[track_caller]
    pub fn outside(&self, words: &[&str]) -> String {
        let namespace = outside(self.subnets.instance());
        host(&[&["ip", "netns", "exec", &namespace], words].concat())
            .expect_code(0)
            .out()
    }

    /// A pod on this network, being put together.
    pub fn pod(&self, network: &str) -> PodSpec<'_> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let name = format!("pod{number}");
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                uid: format!("{}-{}-{number}", self.case.name(), std::process::id()),
                name: format!("{}-{number}", self.case.name()),
                namespace: "e2e".to_owned(),
                attempt: 0,
            }),
            hostname: name,
            log_directory: self.case.folder("log").display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    // Kubelet's default: processes apart, network and IPC shared.
                    namespace_options: Some(NamespaceOption {
                        pid: NamespaceMode::Container.into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        PodSpec {
            pods: self,
            handler: handler(self.vm, network, self.sandbox_api),
            config,
        }
    }
}

/// A shared containerd; the first who asks starts it.
#[track_caller]
fn shared(series: Series) -> Arc<Containerd> {
    let number = series as u8;
    let slot = SHARED
        .get(usize::from(number))
        .unwrap_or_else(|| panic!("no place for {series:?}"));
    let daemon = slot.get_or_init(|| Arc::new(start(Settings::from_env(), series, number).0));
    Arc::clone(daemon)
}

/// A containerd with CRI that is ready for pods.
#[track_caller]
fn start(settings: Settings, series: Series, number: u8) -> (Containerd, Subnets) {
    private::require();
    let subnets = Subnets::new(number);
    // The newer ones differ from each other above the network.
    let networks = if series == Series::V1_7 {
        host(&["sh", "-ec", &subnets.plug(&outside(number))]).expect_code(0);
        subnets.all()
    } else {
        subnets.common()
    };
    let folder = match series {
        Series::V1_6 => settings.containerd.clone(),
        newer => Settings::newer_containerd(newer.number()),
    };
    let cri = Cri {
        series,
        networks,
        plugins: settings.cni.clone(),
    };
    let settings = Settings {
        containerd: folder,
        cri: Some(cri),
        ..settings
    };
    let daemon = Containerd::start(settings).unwrap_or_else(|e| panic!("{e}"));
    let client = CriClient::connect(&daemon).unwrap_or_else(|e| panic!("{e}"));
    let mut missing = String::new();
    // CRI hears of imported images by events.
    let ready = eventually(daemon.settings.call_limit, || {
        let images = [BUSYBOX, PAUSE].map(|name| client.image(name));
        let conditions = client.unready();
        missing = format!("images {images:?}, unready {conditions:?}");
        images.iter().all(|image| matches!(image, Ok(Some(_))))
            && conditions.is_ok_and(|list| list.is_empty())
    });
    let log = crate::diagnosis::tail_of(&daemon.log(), 0);
    assert!(
        ready,
        "containerd {} is not ready for pods: {missing}\n{log}",
        series.number()
    );
    (daemon, subnets)
}

/// The network namespace that is beyond the host's links, of the containerd with this number.
fn outside(number: u8) -> String {
    format!("outside{number}")
}

/// A pod being put together.
pub struct PodSpec<'a> {
    pods: &'a Pods,
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
        let id = self.pods.client.run_pod(self.config.clone(), &self.handler)?;
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
    pods: &'a Pods,
    id: String,
    config: PodSandboxConfig,
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
        let status = self.pods.client.pod_status(&self.id);
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
        let candidates = &self.pods.case.daemon().settings.busybox;
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
        let stopped = self.pods.client.stop_pod(&self.id);
        stopped.unwrap_or_else(|e| panic!("StopPodSandbox {}: {e}", self.id));
    }

    /// Removes it.
    #[track_caller]
    pub fn remove(&self) {
        let removed = self.pods.client.remove_pod(&self.id);
        removed.unwrap_or_else(|e| panic!("RemovePodSandbox {}: {e}", self.id));
        self.gone.store(true, Ordering::Relaxed);
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        // The guest's console log goes away with the pod, so the report comes first.
        if thread::panicking() {
            self.pods.case.report();
        }
        if !self.gone.load(Ordering::Relaxed) {
            // For cleaning up: what fails is left for the leftover checks to find.
            let _ = self.pods.client.stop_pod(&self.id);
            let _ = self.pods.client.remove_pod(&self.id);
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

/// A container being put together.
pub struct MemberSpec<'a> {
    pod: &'a Pod<'a>,
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
        let id = pod.pods.client.create(&pod.id, self.config, pod.config.clone())?;
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
        let started = self.pod.pods.client.start(&self.id);
        started.unwrap_or_else(|e| panic!("StartContainer {}: {e}", self.id));
    }

    /// Stops it: SIGTERM, and SIGKILL when the limit has passed.
    #[track_caller]
    pub fn stop(&self) {
        let seconds = i64::try_from(self.pod.pods.limit().as_secs()).unwrap_or(i64::MAX);
        let stopped = self.pod.pods.client.stop(&self.id, seconds);
        stopped.unwrap_or_else(|e| panic!("StopContainer {}: {e}", self.id));
    }

    /// Removes it.
    #[track_caller]
    pub fn remove(&self) {
        let removed = self.pod.pods.client.remove(&self.id);
        removed.unwrap_or_else(|e| panic!("RemoveContainer {}: {e}", self.id));
    }

    /// What containerd says of it.
    #[track_caller]
    pub fn status(&self) -> ContainerStatus {
        let status = self.pod.pods.client.status(&self.id);
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
        let done = self.pod.pods.client.exec_sync(&self.id, command, 0);
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

/// Labels of this map, for configurations in one expression.
pub fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    pairs.iter().map(owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn netns_in_when_deep_in_the_status_is_found() {
        let value = serde_json::json!({"a": [1, {"path": "/proc/1"}, {"path": "/var/run/netns/cni-1"}]});
        assert_eq!(netns_in(&value), Some("/var/run/netns/cni-1".into()));
    }

    #[test]
    fn log_line_when_text_has_spaces_keeps_them() {
        let line = LogLine::parse("2026-11-28T00:00:00.1Z stdout F a  b ");
        assert_eq!(
            (line.stream.as_str(), line.tag.as_str(), line.text.as_str()),
            ("stdout", "F", "a  b ")
        );
    }
}
