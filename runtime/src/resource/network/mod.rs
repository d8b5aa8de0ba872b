//! The network of a pod: the links of its namespace become interfaces of its guest.
//!
//! What a guest has is always derived from what the namespace has *now*: [`scan`] looks, [`endpoint`] chooses, a
//! [`model`] connects, [`guest`] puts addresses and routes into words. Before the VM boots that makes the devices it is
//! built with; afterwards, each time it is asked, the differences since then. So interfaces may come at any time: CNI
//! makes them before a pod is created, docker and nerdctl between its creation and its start.
//!
//! [`localhost`] is the way into the guest that a CRI takes.
//!
//! The namespace is only ever entered by threads made for that, and everything made in it is in the journal first.

mod endpoint;
mod error;
mod guest;
mod limits;
pub mod localhost;
mod model;
mod scan;
mod sysctl;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use protocols::agent as wire;
use tokio::sync::{Mutex, MutexGuard};

use super::device_manager::DeviceManager;
use crate::agent::Agent;
use crate::config::InternetworkingModel;
use crate::error::{Error, ErrorKind, Result};
use crate::host::blocking;
use crate::host::journal::{Journal, Undo};
use crate::host::netns::{Changes, Netns};
use crate::hypervisor::{DeviceType, NetworkDevice, NetworkLimits, TapQueues};
use endpoint::Endpoint;
use guest::Guest;
use scan::{Link, Scan};

pub use error::NetworkError;
pub use limits::limits;

/// The network of a pod.
#[async_trait]
pub trait Network: Send + Sync {
    /// Gives a VM that is not built yet its interfaces.
    ///
    /// # Errors
    /// Naming the interface that cannot be attached; the journal undoes what was made.
    async fn setup(&self, devices: &DeviceManager) -> Result<()>;
    /// Makes the guest's network what the namespace's is now.
    ///
    /// # Errors
    /// Naming the interface that cannot be attached, or what the agent refused; nothing is left of an interface that is
    /// not attached, and the next call tries again.
    async fn rescan(&self, devices: &DeviceManager, agent: &dyn Agent) -> Result<()>;
    /// Puts the bandwidth that a pod's `annotations` ask for on every interface of a running guest, those to come included.
    ///
    /// # Errors
    /// `InvalidArgument` naming the annotation; otherwise naming the interface.
    async fn limit(&self, devices: &DeviceManager, annotations: &HashMap<String, String>) -> Result<()>;
    /// Waits for what is under way and lets nothing follow: the namespace is to be left as it was found.
    async fn close(&self);
    /// Tells when the namespace has changed; `None` when there is none, or it has gone.
    async fn changes(&self) -> Option<Changes>;
    /// The interfaces of the guest, for people: name, device and TAP of each.
    async fn interfaces(&self) -> Vec<String>;
}

/// How the network of a pod is made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkSettings {
    /// What connects a link with the guest.
    pub model: InternetworkingModel,
    /// Queue pairs of each interface, 1 or more.
    pub queues: usize,
    /// Bandwidth of each interface.
    pub limits: NetworkLimits,
    /// What it can be raised to.
    pub ceiling: NetworkLimits,
}

/// The network of a pod with a namespace on the host; without one the guest has its loopback and nothing else.
pub struct PodNetwork {
    netns: Option<PathBuf>,
    model: InternetworkingModel,
    queues: usize,
    ceiling: NetworkLimits,
    journal: Arc<Journal>,
    /// Held by whoever changes something, to the end of it: by nobody who only asks.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    netns: Option<Netns>,
    limits: NetworkLimits,
    endpoints: Vec<Endpoint>,
    /// TAPs so far: no name is used twice, for the journal knows them by name.
    taps: usize,
    /// What the guest knows.
    told: Guest,
    /// What it cannot have, and the log has been told.
    warned: Vec<String>,
    closed: bool,
}

impl PodNetwork {
    /// For a pod whose spec names `netns`.
    pub fn new(netns: Option<PathBuf>, settings: NetworkSettings, journal: Arc<Journal>) -> Self {
        let state = State {
            limits: settings.limits,
            ..State::default()
        };
        Self {
            netns,
            model: settings.model,
            queues: settings.queues.max(1),
            ceiling: settings.ceiling,
            journal,
            state: Mutex::new(state),
        }
    }

    /// The state, with the namespace; `None` when there is nothing to do.
    async fn open(&self) -> Result<Option<(MutexGuard<'_, State>, Netns)>> {
        let Some(path) = &self.netns else {
            return Ok(None);
        };
        let mut state = self.state.lock().await;
        if state.closed {
            return Ok(None);
        }
        let netns = match &state.netns {
            Some(netns) => netns.clone(),
            None => state.netns.insert(open(path).await?).clone(),
        };
        Ok(Some((state, netns)))
    }

    /// Connects `link` and gives the VM a device for it.
    async fn attach(
        &self,
        state: &mut State,
        netns: &Netns,
        scan: &Scan,
        devices: &DeviceManager,
        link: Link,
    ) -> Result<()> {
        let tap = state.free_name(scan);
        let (queues, undo) = self.connect(netns, link.clone(), tap.clone()).await?;
        let device = NetworkDevice {
            id: String::new(),
            tap,
            queues: TapQueues::new(queues),
            mac: link.mac.unwrap_or_default(),
            limits: state.limits,
        };
        let attached = devices.attach(DeviceType::Network(device.clone())).await;
        let error = match attached {
            Ok(DeviceType::Network(device)) => {
                tracing::info!(
                    link = link.name,
                    device = device.id,
                    tap = device.tap,
                    "interface attached"
                );
                state.endpoints.push(Endpoint { link, device, undo });
                return Ok(());
            }
            Ok(other) => Error::new(ErrorKind::Internal, format!("it became device {}", other.id())),
            Err(error) => error,
        };
        drop(device);
        self.undo(undo).await;
        Err(error.context(format!("network: interface {}", link.name)))
    }

    async fn connect(
        &self,
        netns: &Netns,
        link: Link,
        tap: String,
    ) -> Result<(Vec<std::os::fd::OwnedFd>, Vec<Undo>)> {
        let (netns, journal) = (netns.clone(), self.journal.clone());
        let (model, queues) = (self.model, self.queues);
        blocking("network interface", move || {
            let mut work = model::Work {
                netns: &netns,
                journal: &journal,
                link: &link,
                tap: &tap,
                queues,
                undo: Vec::new(),
            };
            let connected = netns.netlink(async |handle| model::connect(model, &handle, &mut work).await);
            let undo = work.undo;
            connected.map(|queues| (queues, undo.clone())).map_err(|error| {
                run_all(&journal, &undo);
                error.into()
            })
        })
        .await
    }

    /// Undoes what was made for an interface.
    async fn undo(&self, undo: Vec<Undo>) {
        let journal = self.journal.clone();
        let undone = blocking("network interface", move || {
            run_all(&journal, &undo);
            Ok(())
        });
        if let Err(error) = undone.await {
            tracing::warn!(%error, "undoing a network interface");
        }
    }

    /// Takes interfaces from the guest whose links are not among `links` any more. What fails is tried again next time.
    async fn detach_gone(
        &self,
        state: &mut State,
        links: &[Link],
        devices: &DeviceManager,
        agent: &dyn Agent,
    ) {
        let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut state.endpoints)
            .into_iter()
            .partition(|endpoint| links.iter().any(|link| is_same(link, &endpoint.link)));
        state.endpoints = kept;
        for endpoint in gone {
            let name = endpoint.link.name.clone();
            match detach(&endpoint, devices, agent).await {
                Ok(()) => {
                    self.undo(endpoint.undo).await;
                    state.told.interfaces.retain(|interface| interface.name != name);
                    tracing::info!(link = name, device = endpoint.device.id, "interface detached");
                }
                Err(error) => {
                    tracing::warn!(link = name, %error, "the interface has gone and cannot be taken from the guest");
                    state.endpoints.push(endpoint);
                }
            }
        }
    }
}

impl State {
    /// A name that no link has, and none had that was made here.
    fn free_name(&mut self, scan: &Scan) -> String {
        loop {
            let name = format!("tap{}_kata", self.taps);
            self.taps += 1;
            if !scan.taken.contains(&name) {
                return name;
            }
        }
    }

    fn has(&self, link: &Link) -> bool {
        self.endpoints
            .iter()
            .any(|endpoint| is_same(&endpoint.link, link))
    }

    /// Tells the guest what is different from what it knows.
    async fn tell(&mut self, agent: &dyn Agent, guest: Guest) -> Result<()> {
        let mut changed = false;
        for interface in guest.interfaces {
            let known = self
                .told
                .interfaces
                .iter()
                .position(|known| known.hwAddr == interface.hwAddr);
            if known.is_some_and(|at| self.told.interfaces.get(at) == Some(&interface)) {
                continue;
            }
            let request = wire::UpdateInterfaceRequest {
                interface: protobuf::MessageField::some(interface.clone()),
                ..Default::default()
            };
            let name = interface.name.clone();
            let updated = agent.update_interface(request).await;
            updated.map_err(|error| error.context(format!("network: interface {name} in the guest")))?;
            if let Some(at) = known {
                self.told.interfaces.remove(at);
            }
            self.told.interfaces.push(interface);
            changed = true;
        }
        // Routes go with the addresses they need.
        if changed || guest.routes != self.told.routes {
            self.told.routes.clear();
            let request = wire::UpdateRoutesRequest {
                routes: protobuf::MessageField::some(wire::Routes {
                    Routes: guest.routes.clone(),
                    ..Default::default()
                }),
                ..Default::default()
            };
            let updated = agent.update_routes(request).await;
            updated.map_err(|error| error.context("network: routes in the guest"))?;
            self.told.routes = guest.routes;
        }
        if guest.neighbours != self.told.neighbours || (changed && !guest.neighbours.is_empty()) {
            let request = wire::AddARPNeighborsRequest {
                neighbors: protobuf::MessageField::some(wire::ARPNeighbors {
                    ARPNeighbors: guest.neighbours.clone(),
                    ..Default::default()
                }),
                ..Default::default()
            };
            let added = agent.add_arp_neighbors(request).await;
            added.map_err(|error| error.context("network: neighbours in the guest"))?;
            self.told.neighbours = guest.neighbours;
        }
        Ok(())
    }

    /// Says once what the guest cannot have.
    fn warn(&mut self, warnings: Vec<String>) {
        for warning in &warnings {
            if !self.warned.contains(warning) {
                tracing::warn!("network: {warning}");
            }
        }
        self.warned = warnings;
    }
}

#[async_trait]
impl Network for PodNetwork {
    async fn setup(&self, devices: &DeviceManager) -> Result<()> {
        let Some((mut state, netns)) = self.open().await? else {
            return Ok(());
        };
        let scan = look(&netns).await??;
        for link in endpoint::select(&scan)? {
            self.attach(&mut state, &netns, &scan, devices, link).await?;
        }
        Ok(())
    }

    async fn rescan(&self, devices: &DeviceManager, agent: &dyn Agent) -> Result<()> {
        let Some((mut state, netns)) = self.open().await? else {
            return Ok(());
        };
        let scan = match look(&netns).await? {
            Ok(scan) => scan,
            // Its owner has taken it down: the pod ends, or has none any more.
            Err(NetworkError::Netns(error)) if error.is_gone() => {
                tracing::debug!(%error, "the pod's network has gone");
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let links = endpoint::select(&scan)?;
        self.detach_gone(&mut state, &links, devices, agent).await;
        for link in &links {
            let known = state
                .endpoints
                .iter_mut()
                .find(|endpoint| is_same(&endpoint.link, link));
            if let Some(endpoint) = known {
                if endpoint.link.mtu != link.mtu {
                    resize(&netns, &endpoint.device.tap, link.mtu).await?;
                }
                endpoint.link = link.clone();
            }
        }
        for link in links {
            if !state.has(&link) {
                self.attach(&mut state, &netns, &scan, devices, link).await?;
            }
        }
        let attached: Vec<_> = state.endpoints.iter().map(|endpoint| &endpoint.link).collect();
        let (guest, warnings) = guest::describe(&scan, &attached);
        state.warn(warnings);
        state.tell(agent, guest).await
    }

    async fn limit(&self, devices: &DeviceManager, annotations: &HashMap<String, String>) -> Result<()> {
        let mut state = self.state.lock().await;
        let limits = limits(state.limits, self.ceiling, annotations)?;
        if limits == state.limits {
            return Ok(());
        }
        state.limits = limits;
        for endpoint in &mut state.endpoints {
            let device = NetworkDevice {
                limits,
                ..endpoint.device.clone()
            };
            devices
                .limit(device.clone())
                .await
                .map_err(|error| error.context(format!("network: interface {}", endpoint.link.name)))?;
            endpoint.device = device;
        }
        Ok(())
    }

    async fn close(&self) {
        self.state.lock().await.closed = true;
    }

    async fn changes(&self) -> Option<Changes> {
        let (state, netns) = self.open().await.ok()??;
        drop(state);
        let changes = blocking("network namespace", move || Ok(netns.changes()?));
        match changes.await {
            Ok(changes) => Some(changes),
            Err(error) => {
                tracing::warn!(%error, "interfaces that come later are attached when a container is started");
                None
            }
        }
    }

    async fn interfaces(&self) -> Vec<String> {
        let state = self.state.lock().await;
        let line = |endpoint: &Endpoint| {
            let device = &endpoint.device;
            format!("{}: {} over {}", endpoint.link.name, device.id, device.tap)
        };
        state.endpoints.iter().map(line).collect()
    }
}

/// Whether two looks saw the same link: a guest's interface cannot become another one's.
fn is_same(one: &Link, other: &Link) -> bool {
    (one.index, &one.name, one.mac) == (other.index, &other.name, other.mac)
}

async fn open(path: &Path) -> Result<Netns> {
    let path = path.to_owned();
    blocking("network namespace", move || {
        let netns = Netns::open(&path).map_err(NetworkError::from)?;
        if netns.is_hosts() {
            return Err(NetworkError::HostNetwork(path.display().to_string()).into());
        }
        Ok(netns)
    })
    .await
}

async fn look(netns: &Netns) -> Result<std::result::Result<Scan, NetworkError>> {
    let netns = netns.clone();
    let look = move || Ok(netns.netlink(async |handle| scan::scan(&handle).await));
    blocking("network namespace", look).await
}

async fn resize(netns: &Netns, tap: &str, mtu: u32) -> Result<()> {
    let (netns, tap) = (netns.clone(), tap.to_owned());
    blocking("network interface", move || {
        use crate::host::link;
        let resized = netns.netlink(async |handle| {
            let index = link::index(&handle, &tap).await?;
            link::set_up(&handle, &tap, index, mtu).await
        });
        resized.map_err(|error| NetworkError::link(&tap, error).into())
    })
    .await
}

async fn detach(endpoint: &Endpoint, devices: &DeviceManager, agent: &dyn Agent) -> Result<()> {
    let request = wire::RemoveInterfaceRequest {
        hwAddr: endpoint::hardware_address(&endpoint.device.mac),
        ..Default::default()
    };
    agent.remove_interface(request).await?;
    devices.detach(&endpoint.device.id).await
}

/// What cannot be undone now is tried again at the end of the sandbox: it stays in the journal.
fn run_all(journal: &Journal, undo: &[Undo]) {
    for undo in undo.iter().rev() {
        match undo.run() {
            Ok(()) => journal.strike(undo),
            Err(error) => tracing::warn!(error, "undoing a network interface"),
        }
    }
}
