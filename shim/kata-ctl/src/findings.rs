//! The runtime's findings about host and configuration, put into words.

use runtime::check::{self, Finding};
use runtime::types::RuntimeOptions;
use serde_json::{Map, Value, json};
use shim::version;

/// The outcome of a check, for people and for scripts.
#[derive(Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether everything that was checked can be used.
    pub usable: bool,
    /// What to print.
    pub text: String,
}

/// Checks the host and the configuration.
pub fn check(options: &RuntimeOptions) -> Verdict {
    let mut findings = check::host();
    findings.extend(check::configuration(options));
    report(&findings)
}

/// Checks only KVM, and answers in one line.
pub fn check_kvm() -> Verdict {
    one_line(&check::host())
}

/// One line per finding and one with the verdict.
fn report(findings: &[Finding]) -> Verdict {
    let mut text = String::new();
    for finding in findings {
        let (mark, detail) = match &finding.result {
            Ok(detail) => ("ok", detail),
            Err(detail) => ("FAIL", detail),
        };
        text.push_str(&format!("{mark:<5} {}: {detail}\n", finding.what));
    }
    let failed = findings.iter().filter(|finding| finding.result.is_err()).count();
    text.push_str(&match failed {
        0 => "This host can run Kata containers.\n".to_owned(),
        1 => "This host cannot run Kata containers: 1 check failed.\n".to_owned(),
        count => format!("This host cannot run Kata containers: {count} checks failed.\n"),
    });
    Verdict {
        usable: failed == 0,
        text,
    }
}

/// The first failure, or that there is none.
fn one_line(findings: &[Finding]) -> Verdict {
    let failure = findings
        .iter()
        .find_map(|finding| finding.result.as_ref().err().map(|error| (finding, error)));
    match failure {
        None => Verdict {
            usable: true,
            text: "KVM can run Linux guests\n".to_owned(),
        },
        Some((finding, error)) => Verdict {
            usable: false,
            text: format!("{}: {error}\n", finding.what),
        },
    }
}

/// Versions, configuration and host, as one value.
pub fn env(options: &RuntimeOptions) -> Value {
    let findings = |findings: Vec<Finding>| -> Map<String, Value> {
        let entry = |finding: Finding| match finding.result {
            Ok(detail) => (finding.what, json!({ "ok": true, "detail": detail })),
            Err(detail) => (finding.what, json!({ "ok": false, "detail": detail })),
        };
        findings.into_iter().map(entry).collect()
    };
    json!({
        "runtime": {
            "name": version::NAME,
            "type": version::RUNTIME_TYPE,
            "version": version::VERSION,
            "revision": version::REVISION,
        },
        "host": findings(check::host()),
        "configuration": findings(check::configuration(options)),
    })
}

/// A value of [`env`] as indented `key: value` lines.
pub fn as_text(value: &Value) -> String {
    let mut lines = Vec::new();
    collect(value, 0, &mut lines);
    lines.join("\n")
}

fn collect(value: &Value, depth: usize, lines: &mut Vec<String>) {
    let Value::Object(map) = value else { return };
    let indent = "  ".repeat(depth);
    for (key, value) in map {
        match value {
            Value::Object(_) => {
                lines.push(format!("{indent}{key}:"));
                collect(value, depth + 1, lines);
            }
            Value::String(text) => lines.push(format!("{indent}{key}: {text}")),
            other => lines.push(format!("{indent}{key}: {other}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(what: &str, result: Result<&str, &str>) -> Finding {
        Finding {
            what: what.into(),
            result: result.map(Into::into).map_err(Into::into),
        }
    }

    #[test]
    fn report_when_made_has_a_line_per_finding() {
        let good = [finding("/dev/kvm", Ok("API version 12"))];
        let bad = [
            finding("/dev/kvm", Ok("API version 12")),
            finding("kernel", Err("/x: not found")),
        ];

        let good = report(&good);
        assert!(good.usable);
        assert_eq!(
            good.text,
            "ok    /dev/kvm: API version 12\nThis host can run Kata containers.\n"
        );
        let report = report(&bad);
        assert!(
            !report.usable && report.text.contains("FAIL  kernel: /x: not found\n"),
            "{report:?}"
        );
        assert!(
            report
                .text
                .ends_with("This host cannot run Kata containers: 1 check failed.\n"),
            "{report:?}"
        );
        assert_eq!(
            one_line(&bad),
            Verdict {
                usable: false,
                text: "kernel: /x: not found\n".into()
            }
        );
    }

    #[test]
    fn text_when_nested_is_indented() {
        let value = json!({ "a": { "b": "c", "d": true } });

        assert_eq!(as_text(&value), "a:\n  b: c\n  d: true");
    }
}
