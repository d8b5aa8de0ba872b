//! What the runtime tells the agent before it can talk to it: `agent.*` words on the kernel command line, or the
//! same words as arguments in test mode.

use std::time::Duration;

/// ttrpc port the agent listens on unless `agent.server_addr` says otherwise.
pub const DEFAULT_SERVER_PORT: u32 = 1024;

const DEFAULT_HOTPLUG_TIMEOUT: Duration = Duration::from_secs(3);
/// Linux refuses pipes larger than this to unprivileged users; nobody needs more.
const MAX_PIPE_SIZE: u32 = 1 << 20;

/// Where a listening socket lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A vsock port of this guest.
    Vsock(u32),
    /// A Unix socket path (test mode).
    Unix(String),
}

/// The agent's options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where the ttrpc server listens: `agent.server_addr=vsock://-1:PORT` or `unix://PATH`.
    pub server: Address,
    /// Least important level that is logged: `agent.log=LEVEL`.
    pub log_level: tracing::Level,
    /// Where the host reads the log: `agent.log_vport=PORT`.
    pub log: Option<Address>,
    /// Where the host connects container stdio: `agent.passfd_listener_port=PORT` (test mode: `unix://PATH`).
    pub stdio: Option<Address>,
    /// Where the host reaches TCP ports of the pod's loopback, if not at the protocol's own port of a guest (test mode):
    /// `agent.connect_vport=PORT` or `unix://PATH`.
    pub connect: Option<Address>,
    /// Port on the host that is told when the agent listens: `agent.ready_vport=PORT`.
    pub ready_port: Option<u32>,
    /// How long a device may take to appear: `agent.hotplug_timeout=SECONDS`.
    pub hotplug_timeout: Duration,
    /// Capacity of stdio pipes in bytes, kernel default if absent: `agent.container_pipe_size=BYTES`.
    pub pipe_size: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            server: Address::Vsock(DEFAULT_SERVER_PORT),
            log_level: tracing::Level::INFO,
            log: None,
            stdio: None,
            connect: None,
            ready_port: None,
            hotplug_timeout: DEFAULT_HOTPLUG_TIMEOUT,
            pipe_size: None,
        }
    }
}

impl Options {
    /// Reads the `agent.*` words of `line`. Never fails: an agent that does not start cannot report why, so a bad
    /// word keeps its default and comes back as a warning to be logged.
    pub fn parse(line: &str) -> (Self, Vec<String>) {
        let mut options = Self::default();
        let mut warnings = Vec::new();
        for word in line.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            if !key.starts_with("agent.") {
                continue;
            }
            if let Err(reason) = options.set(key, value) {
                let warning = format!("kernel command line: {word}: {reason}");
                if !warnings.contains(&warning) {
                    warnings.push(warning);
                }
            }
        }
        (options, warnings)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), &'static str> {
        match key {
            "agent.log" => self.log_level = value.parse().map_err(|_| "not a log level")?,
            "agent.server_addr" => self.server = address(value)?,
            "agent.log_vport" => self.log = Some(address(value)?),
            "agent.passfd_listener_port" => self.stdio = Some(address(value)?),
            "agent.connect_vport" => self.connect = Some(address(value)?),
            "agent.ready_vport" => self.ready_port = Some(port(value)?),
            "agent.hotplug_timeout" => {
                let seconds: u32 = value.parse().map_err(|_| "not a number of seconds")?;
                self.hotplug_timeout = Duration::from_secs(seconds.into());
            }
            "agent.container_pipe_size" => {
                let size: u32 = value.parse().map_err(|_| "not a number of bytes")?;
                if size > MAX_PIPE_SIZE {
                    return Err("larger than 1 MiB");
                }
                self.pipe_size = Some(size).filter(|size| *size > 0);
            }
            "agent.debug_console" | "agent.debug_console_vport" => {
                return Err("this agent has no debug console");
            }
            _ => return Err("unknown option"),
        }
        Ok(())
    }
}

/// `PORT`, `vsock://-1:PORT` or `unix://PATH`.
fn address(value: &str) -> Result<Address, &'static str> {
    if let Some(path) = value.strip_prefix("unix://") {
        return if path.starts_with('/') {
            Ok(Address::Unix(path.to_owned()))
        } else {
            Err("not an absolute path")
        };
    }
    let number = match value.strip_prefix("vsock://") {
        Some(rest) => rest.rsplit_once(':').map(|(_, port)| port).ok_or("no port")?,
        None => value,
    };
    port(number).map(Address::Vsock)
}

fn port(value: &str) -> Result<u32, &'static str> {
    match value.parse() {
        Ok(port) if port != 0 && port != u32::MAX => Ok(port),
        _ => Err("not a port"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_when_complete_sets_every_option() {
        let line = "quiet console=hvc0 agent.log=debug agent.log_vport=1025 agent.passfd_listener_port=1027 \
                    agent.connect_vport=1031 \
                    agent.ready_vport=1023 agent.hotplug_timeout=7 agent.container_pipe_size=65536 \
                    agent.server_addr=vsock://-1:2048 panic=-1";

        let (options, warnings) = Options::parse(line);

        assert_eq!(warnings, Vec::<String>::new());
        assert_eq!(
            options,
            Options {
                server: Address::Vsock(2048),
                log_level: tracing::Level::DEBUG,
                log: Some(Address::Vsock(1025)),
                stdio: Some(Address::Vsock(1027)),
                connect: Some(Address::Vsock(1031)),
                ready_port: Some(1023),
                hotplug_timeout: Duration::from_secs(7),
                pipe_size: Some(65536),
            }
        );
    }

    #[test]
    fn words_when_bad_keep_the_default_and_warn_once() {
        let (options, warnings) = Options::parse(
            "agent.frob=1 agent.frob=1 agent.log_vport=0 agent.container_pipe_size=9999999 agent.debug_console",
        );

        assert_eq!(options, Options::default());
        assert_eq!(
            warnings,
            [
                "kernel command line: agent.frob=1: unknown option",
                "kernel command line: agent.log_vport=0: not a port",
                "kernel command line: agent.container_pipe_size=9999999: larger than 1 MiB",
                "kernel command line: agent.debug_console: this agent has no debug console",
            ]
        );
    }

    #[test]
    fn address_when_unix_needs_an_absolute_path() {
        assert_eq!(
            address("unix:///run/a.sock"),
            Ok(Address::Unix("/run/a.sock".into()))
        );
        assert_eq!(address("unix://a.sock"), Err("not an absolute path"));
        assert_eq!(address("vsock://-1"), Err("no port"));
    }
}
