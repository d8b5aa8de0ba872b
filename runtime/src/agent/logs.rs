//! The agent's log stream, line by line into the shim's log.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

use crate::hypervisor::Hypervisor;

/// Longest line that is kept together; the guest decides what it sends.
const MAX_LINE: u64 = 16 * 1024;

/// Connects to the agent's log port and forwards lines until the guest closes it. Ends quietly when the guest has no
/// log stream. Run it as a task of its own.
pub async fn forward_logs(hypervisor: Arc<dyn Hypervisor>, port: u32, timeout: Duration, sandbox: String) {
    let stream = match hypervisor.vsock_connect(port, timeout).await {
        Ok(stream) => stream,
        Err(error) => {
            tracing::debug!(%error, sandbox, "no agent log stream");
            return;
        }
    };
    let stream = stream
        .set_nonblocking(true)
        .and_then(|()| tokio::net::UnixStream::from_std(stream));
    let mut reader = match stream {
        Ok(stream) => BufReader::new(stream),
        Err(error) => {
            tracing::warn!(%error, sandbox, "agent log stream");
            return;
        }
    };
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).await {
            Ok(0) | Err(_) => return,
            Ok(_) => forward(String::from_utf8_lossy(&line).trim_end(), &sandbox),
        }
    }
}

/// The agent logs JSON objects with `level` and `msg`; anything else is passed on as it is.
fn forward(line: &str, sandbox: &str) {
    if line.is_empty() {
        return;
    }
    let (level, message) = parse(line);
    match level {
        Level::Error => tracing::error!(target: "agent", sandbox, "{message}"),
        Level::Warn => tracing::warn!(target: "agent", sandbox, "{message}"),
        Level::Info => tracing::info!(target: "agent", sandbox, "{message}"),
        Level::Debug => tracing::debug!(target: "agent", sandbox, "{message}"),
    }
}

/// How much a line of the agent matters.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

/// Level and text of a line.
pub(crate) fn parse(line: &str) -> (Level, String) {
    let object = match serde_json::from_str::<serde_json::Value>(line) {
        Ok(serde_json::Value::Object(object)) => object,
        _ => return (Level::Info, line.to_owned()),
    };
    let text = |key: &str| object.get(key).and_then(serde_json::Value::as_str);
    let level = match text("level").unwrap_or("INFO").to_ascii_uppercase().as_str() {
        "CRIT" | "ERRO" | "ERROR" => Level::Error,
        "WARN" | "WARNING" => Level::Warn,
        "DEBG" | "DEBUG" | "TRCE" | "TRACE" => Level::Debug,
        _ => Level::Info,
    };
    let Some(message) = text("msg").or_else(|| text("message")) else {
        return (level, line.to_owned());
    };
    let known = [
        "level",
        "msg",
        "message",
        "ts",
        "pid",
        "version",
        "name",
        "source",
        "timestamp",
    ];
    let fields: Vec<String> = object
        .iter()
        .filter(|(key, _)| !known.contains(&key.as_str()))
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    (
        level,
        [message.to_owned(), fields.join(" ")]
            .join(" ")
            .trim_end()
            .to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_line_when_json_keeps_level_message_and_fields() {
        let line = r#"{"msg":"container created","level":"DEBG","ts":"x","pid":"1","container":"c1"}"#;
        assert_eq!(
            parse(line),
            (Level::Debug, r#"container created container="c1""#.to_owned())
        );
    }

    #[test]
    fn agent_line_when_not_json_passes_unchanged() {
        assert_eq!(parse("plain text"), (Level::Info, "plain text".to_owned()));
        assert_eq!(parse("[1]"), (Level::Info, "[1]".to_owned()));
    }
}
