//! Pods of one test: each is stopped and removed when the test ends.
//!
//! Everything here panics on failure, as assertions do, after collecting the logs.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::client::CriClient;
use super::cni::Subnets;
use super::config::{Cri, Series, handler};
pub use super::member::{LogLine, Member, MemberSpec, Output};
pub use super::pod::{Pod, PodSpec};
use super::private::{self, host};
use super::wire::*;
use crate::case::Case;
use crate::command::eventually;
use crate::containerd::Containerd;
use crate::image::{BUSYBOX, PAUSE};
use crate::settings::Settings;

/// One containerd of each series, because starting one takes seconds under emulation.
static SHARED: [OnceLock<Arc<Containerd>>; 3] = [OnceLock::new(), OnceLock::new(), OnceLock::new()];
/// Numbers of the containerds beside the shared ones.
static NEXT: AtomicU8 = AtomicU8::new(3);

/// A test that makes pods: its containerd's CRI, and the runtime its pods run under.
pub struct Pods {
    case: Case,
    client: CriClient,
    vm: bool,
    sandbox_api: bool,
    /// Addresses of the networks.
    pub subnets: Subnets,
    next: AtomicU32,
}

impl Pods {
    /// Plays `scenario` under runc, then under the runtime that is tested, and asserts that both have the same result, which is
    /// returned. Beside other tests.
    ///
    /// # Panics
    /// When the results differ.
    #[track_caller]
    pub fn like_runc<T: PartialEq + Debug>(name: &str, series: Series, scenario: impl Fn(&Self) -> T) -> T {
        Self::compare(name, series, false, false, scenario)
    }

    /// The same while no other test runs.
    ///
    /// # Panics
    /// When the results differ.
    #[track_caller]
    pub fn like_runc_alone<T: PartialEq + Debug>(
        name: &str,
        series: Series,
        scenario: impl Fn(&Self) -> T,
    ) -> T {
        Self::compare(name, series, true, false, scenario)
    }

    /// The same with sandboxes that are the shim's own (Sandbox API), where the tested runtime has them.
    ///
    /// # Panics
    /// When the results differ.
    #[track_caller]
    pub fn like_runc_sandbox_api<T: PartialEq + Debug>(name: &str, scenario: impl Fn(&Self) -> T) -> T {
        Self::compare(name, Series::V2_1, false, true, scenario)
    }

    #[track_caller]
    fn compare<T: PartialEq + Debug>(
        name: &str,
        series: Series,
        alone: bool,
        sandbox_api: bool,
        scenario: impl Fn(&Self) -> T,
    ) -> T {
        let daemon = shared(series);
        let begin = |name: &str| {
            if alone {
                Case::begin_alone_on(name, Arc::clone(&daemon))
            } else {
                Case::begin_on(name, Arc::clone(&daemon))
            }
        };
        let subnets = Subnets::new(series as u8);
        let expected = scenario(&Self::on(begin(&format!("{name}-runc")), subnets, false, false));
        if !daemon.settings.is_vm_runtime() || !daemon.settings.linux_guests {
            return expected;
        }
        let result = scenario(&Self::on(begin(name), subnets, true, sandbox_api));
        let runtime = &daemon.settings.runtime;
        assert_eq!(result, expected, "{runtime} (left) is not like runc (right)");
        result
    }

    /// Pods of the tested runtime on a containerd of their own.
    ///
    /// # Panics
    /// When it does not start.
    #[track_caller]
    pub fn on_its_own(name: &str, settings: Settings, series: Series) -> Self {
        let (daemon, subnets) = start(settings, series, NEXT.fetch_add(1, Ordering::Relaxed));
        let vm = daemon.settings.is_vm_runtime() && daemon.settings.linux_guests;
        Self::on(Case::begin_on(name, Arc::new(daemon)), subnets, vm, false)
    }

    /// Pods on the same containerd, under runc or under the tested runtime.
    pub fn beside(&self, vm: bool) -> Self {
        let case = Case::begin_on(&format!("{}-{vm}", self.case.name()), self.case.shared());
        Self::on(case, self.subnets, vm, false)
    }

    fn on(case: Case, subnets: Subnets, vm: bool, sandbox_api: bool) -> Self {
        let client = CriClient::connect(case.daemon()).unwrap_or_else(|e| panic!("{e}"));
        Self {
            case,
            client,
            vm,
            sandbox_api,
            subnets,
            next: AtomicU32::new(0),
        }
    }

    /// The test.
    pub fn case(&self) -> &Case {
        &self.case
    }

    /// The CRI client.
    pub fn client(&self) -> &CriClient {
        &self.client
    }

    /// Whether these pods are virtual machines.
    pub fn vm(&self) -> bool {
        self.vm
    }

    /// The limit of one wait.
    pub fn limit(&self) -> Duration {
        self.case.limit()
    }

    /// Runs a program beyond the host's links, where the networks `macvlan`, `ipvlan` and `vlan` lead.
    #[track_caller]
    pub fn outside(&self, words: &[&str]) -> String {
        let namespace = outside(self.subnets.instance());
        host(&[&["ip", "netns", "exec", &namespace], words].concat())
            .expect_code(0)
            .out()
    }

    /// A pod on this network, being put together.
    pub fn pod(&self, network: &str) -> PodSpec<'_> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let name = format!("pod{number}");
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                uid: format!("{}-{}-{number}", self.case.name(), std::process::id()),
                name: format!("{}-{number}", self.case.name()),
                namespace: "e2e".to_owned(),
                attempt: 0,
            }),
            hostname: name,
            log_directory: self.case.folder("log").display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    // Kubelet's default: processes apart, network and IPC shared.
                    namespace_options: Some(NamespaceOption {
                        pid: NamespaceMode::Container.into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        PodSpec {
            pods: self,
            handler: handler(self.vm, network, self.sandbox_api),
            config,
        }
    }
}

/// A shared containerd; the first who asks starts it.
#[track_caller]
fn shared(series: Series) -> Arc<Containerd> {
    let number = series as u8;
    let slot = SHARED
        .get(usize::from(number))
        .unwrap_or_else(|| panic!("no place for {series:?}"));
    let daemon = slot.get_or_init(|| Arc::new(start(Settings::from_env(), series, number).0));
    Arc::clone(daemon)
}

/// A containerd with CRI that is ready for pods.
#[track_caller]
fn start(settings: Settings, series: Series, number: u8) -> (Containerd, Subnets) {
    private::require();
    let subnets = Subnets::new(number);
    // The newer ones differ from each other above the network.
    let networks = if series == Series::V1_7 {
        host(&["sh", "-ec", &subnets.plug(&outside(number))]).expect_code(0);
        subnets.all()
    } else {
        subnets.common()
    };
    let folder = match series {
        Series::V1_6 => settings.containerd.clone(),
        newer => Settings::newer_containerd(newer.number()),
    };
    let cri = Cri {
        series,
        networks,
        plugins: settings.cni.clone(),
    };
    let settings = Settings {
        containerd: folder,
        cri: Some(cri),
        ..settings
    };
    let daemon = Containerd::start(settings).unwrap_or_else(|e| panic!("{e}"));
    let client = CriClient::connect(&daemon).unwrap_or_else(|e| panic!("{e}"));
    let mut missing = String::new();
    // CRI hears of imported images by events.
    let ready = eventually(daemon.settings.call_limit, || {
        let images = [BUSYBOX, PAUSE].map(|name| client.image(name));
        let conditions = client.unready();
        missing = format!("images {images:?}, unready {conditions:?}");
        images.iter().all(|image| matches!(image, Ok(Some(_))))
            && conditions.is_ok_and(|list| list.is_empty())
    });
    let log = crate::diagnosis::tail_of(&daemon.log(), 0);
    assert!(
        ready,
        "containerd {} is not ready for pods: {missing}\n{log}",
        series.number()
    );
    (daemon, subnets)
}

/// The network namespace that is beyond the host's links, of the containerd with this number.
fn outside(number: u8) -> String {
    format!("outside{number}")
}

/// Labels of this map, for configurations in one expression.
pub fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    let owned = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
    pairs.iter().map(owned).collect()
}
