//! The guest's kernel command line.

use std::path::Path;

use crate::config::{BootAsset, HypervisorConfig, TomlConfig};
use crate::hypervisor::READY_PORT;

/// The guest's kernel command line: what the guest needs to boot and to find its agent, then the user's parameters.
pub(super) fn cmdline(hypervisor: &HypervisorConfig, config: &TomlConfig, debug: bool) -> String {
    let kata = &config.agent.kata;
    let mut words: Vec<String> = Vec::new();
    let mut add = |word: &str| words.push(word.to_owned());
    if !debug {
        add("quiet");
    }
    add(if debug { "loglevel=7" } else { "loglevel=4" });
    for word in ["panic=-1", "console=hvc0"] {
        add(word);
    }
    // A built-in dummy driver makes a dummy0 at boot (drivers/net/dummy.c), which the pod's namespace does not have.
    add("dummy.numdummies=0");
    if let BootAsset::Image(path) = hypervisor.boot_asset() {
        add(&format!("root={}", root_device(&path)));
        add("ro");
        add(&format!("rootfstype={}", hypervisor.rootfs_type));
        // For images with systemd; others do not look at it.
        add("systemd.unit=kata-containers.target");
        add("systemd.mask=systemd-networkd.service");
        add("systemd.mask=systemd-networkd.socket");
    }
    add(&format!("agent.log_vport={}", kata.log_port));
    add(&format!(
        "agent.passfd_listener_port={}",
        config.runtime.passfd_listener_port
    ));
    add(&format!("agent.ready_vport={READY_PORT}"));
    if kata.server_port != 1024 {
        add(&format!("agent.server_addr=vsock://-1:{}", kata.server_port));
    }
    if kata.container_pipe_size != 0 {
        add(&format!("agent.container_pipe_size={}", kata.container_pipe_size));
    }
    if kata.enable_debug {
        add("agent.log=debug");
    }
    if kata.debug_console_enabled {
        add("agent.debug_console");
        add("agent.debug_console_vport=1026");
    }
    // Last, so that a user's choice wins.
    words.extend(hypervisor.kernel_params.split_whitespace().map(str::to_owned));
    words.join(" ")
}

/// Kata's images have the filesystem in partition 1; a bare filesystem is the disk itself. A master boot record ends with
/// 55 AA at byte 510, where a bare ext4 or erofs has zeros.
pub(super) fn root_device(image: &Path) -> &'static str {
    use std::os::unix::fs::FileExt;
    let mut signature = [0; 2];
    let read = std::fs::File::open(image).and_then(|file| file.read_exact_at(&mut signature, 510));
    if read.is_ok() && signature == [0x55, 0xaa] {
        "/dev/vda1"
    } else {
        "/dev/vda"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cmdline_when_made_has_the_users_words_last() {
        let mut config = TomlConfig::default();
        config.hypervisor.dragonball.kernel_params = " loglevel=8  foo=bar ".into();
        let text = cmdline(&config.hypervisor.dragonball, &config, false);
        assert_eq!(
            text,
            "quiet loglevel=4 panic=-1 console=hvc0 dummy.numdummies=0 root=/dev/vda ro rootfstype=erofs \
             systemd.unit=kata-containers.target systemd.mask=systemd-networkd.service \
             systemd.mask=systemd-networkd.socket agent.log_vport=1025 agent.passfd_listener_port=1027 \
             agent.ready_vport=1023 loglevel=8 foo=bar"
        );

        config.agent.kata.enable_debug = true;
        config.agent.kata.debug_console_enabled = true;
        let text = cmdline(&config.hypervisor.dragonball, &config, true);
        assert!(
            !text.contains("quiet") && text.contains("agent.log=debug agent.debug_console"),
            "{text}"
        );
    }
}
