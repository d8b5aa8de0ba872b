use oci_spec::runtime as spec;
use protobuf::{Message, MessageField};
use serde_json::json;

use super::*;
use crate::oci as wire;

/// Every field the wire table can carry, each with a value of its own.
fn full_spec() -> spec::Spec {
    let hook = |name: &str| json!([{"path": format!("/hooks/{name}"), "args": [name], "env": ["A=b"], "timeout": 3}]);
    let throttle = |rate: u64| json!([{"major": 8, "minor": 1, "rate": rate}]);
    serde_json::from_value(json!({
        "ociVersion": "1.1.0",
        "process": {
            "terminal": true,
            "consoleSize": {"height": 24, "width": 80},
            "user": {"uid": 1, "gid": 2, "additionalGids": [3, 4], "username": "app"},
            "args": ["sh", "-c", "true"],
            "env": ["PATH=/bin"],
            "cwd": "/work",
            "capabilities": {
                "bounding": ["CAP_SYS_ADMIN", "CAP_CHOWN"], "effective": ["CAP_CHOWN"], "inheritable": [],
                "permitted": ["CAP_NET_BIND_SERVICE"], "ambient": ["CAP_KILL"]
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 2048, "soft": 1024}],
            "noNewPrivileges": true,
            "apparmorProfile": "aa",
            "oomScoreAdj": -7,
            "selinuxLabel": "label"
        },
        "root": {"path": "/run/rootfs", "readonly": true},
        "hostname": "pod",
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "ro"]}],
        "hooks": {
            "prestart": hook("prestart"), "poststart": hook("poststart"), "poststop": hook("poststop"),
            "createRuntime": hook("runtime"), "createContainer": hook("container"), "startContainer": hook("start")
        },
        "annotations": {"io.kubernetes.cri.container-type": "sandbox"},
        "linux": {
            "uidMappings": [{"hostID": 1000, "containerID": 0, "size": 10}],
            "gidMappings": [{"hostID": 2000, "containerID": 1, "size": 20}],
            "sysctl": {"net.ipv4.ip_forward": "1"},
            "resources": {
                "devices": [
                    {"allow": false, "type": "a", "access": "rwm"},
                    {"allow": true, "type": "c", "major": 136, "access": "rw"},
                    {"allow": true, "type": "b", "major": 8, "minor": 0, "access": "r"}
                ],
                "memory": {
                    "limit": 1, "reservation": 2, "swap": -1, "kernel": 4, "kernelTCP": 5, "swappiness": 6,
                    "disableOOMKiller": true
                },
                "cpu": {
                    "shares": 1, "quota": -1, "period": 3, "realtimeRuntime": 4, "realtimePeriod": 5,
                    "cpus": "0-1", "mems": "0"
                },
                "pids": {"limit": 99},
                "blockIO": {
                    "weight": 100, "leafWeight": 200,
                    "weightDevice": [{"major": 8, "minor": 0, "weight": 10, "leafWeight": 20}],
                    "throttleReadBpsDevice": throttle(1), "throttleWriteBpsDevice": throttle(2),
                    "throttleReadIOPSDevice": throttle(3), "throttleWriteIOPSDevice": throttle(4)
                },
                "hugepageLimits": [{"pageSize": "2MB", "limit": 4096}],
                "network": {"classID": 7, "priorities": [{"name": "eth0", "priority": 5}]}
            },
            "cgroupsPath": "/default/one",
            "namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/netns/x"}],
            "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3, "fileMode": 438, "uid": 5, "gid": 6}],
            "seccomp": {
                "defaultAction": "SCMP_ACT_ERRNO",
                "architectures": ["SCMP_ARCH_X86_64"],
                "flags": ["SECCOMP_FILTER_FLAG_LOG"],
                "syscalls": [{
                    "names": ["clone"], "action": "SCMP_ACT_ALLOW", "errnoRet": 38,
                    "args": [{"index": 1, "value": 2, "valueTwo": 3, "op": "SCMP_CMP_MASKED_EQ"}]
                }]
            },
            "rootfsPropagation": "rslave",
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys"],
            "mountLabel": "mount-label",
            "intelRdt": {"l3CacheSchema": "L3:0=ff"}
        }
    }))
    .unwrap()
}

#[test]
fn spec_when_sent_as_bytes_and_read_back_is_unchanged() {
    let spec = full_spec();

    let bytes = spec_to_wire(&spec).write_to_bytes().unwrap();
    let back = spec_from_wire(&wire::Spec::parse_from_bytes(&bytes).unwrap()).unwrap();

    assert_eq!(back, spec);
    assert_eq!(uncarried(&spec), Vec::<&str>::new());
}

#[test]
fn wire_spec_when_every_field_is_set_leaves_no_message_field_empty() {
    let message = spec_to_wire(&full_spec());

    let text = protobuf::text_format::print_to_string_pretty(&message);
    for field in [
        "Version",
        "Process",
        "Root",
        "Hostname",
        "Mounts",
        "Hooks",
        "Annotations",
        "Linux",
        "ConsoleSize",
        "Username",
        "AdditionalGids",
        "Rlimits",
        "Bounding",
        "Effective",
        "Permitted",
        "Ambient",
        "OOMScoreAdj",
        "SelinuxLabel",
        "ApparmorProfile",
        "NoNewPrivileges",
        "UIDMappings",
        "GIDMappings",
        "Sysctl",
        "KernelTCP",
        "Swappiness",
        "DisableOOMKiller",
        "RealtimeRuntime",
        "RealtimePeriod",
        "LeafWeight",
        "WeightDevice",
        "ThrottleReadIOPSDevice",
        "ThrottleWriteIOPSDevice",
        "HugepageLimits",
        "Priorities",
        "CgroupsPath",
        "Namespaces",
        "FileMode",
        "DefaultAction",
        "errnoret",
        "ValueTwo",
        "RootfsPropagation",
        "MaskedPaths",
        "ReadonlyPaths",
        "MountLabel",
        "L3CacheSchema",
        "StartContainer",
        "CreateRuntime",
    ] {
        assert!(text.contains(field), "{field} is missing in {text}");
    }
}

#[test]
fn capability_names_when_sent_are_prefixed_and_sorted() {
    let message = process_to_wire(full_spec().process().as_ref().unwrap());

    assert_eq!(message.Capabilities.Bounding, ["CAP_CHOWN", "CAP_SYS_ADMIN"]);
}

#[test]
fn capabilities_when_present_but_empty_mean_none_not_unchanged() {
    let message = wire::Process {
        Capabilities: MessageField::some(wire::LinuxCapabilities::default()),
        ..Default::default()
    };

    let process = process_from_wire(&message).unwrap();

    let sets = process.capabilities().clone().unwrap();
    assert_eq!(sets.bounding().as_ref().map(|set| set.len()), Some(0));
    assert_eq!(sets.effective().as_ref().map(|set| set.len()), Some(0));
}

#[test]
fn device_rule_when_numbers_are_absent_stays_a_wildcard() {
    let from_stock_shim = wire::LinuxDeviceCgroup {
        Type: "a".into(),
        ..Default::default()
    };
    let resources = wire::LinuxResources {
        Devices: vec![from_stock_shim],
        ..Default::default()
    };

    let rules = resources_from_wire(&resources)
        .unwrap()
        .devices()
        .clone()
        .unwrap();

    assert_eq!((rules[0].major(), rules[0].minor()), (None, None));
}

#[test]
fn names_when_unknown_are_refused_with_field_and_value() {
    let with_namespace = |name: &str| wire::Spec {
        Linux: MessageField::some(wire::Linux {
            Namespaces: vec![wire::LinuxNamespace {
                Type: name.into(),
                ..Default::default()
            }],
            ..Default::default()
        }),
        ..Default::default()
    };
    let with_rlimit = wire::Process {
        Rlimits: vec![wire::POSIXRlimit {
            Type: "RLIMIT_SPEED".into(),
            ..Default::default()
        }],
        ..Default::default()
    };

    let error = spec_from_wire(&with_namespace("space")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "linux.namespaces.type: unknown value \"space\""
    );
    let error = process_from_wire(&with_rlimit).unwrap_err();
    assert_eq!(
        error.to_string(),
        "process.rlimits.type: unknown value \"RLIMIT_SPEED\""
    );
}

#[test]
fn numbers_when_out_of_range_are_refused() {
    let weight = wire::LinuxResources {
        BlockIO: MessageField::some(wire::LinuxBlockIO {
            Weight: 65_536,
            ..Default::default()
        }),
        ..Default::default()
    };
    let adjustment = wire::Process {
        OOMScoreAdj: i64::MAX,
        ..Default::default()
    };

    assert_eq!(
        resources_from_wire(&weight).unwrap_err(),
        FromWireError::OutOfRange {
            field: "resources.blockIO.weight",
            value: 65_536
        }
    );
    assert!(process_from_wire(&adjustment).is_err());
}

#[test]
fn uncarried_when_newer_fields_are_set_names_each() {
    let mut spec = full_spec();
    spec.set_domainname(Some("example".into()));
    let resources = spec
        .linux_mut()
        .as_mut()
        .unwrap()
        .resources_mut()
        .as_mut()
        .unwrap();
    resources.set_unified(Some([("memory.high".to_owned(), "1".to_owned())].into()));

    assert_eq!(uncarried(&spec), ["domainname", "linux.resources.unified"]);
}
