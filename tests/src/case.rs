//! One test: its containerd, its containers, its time limit, and what to show when it fails.
//!
//! Everything here panics on failure, as assertions do, after collecting the logs.

use std::fmt::Debug;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::thread;
use std::time::Duration;

use crate::command::{Finished, Input, Running, eventually, run};
use crate::containerd::Containerd;
use crate::diagnosis::{report, say};
use crate::image::BUSYBOX;
use crate::settings::{RUNC, Settings};

/// Tests that compare the whole host run alone; the others share.
static HOST: RwLock<()> = RwLock::new(());
/// The instance most tests share, because starting one takes seconds under emulation. Its janitor removes
/// it when this process ends.
static SHARED: OnceLock<Arc<Containerd>> = OnceLock::new();

enum HostUse {
    Shared { _guard: RwLockReadGuard<'static, ()> },
    Alone { _guard: RwLockWriteGuard<'static, ()> },
}

/// A test under way.
pub struct Case {
    name: String,
    daemon: Arc<Containerd>,
    runtime: String,
    log_start: u64,
    reported: AtomicBool,
    /// A thread of a shim is made to do what it must not.
    violates: AtomicBool,
    next: AtomicU32,
    _watchdog: Sender<()>,
    _host: HostUse,
}

impl Case {
    /// Begins a test on the shared containerd, beside other tests.
    pub fn begin(name: &str) -> Self {
        Self::on(name, shared_daemon(), share_host())
    }

    /// Begins a test on the shared containerd while no other test runs.
    pub fn begin_alone(name: &str) -> Self {
        let _guard = HOST.write().unwrap_or_else(PoisonError::into_inner);
        Self::on(name, shared_daemon(), HostUse::Alone { _guard })
    }

    /// Begins a test on a containerd of its own.
    pub fn begin_with(name: &str, settings: Settings) -> Self {
        let host = share_host();
        let daemon = Containerd::start(settings).unwrap_or_else(|e| panic!("{name}: {e}"));
        Self::on(name, Arc::new(daemon), host)
    }

    /// Begins a test on a containerd that other tests use too, beside them.
    pub fn begin_on(name: &str, daemon: Arc<Containerd>) -> Self {
        Self::on(name, daemon, share_host())
    }

    /// Begins a test on a containerd that other tests use too, while no other test runs.
    pub fn begin_alone_on(name: &str, daemon: Arc<Containerd>) -> Self {
        let _guard = HOST.write().unwrap_or_else(PoisonError::into_inner);
        Self::on(name, daemon, HostUse::Alone { _guard })
    }

    /// Plays `scenario` under runc, then under the runtime that is tested, and asserts that both have the same result,
    /// which is returned: runc is the reference for what a container is. Beside other tests.
    ///
    /// # Panics
    /// When the results differ.
    #[track_caller]
    pub fn like_runc<T: PartialEq + Debug>(name: &str, scenario: impl Fn(&Self) -> T) -> T {
        Self::compare(name, Self::begin, scenario)
    }

    /// The same while no other test runs.
    ///
    /// # Panics
    /// When the results differ.
    #[track_caller]
    pub fn like_runc_alone<T: PartialEq + Debug>(name: &str, scenario: impl Fn(&Self) -> T) -> T {
        Self::compare(name, Self::begin_alone, scenario)
    }

    #[track_caller]
    fn compare<T: PartialEq + Debug>(
        name: &str,
        begin: impl Fn(&str) -> Self,
        scenario: impl Fn(&Self) -> T,
    ) -> T {
        let mut reference = begin(&format!("{name}-runc"));
        let tested = std::mem::replace(&mut reference.runtime, RUNC.to_owned());
        let expected = scenario(&reference);
        drop(reference);
        if tested == RUNC {
            return expected;
        }
        let case = begin(name);
        let result = scenario(&case);
        assert_eq!(result, expected, "{tested} (left) is not like runc (right)");
        result
    }

    fn on(name: &str, daemon: Arc<Containerd>, host: HostUse) -> Self {
        let log_start = std::fs::metadata(daemon.log()).map_or(0, |log| log.len());
        let watchdog = watch(name.to_owned(), Arc::downgrade(&daemon), log_start);
        Self {
            name: name.to_owned(),
            runtime: daemon.settings.runtime.clone(),
            daemon,
            log_start,
            reported: AtomicBool::new(false),
            violates: AtomicBool::new(false),
            next: AtomicU32::new(0),
            _watchdog: watchdog,
            _host: host,
        }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The containerd of this test.
    pub fn daemon(&self) -> &Containerd {
        &self.daemon
    }

    /// The containerd of this test, for another test.
    pub fn shared(&self) -> Arc<Containerd> {
        Arc::clone(&self.daemon)
    }

    /// Whether this test's containers run in virtual machines.
    pub fn is_vm_runtime(&self) -> bool {
        self.runtime != RUNC
    }

    /// A folder of this test's own on the host.
    ///
    /// # Panics
    /// When it cannot be made.
    #[track_caller]
    pub fn folder(&self, name: &str) -> PathBuf {
        let path = self.daemon.dir().join(format!("{}-{name}", self.name));
        std::fs::create_dir_all(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        path
    }

    /// The words that choose the runtime in `ctr run` and `ctr containers create`.
    fn runtime_words(&self) -> Vec<String> {
        let mut words = vec!["--runtime".to_owned(), self.runtime.clone()];
        if let Some(config) = self
            .daemon
            .settings
            .config
            .as_ref()
            .filter(|_| self.is_vm_runtime())
        {
            words.extend(["--runtime-config-path".to_owned(), config.display().to_string()]);
        }
        words
    }

    /// The limit of one call.
    pub fn limit(&self) -> Duration {
        self.daemon.settings.call_limit
    }

    /// Reserves a container id; whatever runs under it is removed when the value is dropped.
    pub fn container(&self) -> Container<'_> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        Container {
            case: self,
            id: format!("{}-{}-{number}", self.name, std::process::id()),
        }
    }

    /// Runs `ctr` with these arguments.
    #[track_caller]
    pub fn ctr<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Finished {
        self.daemon.ctr(args).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Lets threads of shims make forbidden system calls, which fails a test otherwise. Only for a test that runs alone.
    pub fn expect_violations(&self) {
        self.violates.store(true, Ordering::Relaxed);
    }

    /// The log's lines about forbidden system calls of shims since the test began.
    ///
    /// # Panics
    /// When the log cannot be read.
    #[track_caller]
    pub fn violations(&self) -> Vec<String> {
        let mut log = std::fs::File::open(self.daemon.log()).unwrap_or_else(|e| panic!("log: {e}"));
        let mut bytes = Vec::new();
        let read = log
            .seek(SeekFrom::Start(self.log_start))
            .and_then(|_| log.read_to_end(&mut bytes));
        read.unwrap_or_else(|e| panic!("log: {e}"));
        let text = String::from_utf8_lossy(&bytes);
        let told = text.lines().filter(|line| line.contains("forbidden system call"));
        told.map(str::to_owned).collect()
    }

    /// Prints the logs once.
    pub(crate) fn report(&self) {
        if !self.reported.swap(true, Ordering::Relaxed) {
            eprintln!("==== {}\n{}", self.name, report(&self.daemon, self.log_start));
        }
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        if thread::panicking() {
            self.report();
        } else if !self.violates.load(Ordering::Relaxed) {
            let violations = self.violations();
            assert!(violations.is_empty(), "{}: {violations:#?}", self.name);
        }
    }
}

fn share_host() -> HostUse {
    HostUse::Shared {
        _guard: HOST.read().unwrap_or_else(PoisonError::into_inner),
    }
}

fn shared_daemon() -> Arc<Containerd> {
    let start = || Arc::new(Containerd::start(Settings::from_env()).unwrap_or_else(|e| panic!("{e}")));
    Arc::clone(SHARED.get_or_init(start))
}

/// Ends the whole process, with a diagnosis, when a test exceeds its limit: every wait is bounded by itself,
/// so this only happens when the harness is stuck.
fn watch(name: String, daemon: Weak<Containerd>, log_start: u64) -> Sender<()> {
    let (alive, ended) = mpsc::channel::<()>();
    let limit = Settings::from_env().test_limit;
    thread::spawn(move || {
        if matches!(ended.recv_timeout(limit), Err(RecvTimeoutError::Timeout)) {
            let report = daemon
                .upgrade()
                .map(|daemon| report(&daemon, log_start))
                .unwrap_or_default();
            say(&format!(
                "==== {name} did not end within {limit:?}, the limit E2E_TEST_TIMEOUT; giving up\n{report}"
            ));
            std::process::exit(124);
        }
    });
    alive
}

/// Says why the running test does not apply under runc, when that is what the suite runs against.
pub fn skipped_under_runc(reason: &str) -> bool {
    let skip = !Settings::from_env().is_vm_runtime();
    if skip {
        say(&format!("skipped under runc: {reason}"));
    }
    skip
}

/// A container id and what runs under it.
pub struct Container<'a> {
    case: &'a Case,
    id: String,
}

impl<'a> Container<'a> {
    /// The id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// A `ctr run` of the busybox image; the container's first process is `command`.
    pub fn run<'c>(&'c self, command: &[&str]) -> Run<'c> {
        Run {
            container: self,
            namespace: None,
            flags: Vec::new(),
            image: Some(BUSYBOX.to_owned()),
            command: command.iter().map(|&word| word.to_owned()).collect(),
        }
    }

    /// Starts the container in the background.
    #[track_caller]
    pub fn detached(&self, command: &[&str]) {
        self.run(command)
            .flag("-d")
            .flag("--null-io")
            .output()
            .expect_code(0);
    }

    /// `ctr containers create`: metadata and snapshot, no task. It takes flags anywhere, so the command has none.
    #[track_caller]
    pub fn create_only(&self, command: &[&str]) {
        let words = self.case.runtime_words();
        let mut ctr = vec!["containers", "create"];
        ctr.extend(words.iter().map(String::as_str));
        ctr.extend(["--snapshotter", self.case.daemon.snapshotter(), BUSYBOX, &self.id]);
        ctr.extend(command);
        self.case.ctr(ctr).expect_code(0);
    }

    /// A container that only waits; it ends on SIGTERM.
    #[track_caller]
    pub fn sleeping(&self) {
        self.detached(&[
            "sh",
            "-c",
            "trap 'exit 0' TERM; while :; do sleep 1 & wait $!; done",
        ]);
    }

    /// A `ctr tasks exec` command line.
    pub fn exec_command(&self, flags: &[&str], command: &[&str]) -> Command {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mut ctr = self.case.daemon.ctr_command();
        ctr.args(["tasks", "exec"]);
        if !flags.contains(&"--exec-id") {
            ctr.args([
                "--exec-id",
                &format!("exec{}", NEXT.fetch_add(1, Ordering::Relaxed)),
            ]);
        }
        ctr.args(flags).arg(&self.id).args(command);
        ctr
    }

    /// Runs a further process in the container.
    #[track_caller]
    pub fn exec(&self, flags: &[&str], command: &[&str]) -> Finished {
        run(&mut self.exec_command(flags, command), self.case.limit()).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Runs a script in the container, for its output.
    ///
    /// The script lingers before it exits: `ctr` 1.6 cancels the streams of an exec when it ends, and on a busy machine
    /// that can come before it has opened them (`process.Delete` in containerd's client).
    #[track_caller]
    pub fn script(&self, flags: &[&str], script: &str) -> Finished {
        self.exec(
            flags,
            &["sh", "-c", &format!("({script}); code=$?; sleep 0.3; exit $code")],
        )
    }

    /// Sends a signal to the first process.
    #[track_caller]
    pub fn kill(&self, signal: &str) -> Finished {
        self.case.ctr(["tasks", "kill", "-s", signal, &self.id])
    }

    /// The state `ctr tasks ls` shows, such as `RUNNING`; `None` without a task.
    #[track_caller]
    pub fn state(&self) -> Option<String> {
        let list = self.case.ctr(["tasks", "ls"]).out();
        let line = list
            .lines()
            .find(|line| line.split_whitespace().next() == Some(&self.id))?;
        line.split_whitespace().nth(2).map(str::to_owned)
    }

    /// Waits until `ctr tasks ls` shows this state.
    #[track_caller]
    pub fn wait_state(&self, state: Option<&str>) {
        let mut seen = None;
        let reached = eventually(self.case.limit(), || {
            seen = self.state();
            seen.as_deref() == state
        });
        assert!(reached, "container {} is {seen:?}, expected {state:?}", self.id);
    }

    /// The process id of this container's shim.
    #[track_caller]
    pub fn shim(&self) -> i32 {
        self.find_shim()
            .unwrap_or_else(|| panic!("no shim of {} among the processes", self.id))
    }

    /// The process id of this container's shim; `None` while there is none.
    pub fn find_shim(&self) -> Option<i32> {
        let daemon = &self.case.daemon;
        let name = daemon.settings.shim_name();
        let id = format!("-id {} ", self.id);
        let found = crate::diagnosis::processes_mentioning(&name);
        // Not the one that starts or deletes it: those end with their word.
        let serves = |line: &str| !line.ends_with(" start") && !line.ends_with(" delete");
        let ours = |line: &&String| {
            format!("{line} ").contains(&id) && line.contains(daemon.namespace()) && serves(line)
        };
        let line = found.iter().find(ours)?;
        line.split(' ').next()?.parse().ok()
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // The guest's console log goes away with the container, so the report comes first.
        if thread::panicking() {
            self.case.report();
        }
        self.case.daemon.remove_container(&self.id);
    }
}

/// A `ctr run` being put together.
pub struct Run<'a> {
    container: &'a Container<'a>,
    namespace: Option<String>,
    flags: Vec<String>,
    image: Option<String>,
    command: Vec<String>,
}

impl Run<'_> {
    /// Adds a flag, as one word.
    pub fn flag(mut self, flag: &str) -> Self {
        self.flags.push(flag.to_owned());
        self
    }

    /// Adds a flag with its value.
    pub fn option(self, flag: &str, value: &str) -> Self {
        self.flag(flag).flag(value)
    }

    /// Uses another namespace of the same containerd; the image must be there, and nobody cleans up.
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.namespace = Some(namespace.to_owned());
        self
    }

    /// Uses another image.
    pub fn image(mut self, image: &str) -> Self {
        self.image = Some(image.to_owned());
        self
    }

    /// Uses no image and no command: `--config` says both.
    pub fn without_image(mut self) -> Self {
        self.image = None;
        self
    }

    /// The command line.
    pub fn command(&self) -> Command {
        let daemon = &self.container.case.daemon;
        let mut ctr = daemon.ctr_command();
        if let Some(namespace) = &self.namespace {
            // The last one counts.
            ctr.args(["-n", namespace]);
        }
        let mut words = self.container.case.runtime_words();
        if self.flags.iter().any(|flag| flag == "--runtime-config-path") {
            words.truncate(2);
        }
        ctr.arg("run").args(words);
        if self.image.is_some() {
            ctr.args(["--snapshotter", daemon.snapshotter()]);
        }
        ctr.args(&self.flags)
            .args(&self.image)
            .arg(&self.container.id)
            .args(&self.command);
        ctr
    }

    /// Starts it in the background.
    #[track_caller]
    pub fn start(&self, input: Input) -> Running {
        Running::start(&mut self.command(), input).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Runs it to its end with this input.
    #[track_caller]
    pub fn output_with(&self, input: Input) -> Finished {
        self.start(input)
            .finish(self.container.case.limit())
            .unwrap_or_else(|e| panic!("{e}"))
    }

    /// Runs it to its end.
    #[track_caller]
    pub fn output(&self) -> Finished {
        self.output_with(Input::Null)
    }
}
