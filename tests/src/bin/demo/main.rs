//! `make demo`: one container through a real containerd, with the host's and the guest's kernel side by side
//! and the time each phase took; then pods with a network, as kubelet runs them.

mod pods;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use tests::command::{Input, Running, run};
use tests::containerd::Containerd;
use tests::diagnosis::report;
use tests::image::BUSYBOX;
use tests::settings::Settings;
use tests::timeline::Timeline;

const GREETING: &str = "Hello from a container in a microVM";

fn main() -> ExitCode {
    match demo().and_then(|()| pods::demo()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("demo: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Has the runtime note when it reaches each phase; returns the file.
fn notes(settings: &mut Settings) -> PathBuf {
    let notes = std::env::temp_dir().join(format!("kata-timeline-{}", std::process::id()));
    settings
        .environment
        .push(("KATA_TIMELINE".to_owned(), notes.display().to_string()));
    notes
}

/// What was noted since the last time.
fn take(notes: &Path) -> Timeline {
    let timeline = Timeline::parse(&std::fs::read_to_string(notes).unwrap_or_default());
    // Only there when the runtime wrote it.
    let _ = std::fs::remove_file(notes);
    timeline
}

fn demo() -> Result<(), Box<dyn Error>> {
    let mut settings = Settings::from_env();
    let notes = notes(&mut settings);
    let limit = settings.call_limit;
    let daemon = Containerd::start(settings)?;

    let mut ctr = daemon.ctr_command();
    ctr.args(["run", "--rm", "--runtime", &daemon.settings.runtime]);
    if let Some(config) = &daemon.settings.config {
        ctr.arg("--runtime-config-path").arg(config);
    }
    let script = format!("echo {GREETING}; uname -r");
    ctr.args([
        "--snapshotter",
        daemon.snapshotter(),
        BUSYBOX,
        "demo",
        "sh",
        "-c",
        &script,
    ]);

    println!(
        "$ ctr run --rm --runtime {} {BUSYBOX} demo sh -c '{script}'",
        daemon.settings.runtime
    );
    let done = Running::start(&mut ctr, Input::Null)?.finish(limit)?;
    print!("{}", done.out());
    let timeline = take(&notes);
    let output = done.out();
    let mut lines = output.lines();
    if done.code != 0 || lines.next() != Some(GREETING) {
        return Err(format!("{}\n{}", done.describe(), report(&daemon, 0)).into());
    }
    let guest = lines.next().unwrap_or("-");
    let host = run(Command::new("uname").arg("-r"), limit)?.out();

    println!("\n{:<32}{:<32}", "host kernel", "guest kernel");
    println!("{:<32}{guest:<32}\n", host.trim_end());
    print!("{}", timeline.table());
    println!(
        "{:<20}{:>12}",
        "ctr run, in all",
        format!("{}.0", done.elapsed.as_millis())
    );
    Ok(())
}
