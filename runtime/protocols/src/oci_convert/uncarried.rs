//! What a specification sets and the wire cannot carry.

use oci_spec::runtime as spec;

/// Names (in config.json notation) of the fields that `spec` sets and the agent protocol has no number for.
/// Empty for every spec containerd generates by default.
pub fn uncarried(spec: &spec::Spec) -> Vec<&'static str> {
    let mut names = Vec::new();
    let mut note = |name, set: bool| {
        if set {
            names.push(name);
        }
    };
    note("domainname", spec.domainname().is_some());
    note("solaris", spec.solaris().is_some());
    note("windows", spec.windows().is_some());
    note("vm", spec.vm().is_some());
    note("zos", spec.zos().is_some());
    note("uidMappings", spec.uid_mappings().is_some());
    note("gidMappings", spec.gid_mappings().is_some());
    let mapped = |mount: &spec::Mount| mount.uid_mappings().is_some() || mount.gid_mappings().is_some();
    note("mounts[].uidMappings", spec.mounts().iter().flatten().any(mapped));
    if let Some(process) = spec.process() {
        note("process.commandLine", process.command_line().is_some());
        note("process.user.umask", process.user().umask().is_some());
        note("process.ioPriority", process.io_priority().is_some());
        note("process.scheduler", process.scheduler().is_some());
        note("process.execCPUAffinity", process.exec_cpu_affinity().is_some());
    }
    if let Some(linux) = spec.linux() {
        note("linux.netDevices", linux.net_devices().is_some());
        note("linux.memoryPolicy", linux.memory_policy().is_some());
        note("linux.personality", linux.personality().is_some());
        note("linux.timeOffsets", linux.time_offsets().is_some());
        if let Some(resources) = linux.resources() {
            uncarried_resources(resources, &mut note);
        }
        if let Some(seccomp) = linux.seccomp() {
            note(
                "linux.seccomp.defaultErrnoRet",
                seccomp.default_errno_ret().is_some(),
            );
            note("linux.seccomp.listenerPath", seccomp.listener_path().is_some());
            note(
                "linux.seccomp.listenerMetadata",
                seccomp.listener_metadata().is_some(),
            );
        }
        if let Some(rdt) = linux.intel_rdt() {
            note("linux.intelRdt.closID", rdt.clos_id().is_some());
            note("linux.intelRdt.schemata", rdt.schemata().is_some());
            note("linux.intelRdt.memBwSchema", rdt.mem_bw_schema().is_some());
            note(
                "linux.intelRdt.enableMonitoring",
                rdt.enable_monitoring().is_some(),
            );
        }
    }
    names
}

fn uncarried_resources(resources: &spec::LinuxResources, note: &mut impl FnMut(&'static str, bool)) {
    note("linux.resources.rdma", resources.rdma().is_some());
    note("linux.resources.unified", resources.unified().is_some());
    if let Some(cpu) = resources.cpu() {
        note("linux.resources.cpu.idle", cpu.idle().is_some());
        note("linux.resources.cpu.burst", cpu.burst().is_some());
    }
    if let Some(memory) = resources.memory() {
        note(
            "linux.resources.memory.useHierarchy",
            memory.use_hierarchy().is_some(),
        );
        note(
            "linux.resources.memory.checkBeforeUpdate",
            memory.check_before_update().is_some(),
        );
    }
}
