//! What a pod's network looks like from inside and from the host: `ip` of one busybox on both sides.

use super::pods::{Member, Pod};
use crate::command::eventually;

/// The questions, as arguments of `ip`.
const QUESTIONS: [&str; 4] = ["addr", "-4 route", "-6 route", "neigh show nud permanent"];
/// The line between two answers.
const BORDER: &str = "--";

/// Waits until the container sees the addresses, routes and static neighbours its namespace has on the host, and asserts it;
/// returns them, one item a line.
///
/// # Panics
/// When they stay different.
#[track_caller]
pub fn assert_equal(pod: &Pod<'_>, member: &Member<'_>) -> Vec<String> {
    let (mut inside, mut outside) = (Vec::new(), Vec::new());
    // Link-local addresses are made by each side's kernel, in its own time.
    eventually(pod.limit(), || {
        inside = view(&member.sh(&script("ip")));
        let busybox = pod.busybox();
        outside = view(&pod.in_netns(&[busybox, "sh", "-c", &script(&format!("{busybox} ip"))]));
        inside == outside
    });
    assert_eq!(
        inside, outside,
        "the container's view (left) is not the namespace's (right)"
    );
    inside
}

/// All questions at once, with a line between the answers.
fn script(ip: &str) -> String {
    QUESTIONS
        .map(|question| format!("{ip} {question}"))
        .join(&format!(" && echo {BORDER} && "))
}

fn view(answers: &str) -> Vec<String> {
    let border = format!("{BORDER}\n");
    let mut items = Vec::new();
    for (question, text) in QUESTIONS.iter().zip(answers.split(&border)) {
        let lines = if *question == "addr" {
            addresses(text)
        } else {
            let lines = text.lines().filter(|line| !line.contains(" dev tap"));
            lines.map(|line| format!("{question}: {}", words(line))).collect()
        };
        items.extend(lines);
    }
    items.sort();
    items
}

/// One line per interface with its MTU, its hardware address and each of its addresses; not the runtime's own interfaces.
fn addresses(text: &str) -> Vec<String> {
    let mut items = Vec::new();
    let mut interface = String::new();
    for line in text.lines() {
        if !line.starts_with(' ') {
            // `2: eth0@if5: <BROADCAST,MULTICAST,UP,LOWER_UP,M-DOWN> mtu 1500 qdisc noqueue`
            let name = line.split(": ").nth(1).unwrap_or_default();
            interface = name.split('@').next().unwrap_or_default().to_owned();
            if interface.starts_with("tap") {
                interface.clear();
                continue;
            }
            let mut rest = line.split_whitespace().skip_while(|word| *word != "mtu").skip(1);
            let up = line.contains("UP,") || line.contains(",UP") || line.contains("<UP");
            items.push(format!(
                "{interface} mtu {} up {up}",
                rest.next().unwrap_or_default()
            ));
        } else if !interface.is_empty() && !line.contains("valid_lft") {
            // `link/ether 16:6b:… brd ff:… link-netnsid 0`: the last two words are the host's own business.
            let line = line.split(" link-netns").next().unwrap_or_default();
            // How the guest keeps its kernel from making a prefix's route that a plugin has removed; routes are compared themselves.
            let line = words(line).replace(" noprefixroute", "");
            items.push(format!("{interface} {line}"));
        }
    }
    items
}

fn words(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn view_when_all_is_answered_has_every_item_under_its_question() {
        assert_eq!(
            script("ip"),
            "ip addr && echo -- && ip -4 route && echo -- && ip -6 route && echo -- && ip neigh show nud permanent"
        );
        let answers = "2: eth0@if5: <UP> mtu 1500\n--\ndefault via 10.0.0.1 dev eth0 \n10.1.0.0/16 dev tap0_kata\n--\n--\n";
        assert_eq!(
            view(answers),
            ["-4 route: default via 10.0.0.1 dev eth0", "eth0 mtu 1500 up true"]
        );
    }

    #[test]
    fn addresses_when_the_runtime_has_a_tap_leaves_it_out() {
        let text = "2: eth0@if5: <BROADCAST,MULTICAST,UP,LOWER_UP,M-DOWN> mtu 1500 qdisc noqueue \n    \
                    link/ether 16:6b:00:00:00:01 brd ff:ff:ff:ff:ff:ff link-netnsid 0\n    \
                    inet 10.80.1.2/24 brd 10.80.1.255 scope global noprefixroute eth0\n       valid_lft forever preferred_lft forever\n\
                    3: tap0_kata: <BROADCAST,UP> mtu 1500 qdisc mq qlen 1000\n    link/ether 2e:00:00:00:00:01 brd ff\n";
        assert_eq!(
            addresses(text),
            [
                "eth0 mtu 1500 up true",
                "eth0 link/ether 16:6b:00:00:00:01 brd ff:ff:ff:ff:ff:ff",
                "eth0 inet 10.80.1.2/24 brd 10.80.1.255 scope global eth0",
            ]
        );
    }
}
