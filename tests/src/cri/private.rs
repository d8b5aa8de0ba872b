//! The network that is "the host" for pods: never the machine's own.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::command::{self, Finished};

/// How long a command of the system's own may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Makes sure that this process has a network of its own.
///
/// # Panics
/// When it has the machine's: CNI's plugins would change it.
#[track_caller]
pub fn require() {
    let ours = fs::read_link("/proc/self/ns/net").unwrap_or_default();
    let made = std::env::var_os("E2E_PRIVATE_NETWORK").unwrap_or_default();
    assert_eq!(
        ours.as_os_str(),
        made,
        "CNI's plugins change the network: run through tests/private-network, as tests/run-e2e does"
    );
}

/// Runs a program of the host's to its end.
///
/// # Panics
/// When it cannot start, or exceeds two minutes.
#[track_caller]
pub fn host(words: &[&str]) -> Finished {
    let [program, arguments @ ..] = words else {
        panic!("no command")
    };
    command::run(Command::new(program).args(arguments), LIMIT).unwrap_or_else(|e| panic!("{e}"))
}

/// What CNI's plugins leave in the host's network, one item a line: addresses, routes, packet filters, reserved addresses.
/// Links and namespaces are [`crate::leftovers`]'.
#[derive(Debug)]
pub struct Traces(BTreeSet<String>);

impl Traces {
    /// Looks at the network, and at the records below a containerd's folder.
    ///
    /// # Panics
    /// When a program of the system's is missing.
    #[track_caller]
    pub fn look(dir: &Path) -> Self {
        let mut items = BTreeSet::new();
        for words in [
            &["ip", "-o", "addr", "show"][..],
            &["ip", "-4", "route", "show", "table", "all"],
            &["ip", "-6", "route", "show", "table", "all"],
            &["iptables-save"],
            &["ip6tables-save"],
        ] {
            let done = host(words).expect_code(0);
            let kind = words.join(" ");
            let lines = done.out();
            let kept = lines.lines().filter(|line| !line.starts_with('#'));
            items.extend(kept.map(|line| format!("{kind}: {}", steady(line))));
        }
        let networks = crate::diagnosis::entries(&dir.join("ipam"));
        for address in networks
            .iter()
            .flat_map(|network| crate::diagnosis::entries(network))
        {
            let name = address
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if !name.starts_with("last_reserved_ip") && name != "lock" {
                items.insert(format!("reserved {}", address.display()));
            }
        }
        Self(items)
    }

    /// What is there now and was not before.
    pub fn added_since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

/// A line without what changes by itself: a link's number, a rule's packets, an address's age, whether a bridge has ports.
fn steady(line: &str) -> String {
    let line = line.split_once(": ").map_or(line, |(number, rest)| {
        if number.bytes().all(|byte| byte.is_ascii_digit()) {
            rest
        } else {
            line
        }
    });
    let line = line.split(" [").next().unwrap_or_default();
    let line = line.split("valid_lft").next().unwrap_or_default();
    let line = line.split("expires").next().unwrap_or_default();
    let words = line.split_whitespace().filter(|word| *word != "linkdown");
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steady_when_numbers_count_leaves_them_out() {
        assert_eq!(
            steady(
                "12: cri0    inet 10.80.1.1/24 scope global cri0\\       valid_lft forever preferred_lft forever"
            ),
            "cri0 inet 10.80.1.1/24 scope global cri0\\"
        );
        assert_eq!(
            steady("10.80.1.0/24 dev cri0 proto kernel scope link linkdown"),
            "10.80.1.0/24 dev cri0 proto kernel scope link"
        );
        assert_eq!(steady(":FORWARD ACCEPT [12:1024]"), ":FORWARD ACCEPT");
        assert_eq!(steady("-A X -s ::1/128 -j RETURN"), "-A X -s ::1/128 -j RETURN");
    }
}
