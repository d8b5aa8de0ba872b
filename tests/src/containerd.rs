//! A private containerd: own root, state, socket and configuration in one temporary folder.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use crate::command::{self, Finished, Input, Running, eventually};
use crate::settings::Settings;
use crate::{cri, diagnosis, image};

/// How long containerd may take to answer; 40 ms on metal, seconds under emulation.
const START_LIMIT: Duration = Duration::from_secs(120);
/// How long containerd may take to leave after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// How long the janitor may take; containers, processes and mounts are bounded one by one inside it.
const JANITOR_LIMIT: Duration = Duration::from_secs(120);

const JANITOR: &str = include_str!("janitor.sh");

/// CRI, which takes a namespace of its own and a network.
const CRI_PLUGINS: &[&str] = &[
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
];

/// The namespace of everything CRI makes.
const CRI_NAMESPACE: &str = "k8s.io";

/// Plugins that slow the start down or reach outside the private folder.
const DISABLED: &[&str] = &[
    "io.containerd.internal.v1.opt",
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
];

/// Why containerd is not usable.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder of the private instance could not be made.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// containerd could not be executed.
    #[error("cannot start {program}: {source}")]
    Start {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// containerd does not answer.
    #[error("{program} did not answer on {socket} within {limit:?}\n{log}")]
    Silent {
        /// The program.
        program: PathBuf,
        /// Its socket.
        socket: PathBuf,
        /// The limit.
        limit: Duration,
        /// The end of its log.
        log: String,
    },
    /// The test image could not be built.
    #[error(transparent)]
    Image(#[from] image::Error),
    /// A `ctr` call had no result.
    #[error(transparent)]
    Command(#[from] command::Error),
    /// A `ctr` call that prepares the instance failed.
    #[error("preparing containerd failed: {0}")]
    Prepare(String),
}

/// A running private containerd. Dropping it removes everything it made.
pub struct Containerd {
    /// How this instance was asked to behave.
    pub settings: Settings,
    dir: PathBuf,
    namespace: String,
    snapshotter: String,
    child: Mutex<Option<Child>>,
    janitor: Option<(Child, ChildStdin)>,
}

impl Containerd {
    /// Starts an instance and imports the test image.
    ///
    /// # Errors
    /// When containerd cannot start, does not answer, or refuses the image.
    pub fn start(settings: Settings) -> Result<Self, Error> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "e2e-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let dir = std::env::temp_dir().join(&name);
        fs::create_dir_all(&dir).map_err(|source| Error::File {
            path: dir.clone(),
            source,
        })?;
        let namespace = settings.cri.as_ref().map_or(name, |_| CRI_NAMESPACE.to_owned());
        let mut daemon = Self {
            settings,
            dir,
            namespace,
            snapshotter: String::new(),
            child: Mutex::new(None),
            janitor: None,
        };
        daemon.write_config()?;
        daemon.janitor = Some(daemon.hire_janitor()?);
        daemon.launch()?;
        daemon.snapshotter = daemon.choose_snapshotter()?;
        daemon.import()?;
        Ok(daemon)
    }

    fn write_config(&self) -> Result<(), Error> {
        let path = self.path("config.toml");
        let failed = |source| Error::File {
            path: path.clone(),
            source,
        };
        let (mut disabled, mut version, mut sections) = (DISABLED.to_vec(), 2, String::new());
        if let Some(cri) = &self.settings.cri {
            cri::cni::write(&cri.networks, &self.dir).map_err(failed)?;
            // Known before containerd says what works: what works is overlayfs, where pods run.
            let snapshotter = self.settings.snapshotter.as_deref().unwrap_or("overlayfs");
            sections = cri.sections(&self.dir, &self.settings, snapshotter);
            version = cri.config_version();
        } else {
            disabled.extend(CRI_PLUGINS);
        }
        let disabled = disabled.iter().map(|id| format!("{id:?}")).collect::<Vec<_>>();
        let (dir, disabled) = (self.dir.display(), disabled.join(", "));
        let text = format!(
            "version = {version}\nroot = \"{dir}/root\"\nstate = \"{dir}/state\"\ndisabled_plugins = [{disabled}]\n\
             [grpc]\naddress = \"{dir}/c.sock\"\n[debug]\nlevel = \"debug\"\n{sections}"
        );
        fs::write(&path, text).map_err(failed)
    }

    fn hire_janitor(&self) -> Result<(Child, ChildStdin), Error> {
        let log = self.open_log("janitor.log")?;
        let failed = |source| Error::Start {
            program: "sh".into(),
            source,
        };
        let mut child = Command::new("sh")
            .args(["-c", JANITOR, "janitor"])
            .args([self.dir.as_os_str(), self.ctr_program().as_os_str()])
            .arg(&self.namespace)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            .current_dir("/")
            // Out of reach of a signal sent to the test's process group.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let stdin = child
            .stdin
            .take()
            .ok_or_else(|| failed(std::io::ErrorKind::BrokenPipe.into()))?;
        Ok((child, stdin))
    }

    /// Starts the daemon (again) on the same folders and waits until it answers.
    ///
    /// # Errors
    /// When it cannot start or does not answer.
    pub fn launch(&self) -> Result<(), Error> {
        let log = self.open_log("containerd.log")?;
        let program = self.settings.containerd.join("containerd");
        let failed = |source| Error::Start {
            program: program.clone(),
            source,
        };
        let mut command = match &self.settings.host_change {
            None => Command::new(&program),
            Some(script) => {
                let mut unshare = Command::new("unshare");
                unshare
                    .args(["--mount", "sh", "-ec", &format!("{script}\nexec \"$@\""), "sh"])
                    .arg(&program);
                unshare.env("DIR", &self.dir);
                unshare
            }
        };
        command
            .arg("--config")
            .arg(self.path("config.toml"))
            .env("PATH", self.search_path())
            .envs(self.settings.environment.iter().map(|(k, v)| (k, v)))
            .current_dir(&self.dir)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(failed)?)
            .stderr(log);
        let child = command.spawn().map_err(failed)?;
        let pid = self.path("pid");
        fs::write(&pid, child.id().to_string()).map_err(|source| Error::File { path: pid, source })?;
        *self.lock_child() = Some(child);
        let answers = || self.ctr(["version"]).is_ok_and(|done| done.code == 0);
        if eventually(START_LIMIT, answers) {
            return Ok(());
        }
        Err(Error::Silent {
            program,
            socket: self.socket(),
            limit: START_LIMIT,
            log: diagnosis::tail_of(&self.log(), 0),
        })
    }

    /// Stops the daemon and leaves its containers running, as a package upgrade does.
    pub fn stop(&self) {
        let Some(mut child) = self.lock_child().take() else {
            return;
        };
        if let Some(pid) = i32::try_from(child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
        {
            // Fails only when it has exited by itself, which the wait below sees.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        if !eventually(STOP_LIMIT, || !matches!(child.try_wait(), Ok(None))) {
            let _ = child.kill();
        }
        let _ = child.wait();
    }

    fn choose_snapshotter(&self) -> Result<String, Error> {
        if let Some(name) = &self.settings.snapshotter {
            return Ok(name.clone());
        }
        let plugins = self.ctr(["plugins", "ls"])?.out();
        let works = |line: &str| {
            let mut words = line.split_whitespace();
            words.any(|word| word == "overlayfs") && words.next_back() == Some("ok")
        };
        Ok(if plugins.lines().any(works) {
            "overlayfs"
        } else {
            "native"
        }
        .to_owned())
    }

    fn import(&self) -> Result<(), Error> {
        let archive = self.path("image.tar");
        image::write_archive(&self.settings.busybox, &archive)?;
        let mut import = self.ctr_command();
        import
            .args(["images", "import", "--snapshotter", &self.snapshotter])
            .arg(&archive);
        let done = command::run(&mut import, self.settings.call_limit)?;
        let listed = self.ctr(["images", "ls", "-q"])?;
        if done.code != 0
            || ![image::BUSYBOX, image::TESTER, image::PAUSE]
                .iter()
                .all(|name| listed.out().contains(name))
        {
            return Err(Error::Prepare(format!(
                "{}\n{}",
                done.describe(),
                listed.describe()
            )));
        }
        Ok(())
    }

    /// A `ctr` command line for this instance, without a sub-command.
    pub fn ctr_command(&self) -> Command {
        let mut command = Command::new(self.ctr_program());
        command.arg("-a").arg(self.socket()).args(["-n", &self.namespace]);
        command
    }

    /// Runs `ctr` to its end.
    ///
    /// # Errors
    /// When it cannot start or exceeds the limit.
    pub fn ctr<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<Finished, command::Error> {
        command::run(self.ctr_command().args(args), self.settings.call_limit)
    }

    /// Starts `ctr` in the background.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn ctr_start<'a>(
        &self,
        args: impl IntoIterator<Item = &'a str>,
        input: Input,
    ) -> Result<Running, command::Error> {
        Running::start(self.ctr_command().args(args), input)
    }

    /// Removes a container with its processes and snapshot, if it is still there. Used for cleaning up, so
    /// failures are left for the leftover checks to find.
    pub fn remove_container(&self, id: &str) {
        let present = self
            .ctr(["containers", "ls", "-q"])
            .is_ok_and(|done| done.out().lines().any(|l| l == id));
        if present {
            let _ = self.ctr(["tasks", "kill", "-s", "KILL", id]);
            let _ = self.ctr(["tasks", "rm", "-f", id]);
            let _ = self.ctr(["containers", "rm", id]);
        }
    }

    fn ctr_program(&self) -> PathBuf {
        self.settings.containerd.join("ctr")
    }

    fn search_path(&self) -> OsString {
        let mut path = OsString::from(&self.settings.shim_dir);
        for part in [
            self.settings.containerd.clone().into_os_string(),
            std::env::var_os("PATH").unwrap_or_default(),
        ] {
            path.push(":");
            path.push(part);
        }
        path
    }

    fn open_log(&self, name: &str) -> Result<File, Error> {
        let path = self.path(name);
        File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|source| Error::File { path, source })
    }

    fn lock_child(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.child
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The private folder; it is on the command line of every process containerd starts.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The gRPC socket.
    pub fn socket(&self) -> PathBuf {
        self.path("c.sock")
    }

    /// The log file, which also has the log of every shim.
    pub fn log(&self) -> PathBuf {
        self.path("containerd.log")
    }

    /// The namespace of this run.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The snapshotter in use.
    pub fn snapshotter(&self) -> &str {
        &self.snapshotter
    }

    /// The bundle folder of a container.
    pub fn bundle(&self, id: &str) -> PathBuf {
        self.dir
            .join("state/io.containerd.runtime.v2.task")
            .join(&self.namespace)
            .join(id)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        // The janitor starts when its standard input ends, and stops containerd itself.
        if let Some((mut janitor, stdin)) = self.janitor.take() {
            drop(stdin);
            let mut daemon = self.lock_child().take();
            let done = eventually(JANITOR_LIMIT, || {
                // Reaps containerd: the janitor sees a zombie as a process that is still there.
                if let Some(child) = daemon.as_mut() {
                    let _ = child.try_wait();
                }
                !matches!(janitor.try_wait(), Ok(None))
            });
            if !done {
                let _ = janitor.kill();
                let _ = janitor.wait();
            }
        }
    }
}
