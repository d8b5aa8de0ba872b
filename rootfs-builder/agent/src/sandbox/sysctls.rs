//! Kernel parameters of the pod, where no container of its own brings them: those of the network, which is the guest's, and
//! those of the IPC and UTS namespaces that its containers share.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use super::namespaces::Namespaces;
use crate::container::sysctl_path;

/// A parameter that is not set.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// Not a parameter of a pod.
    #[error("sysctl {0:?}: not one of the pod's network or IPC namespace")]
    NotOfThePod(String),
    /// The kernel refused it.
    #[error("sysctl {name} = {value:?}: {source}")]
    Refused {
        /// Which.
        name: String,
        /// The value.
        value: String,
        /// Why.
        source: io::Error,
    },
}

/// Parameters of the IPC namespace beside `fs.mqueue.*`, as the runtime specification has them.
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Sets all of `sysctls`.
///
/// # Errors
/// Naming the first that cannot be set.
pub fn apply(sysctls: &HashMap<String, String>, namespaces: &Namespaces) -> Result<(), SysctlError> {
    let mut sorted: Vec<_> = sysctls.iter().collect();
    sorted.sort();
    for (name, value) in sorted {
        let path = path(name)?;
        let write = || fs::write(&path, value);
        // What is read and written there is that of the writer's namespaces.
        let written = if path.starts_with("/proc/sys/net") {
            write()
        } else {
            namespaces.inside(write)
        };
        written.map_err(|source| SysctlError::Refused {
            name: name.clone(),
            value: value.clone(),
            source,
        })?;
    }
    Ok(())
}

fn path(name: &str) -> Result<PathBuf, SysctlError> {
    let refused = || SysctlError::NotOfThePod(name.to_owned());
    let dotted = name.replace('/', ".");
    let of_pod =
        dotted.starts_with("net.") || dotted.starts_with("fs.mqueue.") || IPC.contains(&dotted.as_str());
    if !of_pod {
        return Err(refused());
    }
    sysctl_path(name).map_err(|_| refused())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctl_when_not_of_the_pod_is_refused() {
        for good in [
            "net.ipv4.ip_forward",
            "net/ipv4/conf/e.1/x",
            "fs.mqueue.msg_max",
            "kernel.sem",
        ] {
            assert!(path(good).is_ok(), "{good}");
        }
        for bad in [
            "kernel.panic",
            "vm.swappiness",
            "fs.file-max",
            "net/../kernel/panic",
            "",
            "network.x",
        ] {
            assert!(matches!(path(bad), Err(SysctlError::NotOfThePod(_))), "{bad}");
        }
    }

    #[test]
    fn sysctl_of_ipc_when_set_is_that_of_the_pod_only() {
        let own = fs::read_to_string("/proc/sys/kernel/shmmni").unwrap();
        let namespaces = Namespaces::create("").unwrap();
        let sysctls = HashMap::from([("kernel.shmmni".to_owned(), "77".to_owned())]);

        apply(&sysctls, &namespaces).unwrap();

        let inside = namespaces
            .inside(|| fs::read_to_string("/proc/sys/kernel/shmmni"))
            .unwrap();
        assert_eq!(inside.trim(), "77");
        assert_eq!(fs::read_to_string("/proc/sys/kernel/shmmni").unwrap(), own);
    }
}
