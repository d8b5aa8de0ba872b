//! One log event as one logfmt line, the form containerd and its own shims write:
//! `time="2026-11-23T10:00:00.000000Z" level=info msg="…" key=value`.

use std::fmt;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

/// Formats events; `suffix` ends every line (fields that never change, already formatted).
#[derive(Debug, Clone)]
pub struct Logfmt {
    /// Constant fields, e.g. `sandbox=abc pid=7`.
    pub suffix: String,
}

impl<S, N> FormatEvent<S, N> for Logfmt
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        writer.write_str("time=\"")?;
        SystemTime.format_time(&mut writer)?;
        write!(writer, "\" level={} msg=", level(*event.metadata().level()))?;
        value(&mut writer, &fields.message)?;
        for span in context.event_scope().into_iter().flatten() {
            if let Some(text) = span
                .extensions()
                .get::<FormattedFields<N>>()
                .filter(|text| !text.is_empty())
            {
                write!(writer, " {text}")?;
            }
        }
        write!(writer, "{} subsystem={}", fields.rest, event.metadata().target())?;
        writeln!(writer, " {}", self.suffix)
    }
}

/// logrus' names of the levels.
fn level(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// Writes `text` bare if that is unambiguous, else quoted and escaped, so that a line stays one line.
pub fn value(writer: &mut dyn fmt::Write, text: &str) -> fmt::Result {
    let bare = !text.is_empty()
        && text.bytes().all(|b| {
            b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'/' | b'@' | b'^' | b'+' | b':')
        });
    if bare {
        writer.write_str(text)
    } else {
        write!(writer, "{text:?}")
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    rest: String,
}

impl Fields {
    fn add(&mut self, field: &Field, text: &str) {
        if field.name() == "message" {
            self.message.push_str(text);
            return;
        }
        self.rest.push(' ');
        self.rest.push_str(field.name().trim_start_matches("r#"));
        self.rest.push('=');
        // Writing to a String cannot fail.
        let _ = value(&mut self.rest, text);
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, text: &str) {
        self.add(field, text);
    }

    fn record_debug(&mut self, field: &Field, debug: &dyn fmt::Debug) {
        self.add(field, &format!("{debug:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_quoted_when_they_must_be() {
        let cases = [
            ("abc-1./_:x", "abc-1./_:x"),
            ("", "\"\""),
            ("two words", "\"two words\""),
            ("line\nbreak \"q\"", "\"line\\nbreak \\\"q\\\"\""),
        ];
        for (text, expected) in cases {
            let mut out = String::new();
            value(&mut out, text).unwrap();
            assert_eq!(out, expected);
        }
    }
}
