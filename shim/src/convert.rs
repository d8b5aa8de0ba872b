//! Between containerd's messages and the runtime's types, both ways.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api;
use containerd_shim_protos::cgroups_v2::metrics;
use containerd_shim_protos::sandbox_api;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{EnumOrUnknown, Message, MessageField};
use runtime::error::{Error, ErrorKind, Result};
use runtime::types::{
    ContainerProcess, ContainerStats, CreateContainerRequest, CreateSandboxRequest, ExecProcessRequest,
    HugePageFigures, IoFigures, Mount, NetworkFigures, Pressure, PressureLine, ProcessState, ProcessStatus,
    Stdio, UpdateContainerRequest,
};

use crate::bundle::Bundle;
use crate::{options, pod};

/// Type of [`stats`]; containerd looks for exactly this, without a host.
pub const METRICS_TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// Message name at the end of the type URL of an exec's process.
const PROCESS_TYPE: &str = "opencontainers/runtime-spec/1/Process";

/// Message name at the end of the type URL of an update's resources.
const RESOURCES_TYPE: &str = "opencontainers/runtime-spec/1/LinuxResources";

/// A container's process; an empty `exec_id` is its init.
pub fn process(container_id: &str, exec_id: &str) -> ContainerProcess {
    ContainerProcess {
        container_id: container_id.to_owned(),
        exec_id: exec_id.to_owned(),
    }
}

/// A point in time as protobuf has it.
pub fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
        ..Default::default()
    }
}

/// Create, as the runtime wants it.
///
/// # Errors
/// `InvalidArgument` for options that do not decode, `Unimplemented` for a restore from a checkpoint.
pub fn create_request(request: api::CreateTaskRequest) -> Result<CreateContainerRequest> {
    if !request.checkpoint.is_empty() {
        return Err(Error::new(
            ErrorKind::Unimplemented,
            format!(
                "restoring container {} from checkpoint {} is not supported",
                request.id, request.checkpoint
            ),
        ));
    }
    Ok(CreateContainerRequest {
        options: options::decode(request.options.as_ref())?,
        container_id: request.id,
        bundle: request.bundle.into(),
        rootfs: request.rootfs.into_iter().map(mount).collect(),
        stdio: Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        },
    })
}

/// CreateSandbox, as the runtime wants it. The options of the runtime class are not in the request but in the bundle, where
/// `start` has put them.
///
/// # Errors
/// `InvalidArgument` for options that do not decode, `Unimplemented` for a root filesystem, which no sandbox here has.
pub fn sandbox_request(request: sandbox_api::CreateSandboxRequest) -> Result<CreateSandboxRequest> {
    if !request.rootfs.is_empty() {
        let message = format!(
            "sandbox {}: a root filesystem of its own is not supported",
            request.sandbox_id
        );
        return Err(Error::new(ErrorKind::Unimplemented, message));
    }
    let bundle = Bundle::new(&request.bundle_path);
    let kept = bundle
        .options()
        .map_err(|error| Error::new(ErrorKind::Internal, error.to_string()))?;
    let kept = kept.map(|bytes| Any::parse_from_bytes(&bytes)).transpose();
    let kept = kept.map_err(|error| {
        let message = format!("options in {}: {error}", request.bundle_path);
        Error::new(ErrorKind::InvalidArgument, message)
    })?;
    let pod = pod::decode(request.options.as_ref())?;
    let given = request.options.as_ref();
    let given = given.filter(|any| pod.is_none() && !any.type_url.is_empty());
    let options = match given {
        Some(any) if options::is_options(any) => given,
        Some(any) => {
            tracing::warn!(type_url = %any.type_url, "options of the sandbox are not a pod: ignored");
            kept.as_ref()
        }
        None => kept.as_ref(),
    };
    Ok(CreateSandboxRequest {
        options: options::decode(options)?,
        pod,
        sandbox_id: request.sandbox_id,
        bundle: request.bundle_path.into(),
        netns: request.netns_path.into(),
        annotations: request.annotations,
    })
}

/// Exec, as the runtime wants it.
///
/// # Errors
/// `InvalidArgument` without an exec id or with a spec that is not an OCI process.
pub fn exec_request(request: api::ExecProcessRequest) -> Result<ExecProcessRequest> {
    if request.exec_id.is_empty() {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("exec in container {} without an exec id", request.id),
        ));
    }
    let what = format!("spec of exec {} in container {}", request.exec_id, request.id);
    Ok(ExecProcessRequest {
        process: process(&request.id, &request.exec_id),
        spec_json: json_of(request.spec.into_option(), PROCESS_TYPE, &what)?,
        stdio: Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        },
    })
}

/// An update, with its resources as JSON.
///
/// # Errors
/// `InvalidArgument` when these are missing or of another type.
pub fn update_request(request: api::UpdateTaskRequest) -> Result<UpdateContainerRequest> {
    let what = format!("resources of an update of container {}", request.id);
    Ok(UpdateContainerRequest {
        resources_json: json_of(request.resources.into_option(), RESOURCES_TYPE, &what)?,
        container_id: request.id,
        annotations: request.annotations,
    })
}

/// containerd's typeurl packs OCI values as JSON under a type URL that ends with `wanted`.
fn json_of(any: Option<Any>, wanted: &str, what: &str) -> Result<Vec<u8>> {
    let any = any.ok_or_else(|| Error::new(ErrorKind::InvalidArgument, format!("{what}: missing")))?;
    if !any.type_url.ends_with(wanted) {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            format!("{what}: type {:?} instead of …/{wanted}", any.type_url),
        ));
    }
    Ok(any.value)
}

fn mount(mount: api::Mount) -> Mount {
    Mount {
        fs_type: mount.type_,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    }
}

/// The way back of [`mount`], for the create event.
pub fn wire_mount(mount: &Mount) -> api::Mount {
    api::Mount {
        type_: mount.fs_type.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
        ..Default::default()
    }
}

/// A path as a protobuf string.
pub fn path_string(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// State's answer.
pub fn state_response(state: ProcessState) -> api::StateResponse {
    let status = match state.status {
        ProcessStatus::Created => api::Status::CREATED,
        ProcessStatus::Running => api::Status::RUNNING,
        ProcessStatus::Paused => api::Status::PAUSED,
        ProcessStatus::Stopped => api::Status::STOPPED,
    };
    api::StateResponse {
        id: state.process.container_id,
        exec_id: state.process.exec_id,
        bundle: path_string(&state.bundle),
        pid: state.pid,
        status: EnumOrUnknown::new(status),
        stdin: state.stdio.stdin,
        stdout: state.stdio.stdout,
        stderr: state.stdio.stderr,
        terminal: state.stdio.terminal,
        exit_status: state.exit.map_or(0, |exit| exit.status),
        exited_at: MessageField::from_option(state.exit.map(|exit| timestamp(exit.at))),
        ..Default::default()
    }
}

/// Figures in the cgroup v2 form, which every containerd accepts whatever the host's cgroups are.
///
/// # Errors
/// `Internal` when they do not encode.
pub fn stats(stats: &ContainerStats) -> Result<Any> {
    let [cpu_pressure, memory_pressure, io_pressure] = stats.pressure.map(psi);
    let [usage_usec, user_usec, system_usec] = stats.cpu_usec;
    let [nr_periods, nr_throttled, throttled_usec] = stats.throttling;
    let message = metrics::Metrics {
        pids: MessageField::some(metrics::PidsStat {
            current: stats.pids_current,
            limit: stats.pids_limit,
            ..Default::default()
        }),
        cpu: MessageField::some(metrics::CPUStat {
            usage_usec,
            user_usec,
            system_usec,
            nr_periods,
            nr_throttled,
            throttled_usec,
            psi: cpu_pressure,
            ..Default::default()
        }),
        memory: MessageField::some(metrics::MemoryStat {
            psi: memory_pressure,
            ..memory(stats)
        }),
        memory_events: MessageField::some(metrics::MemoryEvents {
            low: stats.memory_events.low,
            high: stats.memory_events.high,
            max: stats.memory_events.max,
            oom: stats.memory_events.oom,
            oom_kill: stats.memory_events.oom_kill,
            ..Default::default()
        }),
        io: MessageField::some(metrics::IOStat {
            usage: stats.io.iter().map(io_entry).collect(),
            psi: io_pressure,
            ..Default::default()
        }),
        hugetlb: stats.huge_pages.iter().map(huge_pages).collect(),
        network: stats.network.iter().map(network).collect(),
        ..Default::default()
    };
    let value = message
        .write_to_bytes()
        .map_err(|error| Error::new(ErrorKind::Internal, format!("encoding metrics: {error}")))?;
    Ok(Any {
        type_url: METRICS_TYPE_URL.to_owned(),
        value,
        ..Default::default()
    })
}

fn memory(stats: &ContainerStats) -> metrics::MemoryStat {
    let mut memory = metrics::MemoryStat {
        usage: stats.memory.usage,
        usage_limit: stats.memory.limit,
        max_usage: stats.memory.peak,
        swap_usage: stats.swap.usage,
        swap_limit: stats.swap.limit,
        swap_max_usage: stats.swap.peak,
        ..Default::default()
    };
    for (name, value) in &stats.memory_stat {
        if let Some(field) = memory_field(&mut memory, name) {
            *field = *value;
        }
    }
    memory
}

fn psi(pressure: Option<Pressure>) -> MessageField<metrics::PSIStats> {
    let line = |line: PressureLine| {
        let [avg10, avg60, avg300] = line.average;
        MessageField::some(metrics::PSIData {
            avg10,
            avg60,
            avg300,
            total: line.total,
            ..Default::default()
        })
    };
    let stats = pressure.map(|pressure| metrics::PSIStats {
        some: line(pressure.some),
        full: line(pressure.full),
        ..Default::default()
    });
    MessageField::from_option(stats)
}

fn io_entry(figures: &IoFigures) -> metrics::IOEntry {
    let (major, minor) = figures.device;
    let ([rbytes, wbytes], [rios, wios]) = (figures.bytes, figures.operations);
    metrics::IOEntry {
        major,
        minor,
        rbytes,
        wbytes,
        rios,
        wios,
        ..Default::default()
    }
}

fn huge_pages(figures: &HugePageFigures) -> metrics::HugeTlbStat {
    metrics::HugeTlbStat {
        pagesize: figures.size.clone(),
        current: figures.usage,
        max: figures.peak,
        failcnt: figures.failed,
        ..Default::default()
    }
}

fn network(figures: &NetworkFigures) -> metrics::NetworkStat {
    let [rx_bytes, rx_packets, rx_errors, rx_dropped] = figures.received;
    let [tx_bytes, tx_packets, tx_errors, tx_dropped] = figures.sent;
    metrics::NetworkStat {
        name: figures.name.clone(),
        rx_bytes,
        rx_packets,
        rx_errors,
        rx_dropped,
        tx_bytes,
        tx_packets,
        tx_errors,
        tx_dropped,
        ..Default::default()
    }
}

/// The message field of a line of the kernel's memory.stat.
fn memory_field<'a>(memory: &'a mut metrics::MemoryStat, name: &str) -> Option<&'a mut u64> {
    Some(match name {
        "anon" => &mut memory.anon,
        "file" => &mut memory.file,
        "kernel_stack" => &mut memory.kernel_stack,
        "slab" => &mut memory.slab,
        "sock" => &mut memory.sock,
        "shmem" => &mut memory.shmem,
        "file_mapped" => &mut memory.file_mapped,
        "file_dirty" => &mut memory.file_dirty,
        "file_writeback" => &mut memory.file_writeback,
        "anon_thp" => &mut memory.anon_thp,
        "inactive_anon" => &mut memory.inactive_anon,
        "active_anon" => &mut memory.active_anon,
        "inactive_file" => &mut memory.inactive_file,
        "active_file" => &mut memory.active_file,
        "unevictable" => &mut memory.unevictable,
        "slab_reclaimable" => &mut memory.slab_reclaimable,
        "slab_unreclaimable" => &mut memory.slab_unreclaimable,
        "pgfault" => &mut memory.pgfault,
        "pgmajfault" => &mut memory.pgmajfault,
        "workingset_refault" => &mut memory.workingset_refault,
        "workingset_activate" => &mut memory.workingset_activate,
        "workingset_nodereclaim" => &mut memory.workingset_nodereclaim,
        "pgrefill" => &mut memory.pgrefill,
        "pgscan" => &mut memory.pgscan,
        "pgsteal" => &mut memory.pgsteal,
        "pgactivate" => &mut memory.pgactivate,
        "pgdeactivate" => &mut memory.pgdeactivate,
        "pglazyfree" => &mut memory.pglazyfree,
        "pglazyfreed" => &mut memory.pglazyfreed,
        "thp_fault_alloc" => &mut memory.thp_fault_alloc,
        "thp_collapse_alloc" => &mut memory.thp_collapse_alloc,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use runtime::types::{MemoryEvents, MemoryFigures, ProcessExit};
    use std::time::Duration;

    #[test]
    fn create_when_converted_carries_everything() {
        let request = api::CreateTaskRequest {
            id: "c1".into(),
            bundle: "/b".into(),
            rootfs: vec![api::Mount {
                type_: "overlay".into(),
                source: "overlay".into(),
                target: "t".into(),
                options: vec!["ro".into()],
                ..Default::default()
            }],
            terminal: true,
            stdin: "i".into(),
            stdout: "o".into(),
            stderr: "e".into(),
            ..Default::default()
        };

        let created = create_request(request).unwrap();

        assert_eq!(
            (created.container_id.as_str(), created.bundle.as_path()),
            ("c1", Path::new("/b"))
        );
        assert_eq!(wire_mount(&created.rootfs[0]).options, ["ro"]);
        assert_eq!(
            (
                created.rootfs[0].fs_type.as_str(),
                created.rootfs[0].target.as_str()
            ),
            ("overlay", "t")
        );
        assert_eq!(
            (created.stdio.stdin.as_str(), created.stdio.stdout.as_str()),
            ("i", "o")
        );
        assert!(created.stdio.terminal);
    }

    #[test]
    fn create_when_from_a_checkpoint_is_unimplemented() {
        let request = api::CreateTaskRequest {
            id: "c1".into(),
            checkpoint: "/cp".into(),
            ..Default::default()
        };

        let error = create_request(request).unwrap_err();

        assert_eq!(error.kind, ErrorKind::Unimplemented);
        assert!(error.message.contains("/cp"));
    }

    #[test]
    fn exec_when_without_id_or_process_is_refused() {
        let mut request = api::ExecProcessRequest {
            id: "c".into(),
            ..Default::default()
        };
        assert_eq!(
            exec_request(request.clone()).unwrap_err().kind,
            ErrorKind::InvalidArgument
        );

        request.exec_id = "e".into();
        assert!(
            exec_request(request.clone())
                .unwrap_err()
                .message
                .contains("missing")
        );

        let mut any = Any {
            type_url: "x/y".into(),
            value: b"{}".to_vec(),
            ..Default::default()
        };
        request.spec = MessageField::some(any.clone());
        assert!(
            exec_request(request.clone())
                .unwrap_err()
                .message
                .contains("\"x/y\"")
        );

        any.type_url = format!("types.containerd.io/{PROCESS_TYPE}");
        request.spec = MessageField::some(any);
        assert_eq!(exec_request(request).unwrap().spec_json, b"{}");
    }

    #[test]
    fn state_when_stopped_has_exit_status_and_time() {
        let at = UNIX_EPOCH + Duration::new(7, 9);
        let state = ProcessState {
            process: process("c", "e"),
            bundle: "/b".into(),
            pid: 3,
            status: ProcessStatus::Stopped,
            stdio: Stdio::default(),
            exit: Some(ProcessExit { status: 137, at }),
        };

        let response = state_response(state);

        assert_eq!(response.status.enum_value(), Ok(api::Status::STOPPED));
        assert_eq!(
            (
                response.exit_status,
                response.exited_at.seconds,
                response.exited_at.nanos
            ),
            (137, 7, 9)
        );
        assert_eq!((response.id.as_str(), response.exec_id.as_str()), ("c", "e"));
    }

    #[test]
    fn state_when_running_has_no_exit_time() {
        let state = ProcessState {
            process: process("c", ""),
            bundle: "/b".into(),
            pid: 3,
            status: ProcessStatus::Running,
            stdio: Stdio::default(),
            exit: None,
        };

        assert!(state_response(state).exited_at.is_none());
    }

    #[test]
    fn stats_when_converted_are_cgroup_v2_metrics() {
        let figures = ContainerStats {
            cpu_usec: [30, 20, 10],
            throttling: [3, 2, 1],
            memory: MemoryFigures {
                usage: 4096,
                limit: u64::MAX,
                peak: 8192,
            },
            swap: MemoryFigures {
                usage: 6,
                ..Default::default()
            },
            memory_stat: vec![
                ("inactive_file".into(), 5),
                ("pgscan".into(), 8),
                ("not_a_field".into(), 1),
            ],
            memory_events: MemoryEvents {
                oom_kill: 7,
                ..Default::default()
            },
            pids_current: 2,
            io: vec![IoFigures {
                device: (8, 1),
                bytes: [1, 2],
                operations: [3, 4],
            }],
            huge_pages: vec![HugePageFigures {
                size: "2MB".into(),
                failed: 9,
                ..Default::default()
            }],
            pressure: [None, Some(Pressure::default()), None],
            network: vec![NetworkFigures {
                name: "eth0".into(),
                sent: [1, 2, 3, 4],
                ..Default::default()
            }],
            ..Default::default()
        };

        let any = stats(&figures).unwrap();
        let message = metrics::Metrics::parse_from_bytes(&any.value).unwrap();

        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        assert_eq!(
            (
                message.cpu.usage_usec,
                message.cpu.user_usec,
                message.cpu.system_usec
            ),
            (30, 20, 10)
        );
        let memory = &message.memory;
        assert_eq!((memory.usage, memory.inactive_file, memory.pgscan), (4096, 5, 8));
        assert_eq!((memory.max_usage, memory.swap_usage), (8192, 6));
        assert_eq!((message.cpu.nr_periods, message.cpu.throttled_usec), (3, 1));
        assert_eq!((message.memory_events.oom_kill, message.pids.current), (7, 2));
        let io = &message.io.usage[0];
        assert_eq!((io.major, io.wbytes, io.rios), (8, 2, 3));
        assert_eq!(
            (message.hugetlb[0].pagesize.as_str(), message.hugetlb[0].failcnt),
            ("2MB", 9)
        );
        assert!(
            message.memory.psi.is_some() && message.cpu.psi.is_none(),
            "what is not known is not 0"
        );
        assert_eq!(
            (message.network[0].name.as_str(), message.network[0].tx_dropped),
            ("eth0", 4)
        );
    }
}
