//! Requests, responses and events between the shim and the runtime. No containerd wire types.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::SystemTime;

/// A rootfs mount that containerd asks the shim to make (or to hand to the guest).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mount {
    /// Filesystem type, e.g. `overlay` or `bind`.
    pub fs_type: String,
    /// Source of the mount.
    pub source: String,
    /// Target relative to the bundle; empty means `rootfs`.
    pub target: String,
    /// Mount options as in fstab.
    pub options: Vec<String>,
}

/// Where a process' streams go, as containerd names them: empty, a FIFO path, `fifo://`, `file://`, `binary://`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stdio {
    /// Source of stdin; empty for none.
    pub stdin: String,
    /// Sink of stdout; empty to discard.
    pub stdout: String,
    /// Sink of stderr; empty to discard; unused with a terminal.
    pub stderr: String,
    /// One pty instead of three streams.
    pub terminal: bool,
}

/// A process of a container: `exec_id` empty means the container's init.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct ContainerProcess {
    /// Container id.
    pub container_id: String,
    /// Exec id; empty for init.
    pub exec_id: String,
}

/// Options of a create request: `runtimeoptions.v1.Options`, or what is honoured of runc's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeOptions {
    /// Path of a configuration file to use instead of the default search.
    pub config_path: String,
    /// Inline configuration (containerd 2.x `config_body`); wins over `config_path`.
    pub config_body: Vec<u8>,
    /// Cgroup for the shim in place of the pod's, a path below the root of the hierarchy; empty for none.
    pub shim_cgroup: String,
}

/// Create a container; the first one of a shim also creates the sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CreateContainerRequest {
    /// Container id.
    pub container_id: String,
    /// Bundle folder with `config.json`.
    pub bundle: PathBuf,
    /// Mounts that make up the rootfs.
    pub rootfs: Vec<Mount>,
    /// Streams of init.
    pub stdio: Stdio,
    /// Options of the runtime class.
    pub options: RuntimeOptions,
}

/// Create a sandbox without a container (containerd's Sandbox API).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CreateSandboxRequest {
    /// Sandbox id.
    pub sandbox_id: String,
    /// Bundle of the sandbox. It has a `config.json` only if the client gave a spec.
    pub bundle: PathBuf,
    /// Network namespace; empty for none.
    pub netns: PathBuf,
    /// Annotations of the request, beside those of the pod.
    pub annotations: HashMap<String, String>,
    /// The pod as a CRI describes it; `None` for a client that is no CRI.
    pub pod: Option<PodConfig>,
    /// Options of the runtime class.
    pub options: RuntimeOptions,
}

/// A pod as a CRI describes it (`PodSandboxConfig`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodConfig {
    /// Host name.
    pub hostname: String,
    /// Lines of resolv.conf; empty for the host's.
    pub dns: Vec<String>,
    /// Cgroup of the host in which the pod gets its own; empty for none.
    pub cgroup_parent: PathBuf,
    /// Annotations of the pod.
    pub annotations: HashMap<String, String>,
    /// Kernel parameters of the pod's namespaces.
    pub sysctls: HashMap<String, String>,
    /// Namespaces of the host's that the pod asks to share, in config.json's words.
    pub host_namespaces: Vec<&'static str>,
    /// CPU time in each period, microseconds; 0 for no limit.
    pub cpu_quota: i64,
    /// The period, microseconds; 0 for the kernel's default.
    pub cpu_period: u64,
    /// Memory, bytes; 0 for no limit.
    pub memory: i64,
}

/// A sandbox that was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartedSandbox {
    /// Live host pid that stands for it.
    pub pid: u32,
    /// When it was ready.
    pub created_at: SystemTime,
}

/// Register another process; it runs after its StartProcess.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecProcessRequest {
    /// Container and new exec id.
    pub process: ContainerProcess,
    /// OCI `Process` as JSON.
    pub spec_json: Vec<u8>,
    /// Streams of the process.
    pub stdio: Stdio,
}

/// Change a container's limits, and its pod's bandwidth.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UpdateContainerRequest {
    /// Container id.
    pub container_id: String,
    /// The runtime-spec's LinuxResources as JSON.
    pub resources_json: Vec<u8>,
    /// Kubernetes' bandwidth annotations are the pod's; others say nothing here.
    pub annotations: HashMap<String, String>,
}

/// Status of a process, in OCI terms plus pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessStatus {
    /// Created, not started.
    Created,
    /// Running.
    Running,
    /// Frozen.
    Paused,
    /// Has exited; `exit` is set.
    Stopped,
}

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessExit {
    /// Exit status; 128 + signal when killed by one; 255 or 137 when the VM died under it.
    pub status: u32,
    /// When the exit was seen.
    pub at: SystemTime,
}

/// A process that was removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeletedProcess {
    /// The pid that stood for its container.
    pub pid: u32,
    /// How and when it ended.
    pub exit: ProcessExit,
}

/// Everything State answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessState {
    /// The process.
    pub process: ContainerProcess,
    /// Bundle of its container.
    pub bundle: PathBuf,
    /// The pid that stands for its container on the host; alive as long as the container exists.
    pub pid: u32,
    /// Status.
    pub status: ProcessStatus,
    /// Streams.
    pub stdio: Stdio,
    /// Set once stopped.
    pub exit: Option<ProcessExit>,
}

/// Figures of a container, cgroup v2 names.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ContainerStats {
    /// CPU time, microseconds: total, user, system.
    pub cpu_usec: [u64; 3],
    /// Periods of a CPU limit, those that were throttled, and microseconds of being throttled.
    pub throttling: [u64; 3],
    /// Memory.
    pub memory: MemoryFigures,
    /// Swap.
    pub swap: MemoryFigures,
    /// memory.stat of the guest cgroup.
    pub memory_stat: Vec<(String, u64)>,
    /// memory.events of the guest cgroup.
    pub memory_events: MemoryEvents,
    /// Processes now.
    pub pids_current: u64,
    /// Process limit; 0 for none.
    pub pids_limit: u64,
    /// Block devices of the guest.
    pub io: Vec<IoFigures>,
    /// Huge pages, by size as the kernel writes it: `2MB`.
    pub huge_pages: Vec<HugePageFigures>,
    /// Time stalled for want of CPU, memory and I/O; `None` where the guest's kernel does not tell.
    pub pressure: [Option<Pressure>; 3],
    /// Interfaces of the pod; none for a container in a pod of several.
    pub network: Vec<NetworkFigures>,
}

/// Memory or swap, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryFigures {
    /// Now.
    pub usage: u64,
    /// Limit; `u64::MAX` for none.
    pub limit: u64,
    /// Most so far.
    pub peak: u64,
}

/// How often each line of memory.events happened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryEvents {
    /// Reclaimed below the protected amount.
    pub low: u64,
    /// Throttled at the high limit.
    pub high: u64,
    /// About to go over the limit.
    pub max: u64,
    /// Allocations about to fail.
    pub oom: u64,
    /// Processes killed.
    pub oom_kill: u64,
}

/// Traffic of a block device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IoFigures {
    /// Major and minor number in the guest.
    pub device: (u64, u64),
    /// Bytes read and written.
    pub bytes: [u64; 2],
    /// Read and write operations.
    pub operations: [u64; 2],
}

/// Huge pages of one size.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HugePageFigures {
    /// As the kernel writes it.
    pub size: String,
    /// Bytes now.
    pub usage: u64,
    /// Most so far, bytes.
    pub peak: u64,
    /// Allocations that failed at the limit.
    pub failed: u64,
}

/// Pressure stall information.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pressure {
    /// Some process was stalled.
    pub some: PressureLine,
    /// All were.
    pub full: PressureLine,
}

/// Percent of the last 10, 60 and 300 s, and microseconds in all.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PressureLine {
    /// Percent.
    pub average: [f64; 3],
    /// Microseconds.
    pub total: u64,
}

/// Traffic of an interface: bytes, packets, errors, dropped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkFigures {
    /// Name in the guest.
    pub name: String,
    /// Received.
    pub received: [u64; 4],
    /// Sent.
    pub sent: [u64; 4],
}

/// Something containerd must hear about, in this order per process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// `/tasks/create`
    TaskCreate {
        /// Container id.
        container_id: String,
        /// Bundle.
        bundle: PathBuf,
        /// Rootfs mounts of the request.
        rootfs: Vec<Mount>,
        /// Streams.
        stdio: Stdio,
        /// Host pid.
        pid: u32,
    },
    /// `/tasks/start`
    TaskStart {
        /// Container id.
        container_id: String,
        /// Host pid.
        pid: u32,
    },
    /// `/tasks/exec-added`
    TaskExecAdded {
        /// Process.
        process: ContainerProcess,
    },
    /// `/tasks/exec-started`
    TaskExecStarted {
        /// Process.
        process: ContainerProcess,
        /// Host pid.
        pid: u32,
    },
    /// `/tasks/exit`, exactly one per started process.
    TaskExit {
        /// Process.
        process: ContainerProcess,
        /// Host pid.
        pid: u32,
        /// How it ended.
        exit: ProcessExit,
    },
    /// `/tasks/delete`
    TaskDelete {
        /// Process.
        process: ContainerProcess,
        /// Host pid.
        pid: u32,
        /// How it ended.
        exit: ProcessExit,
    },
    /// `/tasks/paused`
    TaskPaused {
        /// Container id.
        container_id: String,
    },
    /// `/tasks/resumed`
    TaskResumed {
        /// Container id.
        container_id: String,
    },
    /// `/tasks/oom`
    TaskOom {
        /// Container id.
        container_id: String,
    },
}
