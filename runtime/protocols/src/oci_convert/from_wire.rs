//! Wire → runtime specification. The sender is not trusted: every name and number is checked.

use std::collections::HashMap;
use std::path::PathBuf;
use std::str::FromStr;

use oci_spec::runtime as spec;
use protobuf::MessageField;

use super::FromWireError;
use crate::oci as wire;

/// The specification a `CreateContainer` message describes.
///
/// # Errors
/// A name that the specification does not know, or a number that does not fit its field.
pub fn spec_from_wire(message: &wire::Spec) -> Result<spec::Spec, FromWireError> {
    let mut out = spec::Spec::default();
    out.set_version(message.Version.clone())
        .set_process(optional(&message.Process, process_from_wire)?)
        .set_root(message.Root.as_ref().map(|root| {
            let mut out = spec::Root::default();
            out.set_path(PathBuf::from(&root.Path))
                .set_readonly(Some(root.Readonly));
            out
        }))
        .set_hostname(text(&message.Hostname))
        .set_mounts(list(&message.Mounts, |entry| Ok(mount(entry)))?)
        .set_hooks(message.Hooks.as_ref().map(hooks))
        .set_annotations(map(&message.Annotations))
        .set_linux(optional(&message.Linux, linux)?);
    Ok(out)
}

/// The process an `ExecProcess` message describes.
///
/// # Errors
/// An unknown capability or rlimit name, or an out of range `oomScoreAdj`.
pub fn process_from_wire(message: &wire::Process) -> Result<spec::Process, FromWireError> {
    let mut user = spec::User::default();
    if let Some(from) = message.User.as_ref() {
        user.set_uid(from.UID)
            .set_gid(from.GID)
            .set_additional_gids(some_unless_empty(&from.AdditionalGids))
            .set_username(text(&from.Username));
    }
    let oom_score_adj = in_range("process.oomScoreAdj", message.OOMScoreAdj)?;

    let mut out = spec::Process::default();
    out.set_terminal(Some(message.Terminal))
        .set_console_size(optional(&message.ConsoleSize, console_size)?)
        .set_user(user)
        .set_args(some_unless_empty(&message.Args))
        .set_env(some_unless_empty(&message.Env))
        .set_cwd(PathBuf::from(&message.Cwd))
        .set_capabilities(optional(&message.Capabilities, capabilities)?)
        .set_rlimits(list(&message.Rlimits, rlimit)?)
        .set_no_new_privileges(Some(message.NoNewPrivileges))
        .set_apparmor_profile(text(&message.ApparmorProfile))
        .set_oom_score_adj(Some(oom_score_adj).filter(|adj| *adj != 0))
        .set_selinux_label(text(&message.SelinuxLabel));
    Ok(out)
}

/// The limits an `UpdateContainer` message describes.
///
/// # Errors
/// An unknown device type, or a weight or limit that does not fit its field.
pub fn resources_from_wire(message: &wire::LinuxResources) -> Result<spec::LinuxResources, FromWireError> {
    let mut out = spec::LinuxResources::default();
    out.set_devices(list(&message.Devices, device_cgroup)?)
        .set_memory(message.Memory.as_ref().map(memory))
        .set_cpu(message.CPU.as_ref().map(|cpu| {
            let mut out = spec::LinuxCpu::default();
            out.set_shares(nonzero(cpu.Shares))
                .set_quota(nonzero(cpu.Quota))
                .set_period(nonzero(cpu.Period))
                .set_realtime_runtime(nonzero(cpu.RealtimeRuntime))
                .set_realtime_period(nonzero(cpu.RealtimePeriod))
                .set_cpus(text(&cpu.Cpus))
                .set_mems(text(&cpu.Mems));
            out
        }))
        .set_pids(message.Pids.as_ref().map(|pids| {
            let mut out = spec::LinuxPids::default();
            out.set_limit(pids.Limit);
            out
        }))
        .set_block_io(optional(&message.BlockIO, block_io)?)
        .set_hugepage_limits(list(&message.HugepageLimits, |limit| {
            let mut out = spec::LinuxHugepageLimit::default();
            out.set_page_size(limit.Pagesize.clone())
                .set_limit(in_range("resources.hugepageLimits.limit", limit.Limit)?);
            Ok(out)
        })?)
        .set_network(optional(&message.Network, network)?);
    Ok(out)
}

fn linux(message: &wire::Linux) -> Result<spec::Linux, FromWireError> {
    let mut out = spec::Linux::default();
    out.set_uid_mappings(list(&message.UIDMappings, id_mapping)?)
        .set_gid_mappings(list(&message.GIDMappings, id_mapping)?)
        .set_sysctl(map(&message.Sysctl))
        .set_resources(optional(&message.Resources, resources_from_wire)?)
        .set_cgroups_path(text(&message.CgroupsPath).map(PathBuf::from))
        .set_namespaces(list(&message.Namespaces, namespace)?)
        .set_devices(list(&message.Devices, device)?)
        .set_seccomp(optional(&message.Seccomp, seccomp)?)
        .set_rootfs_propagation(text(&message.RootfsPropagation))
        .set_masked_paths(some_unless_empty(&message.MaskedPaths))
        .set_readonly_paths(some_unless_empty(&message.ReadonlyPaths))
        .set_mount_label(text(&message.MountLabel))
        .set_intel_rdt(message.IntelRdt.as_ref().map(|rdt| {
            let mut out = spec::LinuxIntelRdt::default();
            out.set_l3_cache_schema(text(&rdt.L3CacheSchema));
            out
        }));
    Ok(out)
}

fn id_mapping(message: &wire::LinuxIDMapping) -> Result<spec::LinuxIdMapping, FromWireError> {
    spec::LinuxIdMappingBuilder::default()
        .host_id(message.HostID)
        .container_id(message.ContainerID)
        .size(message.Size)
        .build()
        .map_err(|error| incomplete("linux.uidMappings", &error))
}

fn namespace(message: &wire::LinuxNamespace) -> Result<spec::LinuxNamespace, FromWireError> {
    let kind = spec::LinuxNamespaceType::try_from(message.Type.as_str())
        .map_err(|_| unknown("linux.namespaces.type", &message.Type))?;
    let mut out = spec::LinuxNamespace::default();
    out.set_typ(kind).set_path(text(&message.Path).map(PathBuf::from));
    Ok(out)
}

fn device(message: &wire::LinuxDevice) -> Result<spec::LinuxDevice, FromWireError> {
    let mut out = spec::LinuxDevice::default();
    out.set_path(PathBuf::from(&message.Path))
        .set_typ(serde_value("linux.devices.type", &message.Type)?)
        .set_major(message.Major)
        .set_minor(message.Minor)
        .set_file_mode(nonzero(message.FileMode))
        .set_uid(Some(message.UID))
        .set_gid(Some(message.GID));
    Ok(out)
}

fn device_cgroup(message: &wire::LinuxDeviceCgroup) -> Result<spec::LinuxDeviceCgroup, FromWireError> {
    let kind = match message.Type.as_str() {
        "" => spec::LinuxDeviceType::A,
        name => serde_value("resources.devices.type", name)?,
    };
    // No device has major 0, so a stock shim's 0 (it sends absent as 0) means any.
    let major = Some(message.Major).filter(|major| *major > 0);
    let minor = Some(message.Minor).filter(|minor| *minor > 0 || (*minor == 0 && major.is_some()));
    let mut out = spec::LinuxDeviceCgroup::default();
    out.set_allow(message.Allow)
        .set_typ(Some(kind))
        .set_major(major)
        .set_minor(minor)
        .set_access(text(&message.Access));
    Ok(out)
}

fn mount(message: &wire::Mount) -> spec::Mount {
    let mut out = spec::Mount::default();
    out.set_destination(PathBuf::from(&message.destination))
        .set_source(text(&message.source).map(PathBuf::from))
        .set_typ(text(&message.type_))
        .set_options(some_unless_empty(&message.options));
    out
}

fn hooks(message: &wire::Hooks) -> spec::Hooks {
    let list = |hooks: &[wire::Hook]| (!hooks.is_empty()).then(|| hooks.iter().map(hook).collect());
    let mut out = spec::Hooks::default();
    out.set_prestart(list(&message.Prestart))
        .set_poststart(list(&message.Poststart))
        .set_poststop(list(&message.Poststop))
        .set_create_runtime(list(&message.CreateRuntime))
        .set_create_container(list(&message.CreateContainer))
        .set_start_container(list(&message.StartContainer));
    out
}

fn hook(message: &wire::Hook) -> spec::Hook {
    let mut out = spec::Hook::default();
    out.set_path(PathBuf::from(&message.Path))
        .set_args(some_unless_empty(&message.Args))
        .set_env(some_unless_empty(&message.Env))
        .set_timeout(nonzero(message.Timeout));
    out
}

fn console_size(message: &wire::Box) -> Result<spec::Box, FromWireError> {
    spec::BoxBuilder::default()
        .height(message.Height)
        .width(message.Width)
        .build()
        .map_err(|error| incomplete("process.consoleSize", &error))
}

fn capabilities(message: &wire::LinuxCapabilities) -> Result<spec::LinuxCapabilities, FromWireError> {
    let set = |names: &[String]| -> Result<Option<spec::Capabilities>, FromWireError> {
        names
            .iter()
            .map(|name| {
                spec::Capability::from_str(name.strip_prefix("CAP_").unwrap_or(name))
                    .map_err(|_| unknown("process.capabilities", name))
            })
            .collect::<Result<_, _>>()
            .map(Some)
    };
    let mut out = spec::LinuxCapabilities::default();
    out.set_bounding(set(&message.Bounding)?)
        .set_effective(set(&message.Effective)?)
        .set_inheritable(set(&message.Inheritable)?)
        .set_permitted(set(&message.Permitted)?)
        .set_ambient(set(&message.Ambient)?);
    Ok(out)
}

fn rlimit(message: &wire::POSIXRlimit) -> Result<spec::PosixRlimit, FromWireError> {
    spec::PosixRlimitBuilder::default()
        .typ(serde_value::<spec::PosixRlimitType>(
            "process.rlimits.type",
            &message.Type,
        )?)
        .hard(message.Hard)
        .soft(message.Soft)
        .build()
        .map_err(|error| incomplete("process.rlimits", &error))
}

fn memory(message: &wire::LinuxMemory) -> spec::LinuxMemory {
    let mut out = spec::LinuxMemory::default();
    out.set_limit(nonzero(message.Limit))
        .set_reservation(nonzero(message.Reservation))
        .set_swap(nonzero(message.Swap))
        .set_kernel(nonzero(message.Kernel))
        .set_kernel_tcp(nonzero(message.KernelTCP))
        .set_swappiness(nonzero(message.Swappiness))
        .set_disable_oom_killer(Some(message.DisableOOMKiller).filter(|disable| *disable));
    out
}

fn network(message: &wire::LinuxNetwork) -> Result<spec::LinuxNetwork, FromWireError> {
    let mut out = spec::LinuxNetwork::default();
    out.set_class_id(nonzero(message.ClassID))
        .set_priorities(list(&message.Priorities, |entry| {
            let mut out = spec::LinuxInterfacePriority::default();
            out.set_name(entry.Name.clone()).set_priority(entry.Priority);
            Ok(out)
        })?);
    Ok(out)
}

fn block_io(message: &wire::LinuxBlockIO) -> Result<spec::LinuxBlockIo, FromWireError> {
    let mut out = spec::LinuxBlockIo::default();
    out.set_weight(weight(message.Weight)?)
        .set_leaf_weight(weight(message.LeafWeight)?)
        .set_weight_device(list(&message.WeightDevice, weight_device)?)
        .set_throttle_read_bps_device(list(&message.ThrottleReadBpsDevice, throttle)?)
        .set_throttle_write_bps_device(list(&message.ThrottleWriteBpsDevice, throttle)?)
        .set_throttle_read_iops_device(list(&message.ThrottleReadIOPSDevice, throttle)?)
        .set_throttle_write_iops_device(list(&message.ThrottleWriteIOPSDevice, throttle)?);
    Ok(out)
}

fn weight(value: u32) -> Result<Option<u16>, FromWireError> {
    in_range("resources.blockIO.weight", value).map(nonzero)
}

fn weight_device(message: &wire::LinuxWeightDevice) -> Result<spec::LinuxWeightDevice, FromWireError> {
    let mut builder = spec::LinuxWeightDeviceBuilder::default()
        .major(message.Major)
        .minor(message.Minor);
    if let Some(weight) = weight(message.Weight)? {
        builder = builder.weight(weight);
    }
    if let Some(weight) = weight(message.LeafWeight)? {
        builder = builder.leaf_weight(weight);
    }
    builder
        .build()
        .map_err(|error| incomplete("resources.blockIO.weightDevice", &error))
}

fn throttle(message: &wire::LinuxThrottleDevice) -> Result<spec::LinuxThrottleDevice, FromWireError> {
    spec::LinuxThrottleDeviceBuilder::default()
        .major(message.Major)
        .minor(message.Minor)
        .rate(message.Rate)
        .build()
        .map_err(|error| incomplete("resources.blockIO.throttle", &error))
}

fn seccomp(message: &wire::LinuxSeccomp) -> Result<spec::LinuxSeccomp, FromWireError> {
    let mut out = spec::LinuxSeccomp::default();
    out.set_default_action(serde_value("seccomp.defaultAction", &message.DefaultAction)?)
        .set_architectures(list(&message.Architectures, |name| {
            serde_value("seccomp.architectures", name)
        })?)
        .set_flags(list(&message.Flags, |name| serde_value("seccomp.flags", name))?)
        .set_syscalls(list(&message.Syscalls, syscall)?);
    Ok(out)
}

fn syscall(message: &wire::LinuxSyscall) -> Result<spec::LinuxSyscall, FromWireError> {
    let mut out = spec::LinuxSyscall::default();
    out.set_names(message.Names.clone())
        .set_action(serde_value("seccomp.syscalls.action", &message.Action)?)
        .set_errno_ret(nonzero(message.errnoret))
        .set_args(list(&message.Args, |arg| {
            let builder = spec::LinuxSeccompArgBuilder::default()
                .index(in_range::<_, usize>("seccomp.syscalls.args.index", arg.Index)?)
                .value(arg.Value)
                .op(serde_value::<spec::LinuxSeccompOperator>(
                    "seccomp.syscalls.args.op",
                    &arg.Op,
                )?);
            let builder = if arg.ValueTwo == 0 {
                builder
            } else {
                builder.value_two(arg.ValueTwo)
            };
            builder
                .build()
                .map_err(|error| incomplete("seccomp.syscalls.args", &error))
        })?);
    Ok(out)
}

/// An enum by the name it has in config.json.
fn serde_value<T: serde::de::DeserializeOwned>(field: &'static str, name: &str) -> Result<T, FromWireError> {
    serde_json::from_value(serde_json::Value::String(name.to_owned())).map_err(|_| unknown(field, name))
}

fn unknown(field: &'static str, value: &str) -> FromWireError {
    FromWireError::UnknownValue {
        field,
        value: value.to_owned(),
    }
}

fn incomplete(field: &'static str, error: &oci_spec::OciSpecError) -> FromWireError {
    FromWireError::Incomplete {
        field,
        reason: error.to_string(),
    }
}

fn in_range<T: Copy + Into<i128>, U: TryFrom<T>>(field: &'static str, value: T) -> Result<U, FromWireError> {
    U::try_from(value).map_err(|_| FromWireError::OutOfRange {
        field,
        value: value.into(),
    })
}

fn text(value: &str) -> Option<String> {
    (!value.is_empty()).then(|| value.to_owned())
}

fn nonzero<T: Default + PartialEq>(value: T) -> Option<T> {
    Some(value).filter(|value| *value != T::default())
}

fn some_unless_empty<T: Clone>(values: &[T]) -> Option<Vec<T>> {
    (!values.is_empty()).then(|| values.to_vec())
}

fn map(values: &HashMap<String, String>) -> Option<HashMap<String, String>> {
    (!values.is_empty()).then(|| values.clone())
}

fn list<T, U>(
    values: &[T],
    convert: impl Fn(&T) -> Result<U, FromWireError>,
) -> Result<Option<Vec<U>>, FromWireError> {
    if values.is_empty() {
        return Ok(None);
    }
    values.iter().map(convert).collect::<Result<_, _>>().map(Some)
}

fn optional<T, U>(
    value: &MessageField<T>,
    convert: impl Fn(&T) -> Result<U, FromWireError>,
) -> Result<Option<U>, FromWireError> {
    value.as_ref().map(convert).transpose()
}
