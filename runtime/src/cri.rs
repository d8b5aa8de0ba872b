//! What the implementations of Kubernetes' CRI say in annotations: containerd, CRI-O and, long ago, dockershim.

use std::collections::HashMap;

/// What a container is to its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContainerKind {
    /// Not part of a pod: `ctr`, nerdctl, docker. It is its own sandbox.
    Single,
    /// The pod's sandbox ("pause") container.
    Sandbox,
    /// A container in a pod's sandbox.
    Member {
        /// Id of the sandbox.
        sandbox_id: String,
    },
}

/// A pod's container that does not say which pod.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{type_key} is {type_value:?} but annotation {id_key} is missing")]
pub struct NoSandboxId {
    /// Annotation with the type.
    pub type_key: &'static str,
    /// Its value.
    pub type_value: String,
    /// Annotation that should hold the sandbox id.
    pub id_key: &'static str,
}

/// Annotations of one implementation.
struct Keys {
    /// Holds the type.
    kind: &'static str,
    /// The type of a sandbox.
    sandbox: &'static str,
    /// The type of a member.
    member: &'static str,
    /// Holds the id of a member's sandbox.
    sandbox_id: &'static str,
}

const KEYS: [Keys; 3] = [
    Keys {
        kind: "io.kubernetes.cri.container-type",
        sandbox: "sandbox",
        member: "container",
        sandbox_id: "io.kubernetes.cri.sandbox-id",
    },
    Keys {
        kind: "io.kubernetes.cri-o.ContainerType",
        sandbox: "sandbox",
        member: "container",
        sandbox_id: "io.kubernetes.cri-o.SandboxID",
    },
    Keys {
        kind: "io.kubernetes.docker.type",
        sandbox: "podsandbox",
        member: "container",
        sandbox_id: "io.kubernetes.sandbox.id",
    },
];

/// What `annotations` say the container is to its pod; [`ContainerKind::Single`] when they say nothing.
///
/// # Errors
/// [`NoSandboxId`]
pub fn kind(annotations: &HashMap<String, String>) -> Result<ContainerKind, NoSandboxId> {
    for keys in &KEYS {
        match annotations.get(keys.kind).map(String::as_str) {
            Some(kind) if kind == keys.sandbox => return Ok(ContainerKind::Sandbox),
            Some(kind) if kind == keys.member => {
                let sandbox_id = annotations.get(keys.sandbox_id).filter(|id| !id.is_empty());
                return match sandbox_id {
                    Some(sandbox_id) => Ok(ContainerKind::Member {
                        sandbox_id: sandbox_id.clone(),
                    }),
                    None => Err(NoSandboxId {
                        type_key: keys.kind,
                        type_value: kind.to_owned(),
                        id_key: keys.sandbox_id,
                    }),
                };
            }
            _ => {}
        }
    }
    Ok(ContainerKind::Single)
}

/// The limits of a whole pod, as containerd and CRI-O annotate its sandbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PodLimits {
    /// Microseconds of CPU time in each period.
    pub cpu_quota: Option<i64>,
    /// Microseconds.
    pub cpu_period: Option<u64>,
    /// Bytes.
    pub memory: Option<i64>,
}

/// Prefix of the annotations about the sandbox.
const SANDBOX: &str = "io.kubernetes.cri.sandbox-";

/// The limits of the pod; `None` when the container is not a pod's.
pub fn pod_limits(annotations: &HashMap<String, String>) -> Option<PodLimits> {
    let number = |name: &str| -> Option<i64> { annotations.get(&format!("{SANDBOX}{name}"))?.parse().ok() };
    annotations
        .keys()
        .any(|name| name.starts_with(SANDBOX))
        .then(|| PodLimits {
            cpu_quota: number("cpu-quota"),
            cpu_period: number("cpu-period").and_then(|period| u64::try_from(period).ok()),
            memory: number("memory"),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations<const N: usize>(pairs: [(&str, &str); N]) -> HashMap<String, String> {
        pairs
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into()
    }

    #[test]
    fn kind_when_annotated_by_any_cri_follows() {
        for keys in &KEYS {
            let of_type = |kind| kind_of(annotations([(keys.kind, kind), (keys.sandbox_id, "s")]));
            fn kind_of(annotations: HashMap<String, String>) -> ContainerKind {
                kind(&annotations).unwrap()
            }
            assert_eq!(of_type(keys.sandbox), ContainerKind::Sandbox);
            let sandbox_id = "s".to_owned();
            assert_eq!(of_type(keys.member), ContainerKind::Member { sandbox_id });

            for lost in [
                annotations([(keys.kind, keys.member)]),
                annotations([(keys.kind, keys.member), (keys.sandbox_id, "")]),
            ] {
                let error = kind(&lost).unwrap_err().to_string();
                assert!(
                    error.contains(keys.kind) && error.contains(keys.sandbox_id),
                    "{error}"
                );
            }
        }
    }

    #[test]
    fn kind_when_its_type_is_unknown_is_single() {
        for pairs in [annotations([]), annotations([("a", "b")])] {
            assert_eq!(kind(&pairs), Ok(ContainerKind::Single));
        }
        let other = annotations([("io.kubernetes.cri.container-type", "other")]);
        assert_eq!(kind(&other), Ok(ContainerKind::Single));
    }

    #[test]
    fn pod_limits_when_no_numbers_are_absent() {
        assert_eq!(pod_limits(&annotations([("a", "b")])), None);
        let pod = annotations([
            ("io.kubernetes.cri.sandbox-id", "s"),
            ("io.kubernetes.cri.sandbox-cpu-quota", "150000"),
            ("io.kubernetes.cri.sandbox-cpu-period", "-1"),
            ("io.kubernetes.cri.sandbox-memory", "much"),
        ]);
        let expected = PodLimits {
            cpu_quota: Some(150_000),
            ..Default::default()
        };
        assert_eq!(pod_limits(&pod), Some(expected));
    }
}
