//! Keys of Kata's schema that have no effect here, each with the value that asks for nothing else than what this
//! runtime does anyway. Any other value is worth a warning: silence would be a bug.

/// What to say about a key without effect.
pub(super) enum Verdict {
    /// The value is what happens anyway.
    Harmless,
    /// A key of Kata's that does nothing here.
    NoEffect,
    /// No key of Kata's either.
    Unknown,
}

/// `(key, values that are harmless)`; TOML notation. The key is the last component below its table.
const HYPERVISOR: &[(&str, &[&str])] = &[
    ("path", &["\"\""]),
    ("ctlpath", &["\"\""]),
    ("jailer_path", &["\"\""]),
    ("firmware", &["\"\""]),
    ("valid_hypervisor_paths", &["[]"]),
    ("valid_ctlpaths", &["[]"]),
    ("valid_jailer_paths", &["[]"]),
    ("vm_rootfs_driver", &["\"virtio-blk-mmio\"", "\"virtio-blk-pci\""]),
    (
        "block_device_driver",
        &["\"virtio-blk-mmio\"", "\"virtio-blk-pci\""],
    ),
    ("block_device_aio", &[]),
    ("block_device_cache_set", &["false"]),
    ("block_device_cache_direct", &["false"]),
    ("block_device_cache_noflush", &["false"]),
    ("block_device_logical_sector_size", &["0"]),
    ("block_device_physical_sector_size", &["0"]),
    ("disable_block_device_use", &["true", "false"]),
    ("disk_rate_limiter_bw_max_rate", &["0"]),
    ("disk_rate_limiter_bw_one_time_burst", &["0"]),
    ("disk_rate_limiter_ops_max_rate", &["0"]),
    ("disk_rate_limiter_ops_one_time_burst", &["0"]),
    ("queue_size", &["128"]),
    ("num_queues", &["1"]),
    ("kernel_verity_params", &["\"\""]),
    ("guest_extension_images", &["[]"]),
    ("default_bridges", &["0"]),
    ("default_maxmemory", &["0"]),
    ("memory_slots", &["0"]),
    ("memory_offset", &["0"]),
    ("reclaim_guest_freed_memory", &["false"]),
    ("enable_mem_prealloc", &["false"]),
    ("enable_hugepages", &["false"]),
    ("hugepage_type", &[]),
    ("enable_virtio_mem", &["false"]),
    ("virtio_fs_cache_size", &["0"]),
    ("virtio_fs_daemon", &["\"\""]),
    ("virtio_fs_queue_size", &[]),
    ("virtio_fs_is_dax", &["false"]),
    ("valid_virtio_fs_daemon_paths", &["[]"]),
    ("disable_vhost_net", &["false", "true"]),
    ("seccomp_sandbox", &["\"\""]),
    ("disable_nesting_checks", &["false", "true"]),
    ("disable_image_nvdimm", &["true", "false"]),
    ("disable_selinux", &["true", "false"]),
    ("disable_guest_selinux", &["true"]),
    ("rootless", &["false"]),
    ("log_level", &["\"info\""]),
    ("enable_guest_swap", &["false"]),
    ("guest_swap_path", &["\"/run/kata-containers/swap\""]),
    ("guest_swap_size_percent", &["100"]),
    ("guest_swap_create_threshold_secs", &["60"]),
    ("enable_iothreads", &["false"]),
    ("enable_iommu", &["false"]),
    ("enable_vhost_user_store", &["false"]),
    ("vhost_user_store_path", &["\"\""]),
    ("cold_plug_vfio", &["\"no-port\""]),
    ("hot_plug_vfio", &["\"no-port\""]),
    ("pcie_root_port", &["0"]),
    ("pcie_switch_port", &["0"]),
    ("entropy_source", &["\"/dev/urandom\"", "\"/dev/random\"", "\"\""]),
    ("machine_type", &["\"\""]),
    ("machine_accelerators", &["\"\""]),
    ("cpu_features", &["\"\""]),
    ("guest_memory_dump_path", &["\"\""]),
    ("guest_memory_dump_paging", &["false"]),
    ("prefetch_list_path", &["\"\""]),
    ("confidential_guest", &["false"]),
    ("vm_template", &[]),
];

const AGENT: &[(&str, &[&str])] = &[
    ("log_level", &["\"info\""]),
    ("enable_tracing", &["false"]),
    ("trace_mode", &[]),
    ("trace_type", &[]),
    ("passfd_listener_port", &["1027"]),
    ("cdh_api_timeout_ms", &["50000"]),
    ("launch_process_timeout", &["0"]),
    ("visible_cdi_devices", &["\"\"", "[]"]),
    ("policy", &["\"\""]),
    ("dial_timeout", &[]),
    // The muxer tries again by itself.
    ("dial_timeout_ms", &["10"]),
];

const FACTORY: &[(&str, &[&str])] = &[("template_path", &["\"/run/vc/vm/template\""])];

const RUNTIME: &[(&str, &[&str])] = &[
    ("log_level", &["\"info\""]),
    ("enable_tracing", &["false"]),
    ("jaeger_endpoint", &["\"\""]),
    ("jaeger_user", &["\"\""]),
    ("jaeger_password", &["\"\""]),
    ("enable_vcpus_pinning", &["false"]),
    ("emptydir_mode", &["\"shared-fs\""]),
    ("enable_pprof", &["false"]),
    ("experimental", &["[]"]),
    ("sandbox_bind_mounts", &["[]"]),
    ("dan_conf", &["\"/run/kata-containers/dans\""]),
    ("use_passfd_io", &["true"]),
    ("vfio_mode", &["\"guest-kernel\""]),
    ("shared_mounts", &["[]"]),
    ("pod_resource_api_sock", &["\"\""]),
    ("static_sandbox_default_workload_mem", &[]),
    ("create_container_timeout", &[]),
];

/// Judges an ignored key with its full dotted path and its value in TOML notation.
pub(super) fn judge(path: &str, value: &str) -> Verdict {
    let (table, key) = path.rsplit_once('.').unwrap_or(("", path));
    let known = match table {
        "hypervisor.dragonball" => HYPERVISOR,
        "hypervisor.dragonball.factory" => FACTORY,
        "agent.kata" => AGENT,
        "runtime" => RUNTIME,
        _ => return Verdict::Unknown,
    };
    match known.iter().find(|(name, _)| *name == key) {
        Some((_, harmless)) if harmless.contains(&value) => Verdict::Harmless,
        Some(_) => Verdict::NoEffect,
        None => Verdict::Unknown,
    }
}
