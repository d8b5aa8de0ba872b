//! Runtime specification → wire.

use std::path::Path;

use oci_spec::runtime as spec;
use protobuf::MessageField;

use crate::oci as wire;

/// Value of a device cgroup number that stands for "any".
pub(super) const ANY_DEVICE: i64 = -1;

/// The wire form of `spec`. Never fails; see [`uncarried`](super::uncarried()) for what stays behind.
pub fn spec_to_wire(spec: &spec::Spec) -> wire::Spec {
    wire::Spec {
        Version: spec.version().clone(),
        Process: message(spec.process(), process_to_wire),
        Root: message(spec.root(), |root| wire::Root {
            Path: path(root.path()),
            Readonly: root.readonly().unwrap_or_default(),
            ..Default::default()
        }),
        Hostname: string(spec.hostname()),
        Mounts: list(spec.mounts(), mount),
        Hooks: message(spec.hooks(), hooks),
        Annotations: spec.annotations().clone().unwrap_or_default(),
        Linux: message(spec.linux(), linux),
        ..Default::default()
    }
}

/// The wire form of a process, as `ExecProcess` carries it.
pub fn process_to_wire(process: &spec::Process) -> wire::Process {
    let user = process.user();
    wire::Process {
        Terminal: process.terminal().unwrap_or_default(),
        ConsoleSize: message(&process.console_size(), |size| wire::Box {
            Height: u32::try_from(size.height()).unwrap_or(u32::MAX),
            Width: u32::try_from(size.width()).unwrap_or(u32::MAX),
            ..Default::default()
        }),
        User: MessageField::some(wire::User {
            UID: user.uid(),
            GID: user.gid(),
            AdditionalGids: user.additional_gids().clone().unwrap_or_default(),
            Username: string(user.username()),
            ..Default::default()
        }),
        Args: strings(process.args()),
        Env: strings(process.env()),
        Cwd: path(process.cwd()),
        Capabilities: message(process.capabilities(), capabilities),
        Rlimits: list(process.rlimits(), |limit| wire::POSIXRlimit {
            Type: limit.typ().to_string(),
            Hard: limit.hard(),
            Soft: limit.soft(),
            ..Default::default()
        }),
        NoNewPrivileges: process.no_new_privileges().unwrap_or_default(),
        ApparmorProfile: string(process.apparmor_profile()),
        OOMScoreAdj: process.oom_score_adj().unwrap_or_default().into(),
        SelinuxLabel: string(process.selinux_label()),
        ..Default::default()
    }
}

/// The wire form of resource limits, as `UpdateContainer` carries them.
pub fn resources_to_wire(resources: &spec::LinuxResources) -> wire::LinuxResources {
    wire::LinuxResources {
        Devices: list(resources.devices(), |rule| wire::LinuxDeviceCgroup {
            Allow: rule.allow(),
            Type: rule.typ().unwrap_or_default().as_str().to_owned(),
            Major: rule.major().unwrap_or(ANY_DEVICE),
            Minor: rule.minor().unwrap_or(ANY_DEVICE),
            Access: string(rule.access()),
            ..Default::default()
        }),
        Memory: message(resources.memory(), memory),
        CPU: message(resources.cpu(), |cpu| wire::LinuxCPU {
            Shares: cpu.shares().unwrap_or_default(),
            Quota: cpu.quota().unwrap_or_default(),
            Period: cpu.period().unwrap_or_default(),
            RealtimeRuntime: cpu.realtime_runtime().unwrap_or_default(),
            RealtimePeriod: cpu.realtime_period().unwrap_or_default(),
            Cpus: string(cpu.cpus()),
            Mems: string(cpu.mems()),
            ..Default::default()
        }),
        Pids: message(resources.pids(), |pids| wire::LinuxPids {
            Limit: pids.limit(),
            ..Default::default()
        }),
        BlockIO: message(resources.block_io(), block_io),
        HugepageLimits: list(resources.hugepage_limits(), |limit| wire::LinuxHugepageLimit {
            Pagesize: limit.page_size().clone(),
            Limit: u64::try_from(limit.limit()).unwrap_or_default(),
            ..Default::default()
        }),
        Network: message(resources.network(), |network| wire::LinuxNetwork {
            ClassID: network.class_id().unwrap_or_default(),
            Priorities: list(network.priorities(), |entry| wire::LinuxInterfacePriority {
                Name: entry.name().clone(),
                Priority: entry.priority(),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn linux(linux: &spec::Linux) -> wire::Linux {
    wire::Linux {
        UIDMappings: list(linux.uid_mappings(), id_mapping),
        GIDMappings: list(linux.gid_mappings(), id_mapping),
        Sysctl: linux.sysctl().clone().unwrap_or_default(),
        Resources: message(linux.resources(), resources_to_wire),
        CgroupsPath: linux.cgroups_path().as_deref().map(path).unwrap_or_default(),
        Namespaces: list(linux.namespaces(), |namespace| wire::LinuxNamespace {
            Type: namespace.typ().to_string(),
            Path: namespace.path().as_deref().map(path).unwrap_or_default(),
            ..Default::default()
        }),
        Devices: list(linux.devices(), |device| wire::LinuxDevice {
            Path: path(device.path()),
            Type: device.typ().as_str().to_owned(),
            Major: device.major(),
            Minor: device.minor(),
            FileMode: device.file_mode().unwrap_or_default(),
            UID: device.uid().unwrap_or_default(),
            GID: device.gid().unwrap_or_default(),
            ..Default::default()
        }),
        Seccomp: message(linux.seccomp(), seccomp),
        RootfsPropagation: string(linux.rootfs_propagation()),
        MaskedPaths: strings(linux.masked_paths()),
        ReadonlyPaths: strings(linux.readonly_paths()),
        MountLabel: string(linux.mount_label()),
        IntelRdt: message(linux.intel_rdt(), |rdt| wire::LinuxIntelRdt {
            L3CacheSchema: string(rdt.l3_cache_schema()),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn id_mapping(mapping: &spec::LinuxIdMapping) -> wire::LinuxIDMapping {
    wire::LinuxIDMapping {
        HostID: mapping.host_id(),
        ContainerID: mapping.container_id(),
        Size: mapping.size(),
        ..Default::default()
    }
}

fn mount(mount: &spec::Mount) -> wire::Mount {
    wire::Mount {
        destination: path(mount.destination()),
        source: mount.source().as_deref().map(path).unwrap_or_default(),
        type_: string(mount.typ()),
        options: strings(mount.options()),
        ..Default::default()
    }
}

fn hooks(hooks: &spec::Hooks) -> wire::Hooks {
    wire::Hooks {
        Prestart: list(hooks.prestart(), hook),
        Poststart: list(hooks.poststart(), hook),
        Poststop: list(hooks.poststop(), hook),
        CreateRuntime: list(hooks.create_runtime(), hook),
        CreateContainer: list(hooks.create_container(), hook),
        StartContainer: list(hooks.start_container(), hook),
        ..Default::default()
    }
}

fn hook(hook: &spec::Hook) -> wire::Hook {
    wire::Hook {
        Path: path(hook.path()),
        Args: strings(hook.args()),
        Env: strings(hook.env()),
        Timeout: hook.timeout().unwrap_or_default(),
        ..Default::default()
    }
}

fn capabilities(sets: &spec::LinuxCapabilities) -> wire::LinuxCapabilities {
    wire::LinuxCapabilities {
        Bounding: capability_names(sets.bounding()),
        Effective: capability_names(sets.effective()),
        Inheritable: capability_names(sets.inheritable()),
        Permitted: capability_names(sets.permitted()),
        Ambient: capability_names(sets.ambient()),
        ..Default::default()
    }
}

/// Names with the `CAP_` prefix in a stable order (the source is a hash set).
fn capability_names(set: &Option<spec::Capabilities>) -> Vec<String> {
    let mut names: Vec<String> = set
        .iter()
        .flatten()
        .map(|capability| format!("CAP_{capability}"))
        .collect();
    names.sort_unstable();
    names
}

fn memory(memory: &spec::LinuxMemory) -> wire::LinuxMemory {
    wire::LinuxMemory {
        Limit: memory.limit().unwrap_or_default(),
        Reservation: memory.reservation().unwrap_or_default(),
        Swap: memory.swap().unwrap_or_default(),
        Kernel: memory.kernel().unwrap_or_default(),
        KernelTCP: memory.kernel_tcp().unwrap_or_default(),
        Swappiness: memory.swappiness().unwrap_or_default(),
        DisableOOMKiller: memory.disable_oom_killer().unwrap_or_default(),
        ..Default::default()
    }
}

fn block_io(block_io: &spec::LinuxBlockIo) -> wire::LinuxBlockIO {
    wire::LinuxBlockIO {
        Weight: block_io.weight().unwrap_or_default().into(),
        LeafWeight: block_io.leaf_weight().unwrap_or_default().into(),
        WeightDevice: list(block_io.weight_device(), |device| wire::LinuxWeightDevice {
            Major: device.major(),
            Minor: device.minor(),
            Weight: device.weight().unwrap_or_default().into(),
            LeafWeight: device.leaf_weight().unwrap_or_default().into(),
            ..Default::default()
        }),
        ThrottleReadBpsDevice: list(block_io.throttle_read_bps_device(), throttle),
        ThrottleWriteBpsDevice: list(block_io.throttle_write_bps_device(), throttle),
        ThrottleReadIOPSDevice: list(block_io.throttle_read_iops_device(), throttle),
        ThrottleWriteIOPSDevice: list(block_io.throttle_write_iops_device(), throttle),
        ..Default::default()
    }
}

fn throttle(device: &spec::LinuxThrottleDevice) -> wire::LinuxThrottleDevice {
    wire::LinuxThrottleDevice {
        Major: device.major(),
        Minor: device.minor(),
        Rate: device.rate(),
        ..Default::default()
    }
}

fn seccomp(seccomp: &spec::LinuxSeccomp) -> wire::LinuxSeccomp {
    wire::LinuxSeccomp {
        DefaultAction: serde_name(seccomp.default_action()),
        Architectures: list(seccomp.architectures(), |arch| serde_name(*arch)),
        Flags: list(seccomp.flags(), |flag| serde_name(*flag)),
        Syscalls: list(seccomp.syscalls(), |syscall| wire::LinuxSyscall {
            Names: syscall.names().clone(),
            Action: serde_name(syscall.action()),
            errnoret: syscall.errno_ret().unwrap_or_default(),
            Args: list(syscall.args(), |arg| wire::LinuxSeccompArg {
                Index: arg.index() as u64,
                Value: arg.value(),
                ValueTwo: arg.value_two().unwrap_or_default(),
                Op: serde_name(arg.op()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The name an enum has in config.json, which is also its name on the wire.
fn serde_name(value: impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        // Field-less enums always serialize to a string.
        _ => String::new(),
    }
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn string(value: &Option<String>) -> String {
    value.clone().unwrap_or_default()
}

fn strings(values: &Option<Vec<String>>) -> Vec<String> {
    values.clone().unwrap_or_default()
}

fn list<T, U>(values: &Option<Vec<T>>, convert: impl Fn(&T) -> U) -> Vec<U> {
    values.iter().flatten().map(convert).collect()
}

fn message<T, U>(value: &Option<T>, convert: impl Fn(&T) -> U) -> MessageField<U> {
    MessageField::from_option(value.as_ref().map(convert))
}
