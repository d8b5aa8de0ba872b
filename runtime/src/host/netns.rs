//! Network namespaces of the host.

use std::path::Path;

/// Names of the interfaces in `netns` besides the loopback. Blocks. Empty, with a warning, when it cannot be entered.
pub fn interfaces_in(netns: &Path) -> Vec<String> {
    // Entering a namespace changes the thread: use one that nobody else uses.
    let path = netns.to_owned();
    std::thread::spawn(move || enter_and_list(&path))
        .join()
        .unwrap_or_default()
}

fn enter_and_list(netns: &Path) -> Vec<String> {
    let entered = std::fs::File::open(netns)
        .and_then(|file| nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).map_err(Into::into));
    if let Err(error) = entered {
        tracing::warn!(netns = %netns.display(), %error, "network namespace");
        return Vec::new();
    }
    // /sys shows the namespace it was mounted in; /proc/thread-self/net shows the thread's.
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    parse_net_dev(&text)
}

fn parse_net_dev(text: &str) -> Vec<String> {
    let names = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, _)| name.trim().to_owned());
    names.filter(|name| name != "lo").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn net_dev_when_parsed_has_no_loopback() {
        let text = "Inter-|   Receive\n face |bytes\n    lo: 1 2\n  eth0: 3 4\n";
        assert_eq!(parse_net_dev(text), ["eth0"]);
    }
}
