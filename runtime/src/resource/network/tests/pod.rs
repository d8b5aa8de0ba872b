//! The network of a pod from its creation to its end.

use std::sync::Arc;

use super::*;
use crate::agent::{AgentManager, KataAgent};
use crate::config::AgentConfig;
use crate::error::ErrorKind;
use crate::host::journal::Journal;
use crate::hypervisor::fake::{Boot, FakeHypervisor};
use crate::hypervisor::{DeviceType, Hypervisor, NetworkDevice, NetworkLimits};
use crate::resource::device_manager::DeviceManager;
use crate::resource::network::{Network, NetworkSettings, PodNetwork};

struct Pod {
    vm: Arc<FakeHypervisor>,
    devices: DeviceManager,
    agent: KataAgent,
    journal: Arc<Journal>,
    network: PodNetwork,
    folder: tempfile::TempDir,
}

impl Pod {
    async fn new(netns: Option<&std::path::Path>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let journal = Arc::new(Journal::open(&folder.path().join("journal")).unwrap());
        let vm = Arc::new(FakeHypervisor::new(Boot::Announced));
        let agent = KataAgent::new(AgentConfig::default(), "");
        let stream = vm.vsock_connect(1024, Duration::from_secs(60)).await;
        agent.start(stream.unwrap()).await.unwrap();
        let network = PodNetwork::new(netns.map(Into::into), NetworkSettings::default(), journal.clone());
        Self {
            devices: DeviceManager::new(vm.clone()),
            vm,
            agent,
            journal,
            network,
            folder,
        }
    }

    async fn setup(&self) -> crate::error::Result<()> {
        self.network.setup(&self.devices).await
    }

    async fn rescan(&self) -> crate::error::Result<()> {
        self.network.rescan(&self.devices, &self.agent).await
    }

    fn interfaces(&self) -> Vec<NetworkDevice> {
        let devices = self.vm.devices.lock().unwrap();
        let interfaces = devices.iter().filter_map(|device| match device {
            DeviceType::Network(interface) => Some(interface.clone()),
            _ => None,
        });
        interfaces.collect()
    }

    fn guest_interfaces(&self) -> Vec<String> {
        let network = self.vm.guest.network.lock().unwrap();
        network
            .interfaces
            .iter()
            .map(|interface| interface.name.clone())
            .collect()
    }

    /// What the guest was asked since the last time.
    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.vm.guest.calls.lock().unwrap())
    }

    /// What would be undone after a crash.
    fn noted(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("journal")).unwrap()
    }

    /// The VM and then the sandbox end.
    async fn end(&self) {
        self.network.close().await;
        self.vm.devices.lock().unwrap().clear();
        self.journal.replay().unwrap();
    }
}

#[tokio::test]
async fn pod_when_it_lives_has_its_network_and_leaves_none_behind() {
    let world = World::with_eth0();
    let before = world.dump();
    let pod = Pod::new(Some(world.pod().path())).await;

    pod.setup().await.unwrap();

    let interfaces = pod.interfaces();
    assert_eq!(interfaces.len(), 1);
    assert_eq!(Some(interfaces[0].mac), world.link("eth0").mac);
    assert_eq!(
        (interfaces[0].id.as_str(), interfaces[0].tap.as_str()),
        ("net0", "tap0_kata")
    );
    assert_eq!(pod.calls(), Vec::<String>::new(), "there is no guest yet");

    pod.rescan().await.unwrap();

    assert_eq!(pod.calls(), ["UpdateInterface eth0", "UpdateRoutes"]);
    assert_eq!(pod.vm.guest.network.lock().unwrap().routes.len(), 2);
    assert_eq!(pod.network.interfaces().await, ["eth0: net0 over tap0_kata"]);

    pod.rescan().await.unwrap();
    assert_eq!(pod.calls(), Vec::<String>::new(), "nothing has changed");

    pod.end().await;
    assert_eq!(world.dump(), before);
    pod.rescan().await.unwrap();
    assert_eq!(world.dump(), before, "nothing is made after the end");
}

#[tokio::test]
async fn interfaces_when_they_come_change_and_go_do_so_in_the_guest() {
    let world = World::with_eth0();
    let before = world.dump();
    let pod = Pod::new(Some(world.pod().path())).await;
    pod.setup().await.unwrap();
    pod.rescan().await.unwrap();
    pod.calls();

    world.veth("net1");
    ip(world.pod(), "addr add 10.2.0.2/24 dev net1");
    pod.rescan().await.unwrap();

    assert_eq!(pod.calls(), ["UpdateInterface net1", "UpdateRoutes"]);
    assert_eq!(pod.interfaces().len(), 2);

    ip(world.pod(), "addr add 10.2.0.3/24 dev net1");
    ip(world.pod(), "link set net1 mtu 1400");
    pod.rescan().await.unwrap();

    assert_eq!(pod.calls(), ["UpdateInterface net1", "UpdateRoutes"]);
    let net1 = pod.vm.guest.network.lock().unwrap().interfaces[1].clone();
    assert_eq!(net1.mtu, 1400);
    assert!(
        net1.IPAddresses
            .iter()
            .any(|address| address.address == "10.2.0.3")
    );
    assert!(ip(world.pod(), "link show tap1_kata").contains("mtu 1400"));

    ip(world.pod(), "route add 10.77.0.0/16 via 10.1.0.1");
    pod.rescan().await.unwrap();
    assert_eq!(pod.calls(), ["UpdateRoutes"]);

    let mac = endpoint::hardware_address(&world.link("net1").mac.unwrap());
    ip(world.pod(), "link delete net1");
    pod.rescan().await.unwrap();

    assert_eq!(pod.calls(), [format!("RemoveInterface {mac}")]);
    assert_eq!(
        (pod.interfaces().len(), pod.guest_interfaces()),
        (1, vec!["eth0".to_owned()])
    );
    assert_eq!(world.scan().taken, ["tap0_kata"]);

    ip(world.pod(), "route del 10.77.0.0/16");
    pod.end().await;
    assert_eq!(world.dump(), before);
}

#[tokio::test]
async fn journal_when_interfaces_come_and_go_names_those_that_are_there() {
    let world = World::with_eth0();
    let pod = Pod::new(Some(world.pod().path())).await;
    pod.setup().await.unwrap();
    pod.rescan().await.unwrap();
    let before = pod.noted();
    assert!(before.contains("tap0_kata"), "{before}");

    for tap in 1..4 {
        world.veth("net1");
        ip(world.pod(), "addr add 10.2.0.2/24 dev net1");
        pod.rescan().await.unwrap();
        let noted = pod.noted();
        assert!(noted.contains(&format!("tap{tap}_kata")), "{noted}");
        ip(world.pod(), "link delete net1");
        pod.rescan().await.unwrap();
        assert_eq!(pod.noted(), before);
    }

    pod.end().await;
}

#[tokio::test]
async fn interface_when_the_vm_cannot_take_it_leaves_nothing_and_is_tried_again() {
    let world = World::with_eth0();
    let before = world.dump();
    let pod = Pod::new(Some(world.pod().path())).await;

    pod.vm.refuse_devices(true);
    let error = pod.rescan().await.unwrap_err();

    assert_eq!(error.kind, ErrorKind::ResourceExhausted);
    assert!(error.message.contains("interface eth0"), "{}", error.message);
    assert_eq!(world.dump(), before);

    pod.vm.refuse_devices(false);
    pod.rescan().await.unwrap();
    assert_eq!(pod.guest_interfaces(), ["eth0"]);
    pod.end().await;
    assert_eq!(world.dump(), before);
}

#[tokio::test]
async fn pod_without_a_namespace_when_it_lives_has_no_network() {
    let pod = Pod::new(None).await;

    pod.setup().await.unwrap();
    pod.rescan().await.unwrap();

    assert_eq!((pod.interfaces(), pod.calls()), (Vec::new(), Vec::new()));
}

#[tokio::test]
async fn pod_when_its_namespace_is_none_or_the_hosts_is_refused_by_path() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing");
    let own = std::path::Path::new("/proc/thread-self/ns/net");
    for (path, kind, said) in [
        (missing.as_path(), ErrorKind::NotFound, "missing: no such file"),
        (
            folder.path(),
            ErrorKind::InvalidArgument,
            "this is no network namespace",
        ),
        (
            own,
            ErrorKind::Unimplemented,
            "the pod asks for the host's network",
        ),
    ] {
        let error = Pod::new(Some(path)).await.setup().await.unwrap_err();
        assert_eq!(error.kind, kind, "{error}");
        assert!(error.message.contains(said), "{error}");
    }
}

#[tokio::test]
async fn limits_when_changed_hold_for_every_interface_and_those_to_come() {
    let world = World::with_eth0();
    let pod = Pod::new(Some(world.pod().path())).await;
    pod.setup().await.unwrap();
    let asked = [("ingress", "1M"), ("egress", "2M")]
        .map(|(way, bits)| (format!("kubernetes.io/{way}-bandwidth"), bits.to_owned()));

    pod.network.limit(&pod.devices, &asked.into()).await.unwrap();
    world.veth("net1");
    pod.rescan().await.unwrap();

    let in_force: Vec<_> = pod
        .interfaces()
        .iter()
        .map(|interface| interface.limits)
        .collect();
    let limits = NetworkLimits {
        rx: 1_000_000,
        tx: 2_000_000,
    };
    assert_eq!(in_force, [limits, limits]);
    pod.end().await;
}
