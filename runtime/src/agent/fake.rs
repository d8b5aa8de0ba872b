//! An agent for tests: a ttrpc server on one end of a socket pair. Its containers are scripts in `args`:
//! `echo WORDS…`, `exit STATUS`, `cat` (stdin to stdout), `sleep` (until signalled), `missing` (start fails),
//! `slow` (its creation waits for [`FakeGuest::let_slow_go`]).

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::StreamExt;
use protocols::agent as wire;
use protocols::agent_ttrpc::{AgentService, create_agent_service};
use protocols::empty::Empty;
use tokio::sync::{Semaphore, watch};
use ttrpc::r#async::TtrpcContext;

/// A permit for each `slow` creation that may end.
struct SlowCreations(Semaphore);

impl Default for SlowCreations {
    fn default() -> Self {
        Self(Semaphore::new(0))
    }
}

/// What the host sees of the guest.
#[derive(Default)]
pub(crate) struct FakeGuest {
    /// Calls in their order: name and argument.
    pub(crate) calls: Mutex<Vec<String>>,
    /// Last CreateContainer and CreateSandbox.
    pub(crate) created: Mutex<Option<wire::CreateContainerRequest>>,
    /// Storages of the sandbox.
    pub(crate) sandbox: Mutex<Option<wire::CreateSandboxRequest>>,
    /// Attached descriptors by host port.
    pub(crate) attached: Mutex<HashMap<u32, OwnedFd>>,
    pub(crate) attached_changed: Condvar,
    /// Containers whose cgroup counts a kill for memory.
    pub(crate) counted_kills: Mutex<HashSet<String>>,
    /// Its network as it was told.
    pub(crate) network: Mutex<FakeNetwork>,
    /// Containers that the guest will say were killed for memory.
    pub(crate) killed_for_memory: Mutex<VecDeque<String>>,
    /// When it said each of them.
    pub(crate) told_of_kills: Mutex<Vec<Instant>>,
    slow: SlowCreations,
    processes: Mutex<HashMap<(String, String), Arc<Process>>>,
}

/// What the host told about the network.
#[derive(Debug, Default, Clone)]
pub(crate) struct FakeNetwork {
    pub(crate) interfaces: Vec<protocols::types::Interface>,
    pub(crate) routes: Vec<protocols::types::Route>,
    pub(crate) neighbours: Vec<protocols::types::ARPNeighbor>,
}

struct Process {
    args: Vec<String>,
    ports: [u32; 2],
    exit: watch::Sender<Option<i32>>,
}

impl FakeGuest {
    fn called(&self, call: String) {
        self.calls.lock().unwrap().push(call);
    }

    /// Ends the creation of one `slow` container.
    pub(crate) fn let_slow_go(&self) {
        self.slow.0.add_permits(1);
    }

    /// Waits until `call` has come in.
    pub(crate) async fn wait_for_call(&self, call: &str) {
        let begin = Instant::now();
        while !self.calls.lock().unwrap().iter().any(|seen| seen == call) {
            assert!(begin.elapsed() < Duration::from_secs(120), "no {call}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Ends a descriptor, as the muxer does.
    pub(crate) fn detach(&self, port: u32) {
        self.attached.lock().unwrap().remove(&port);
        self.attached_changed.notify_all();
    }

    fn add(
        &self,
        container: &str,
        exec: &str,
        process: &protocols::oci::Process,
        ports: [u32; 2],
    ) -> Arc<Process> {
        let process = Arc::new(Process {
            args: process.Args.clone(),
            ports,
            exit: watch::Sender::new(None),
        });
        self.processes
            .lock()
            .unwrap()
            .insert((container.to_owned(), exec.to_owned()), process.clone());
        process
    }

    fn process(&self, container: &str, exec: &str) -> ttrpc::Result<Arc<Process>> {
        let key = (container.to_owned(), exec.to_owned());
        self.processes
            .lock()
            .unwrap()
            .get(&key)
            .cloned()
            .ok_or_else(|| status(ttrpc::Code::NOT_FOUND, "no such process"))
    }

    fn run(self: &Arc<Self>, process: Arc<Process>) {
        let (guest, [stdin, stdout]) = (self.clone(), process.ports);
        let take = move |port: u32| {
            guest
                .attached
                .lock()
                .unwrap()
                .get(&port)
                .map(|fd| fd.try_clone().unwrap())
        };
        let guest = self.clone();
        std::thread::spawn(move || {
            let mut output = take(stdout).map(File::from);
            let args: Vec<&str> = process.args.iter().map(String::as_str).collect();
            let status = match args.as_slice() {
                ["echo", words @ ..] => {
                    if let Some(output) = &mut output {
                        output
                            .write_all(format!("{}\n", words.join(" ")).as_bytes())
                            .unwrap();
                    }
                    0
                }
                ["exit", status] => status.parse().unwrap(),
                ["cat"] => {
                    copy(File::from(take(stdin).unwrap()), output.as_mut().unwrap());
                    0
                }
                // Ended by a signal.
                _ => return,
            };
            drop(output);
            guest.detach(stdout);
            process
                .exit
                .send_if_modified(|exit| exit.replace(status).is_none());
        });
    }
}

/// Reads a non-blocking FIFO to its end.
fn copy(mut from: File, to: &mut File) {
    let mut buffer = [0; 4096];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => to.write_all(&buffer[..count]).unwrap(),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

fn status(code: ttrpc::Code, message: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, message.to_owned()))
}

/// Serves `stream` until it is closed.
pub(crate) fn serve(guest: Arc<FakeGuest>, stream: std::os::unix::net::UnixStream) {
    stream.set_nonblocking(true).unwrap();
    let stream = tokio::net::UnixStream::from_std(stream).unwrap();
    let listener = futures::stream::iter([Ok(stream)]).chain(futures::stream::pending());
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(ttrpc::r#async::transport::Listener::new(listener))
        .register_service(create_agent_service(Arc::new(Service(guest))));
    tokio::spawn(async move {
        server.start().await.unwrap();
        // Dropping the server would end its connection.
        std::future::pending::<()>().await;
    });
}

struct Service(Arc<FakeGuest>);

type Reply<T> = ttrpc::Result<T>;

#[async_trait]
impl AgentService for Service {
    async fn create_sandbox(&self, _: &TtrpcContext, request: wire::CreateSandboxRequest) -> Reply<Empty> {
        self.0.called("CreateSandbox".into());
        *self.0.sandbox.lock().unwrap() = Some(request);
        Ok(Empty::new())
    }

    async fn destroy_sandbox(&self, _: &TtrpcContext, _: wire::DestroySandboxRequest) -> Reply<Empty> {
        self.0.called("DestroySandbox".into());
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: wire::CreateContainerRequest,
    ) -> Reply<Empty> {
        self.0.called(format!("CreateContainer {}", request.container_id));
        let process = &request.OCI.Process;
        if process.Args == ["refused"] {
            return Err(status(ttrpc::Code::INVALID_ARGUMENT, "refused by the test"));
        }
        if process.Args == ["slow"] {
            self.0.slow.0.acquire().await.unwrap().forget();
        }
        self.0.add(
            &request.container_id,
            "",
            process,
            [request.stdin_port, request.stdout_port],
        );
        *self.0.created.lock().unwrap() = Some(request);
        Ok(Empty::new())
    }

    async fn start_container(&self, _: &TtrpcContext, request: wire::StartContainerRequest) -> Reply<Empty> {
        self.0.called(format!("StartContainer {}", request.container_id));
        let process = self.0.process(&request.container_id, "")?;
        if process.args == ["missing"] {
            return Err(status(ttrpc::Code::NOT_FOUND, "missing: command not found"));
        }
        self.0.run(process);
        Ok(Empty::new())
    }

    async fn exec_process(&self, _: &TtrpcContext, request: wire::ExecProcessRequest) -> Reply<Empty> {
        let size = request.process.ConsoleSize.clone().unwrap_or_default();
        self.0.called(format!(
            "ExecProcess {} {}x{}",
            request.exec_id, size.Width, size.Height
        ));
        if request.process.Args == ["missing"] {
            return Err(status(ttrpc::Code::NOT_FOUND, "missing: command not found"));
        }
        let ports = [request.stdin_port, request.stdout_port];
        let process = self
            .0
            .add(&request.container_id, &request.exec_id, &request.process, ports);
        self.0.run(process);
        Ok(Empty::new())
    }

    async fn signal_process(&self, _: &TtrpcContext, request: wire::SignalProcessRequest) -> Reply<Empty> {
        self.0
            .called(format!("SignalProcess {:?} {}", request.exec_id, request.signal));
        let process = self.0.process(&request.container_id, &request.exec_id)?;
        let end = |process: &Process| {
            self.0.detach(process.ports[1]);
            process.exit.send_if_modified(|exit| {
                let runs = exit.is_none();
                exit.get_or_insert(128 + request.signal as i32);
                runs
            });
        };
        // With init goes the pid namespace.
        if request.exec_id.is_empty() {
            let processes = self.0.processes.lock().unwrap().clone();
            let of_container = |key: &(String, String)| key.0 == request.container_id;
            let inside = processes.iter().filter(|(key, _)| of_container(key));
            inside.for_each(|(_, process)| end(process));
        }
        end(&process);
        Ok(Empty::new())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: wire::WaitProcessRequest,
    ) -> Reply<wire::WaitProcessResponse> {
        let process = self.0.process(&request.container_id, &request.exec_id)?;
        let mut exit = process.exit.subscribe();
        let status = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        Ok(wire::WaitProcessResponse {
            status,
            ..Default::default()
        })
    }

    async fn remove_container(
        &self,
        _: &TtrpcContext,
        request: wire::RemoveContainerRequest,
    ) -> Reply<Empty> {
        self.0.called(format!("RemoveContainer {}", request.container_id));
        Ok(Empty::new())
    }

    async fn tty_win_resize(&self, _: &TtrpcContext, request: wire::TtyWinResizeRequest) -> Reply<Empty> {
        self.0
            .called(format!("TtyWinResize {}x{}", request.column, request.row));
        Ok(Empty::new())
    }

    async fn update_interface(
        &self,
        _: &TtrpcContext,
        request: wire::UpdateInterfaceRequest,
    ) -> Reply<protocols::types::Interface> {
        let interface = request.interface.clone().unwrap_or_default();
        self.0.called(format!("UpdateInterface {}", interface.name));
        let mut network = self.0.network.lock().unwrap();
        network
            .interfaces
            .retain(|known| known.hwAddr != interface.hwAddr);
        network.interfaces.push(interface.clone());
        Ok(interface)
    }

    async fn update_routes(
        &self,
        _: &TtrpcContext,
        request: wire::UpdateRoutesRequest,
    ) -> Reply<wire::Routes> {
        self.0.called("UpdateRoutes".into());
        let routes = request.routes.unwrap_or_default();
        self.0.network.lock().unwrap().routes.clone_from(&routes.Routes);
        Ok(routes)
    }

    async fn add_arp_neighbors(
        &self,
        _: &TtrpcContext,
        request: wire::AddARPNeighborsRequest,
    ) -> Reply<Empty> {
        self.0.called("AddARPNeighbors".into());
        let neighbours = request.neighbors.unwrap_or_default().ARPNeighbors;
        self.0.network.lock().unwrap().neighbours = neighbours;
        Ok(Empty::new())
    }

    async fn remove_interface(
        &self,
        _: &TtrpcContext,
        request: wire::RemoveInterfaceRequest,
    ) -> Reply<Empty> {
        self.0.called(format!("RemoveInterface {}", request.hwAddr));
        let mut network = self.0.network.lock().unwrap();
        network
            .interfaces
            .retain(|interface| interface.hwAddr != request.hwAddr);
        Ok(Empty::new())
    }

    async fn get_oom_event(&self, _: &TtrpcContext, _: wire::GetOOMEventRequest) -> Reply<wire::OOMEvent> {
        loop {
            let next = self.0.killed_for_memory.lock().unwrap().pop_front();
            if let Some(container_id) = next {
                self.0.told_of_kills.lock().unwrap().push(Instant::now());
                return Ok(wire::OOMEvent {
                    container_id,
                    ..Default::default()
                });
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn stats_container(
        &self,
        _: &TtrpcContext,
        request: wire::StatsContainerRequest,
    ) -> Reply<wire::StatsContainerResponse> {
        let mut response = wire::StatsContainerResponse::new();
        let cgroup = response.cgroup_stats.mut_or_insert_default();
        let counted = self
            .0
            .counted_kills
            .lock()
            .unwrap()
            .contains(&request.container_id);
        cgroup.memory_events.mut_or_insert_default().oom_kill = u64::from(counted);
        cgroup.pids_stats.mut_or_insert_default().current = 2;
        Ok(response)
    }

    async fn pause_container(&self, _: &TtrpcContext, _: wire::PauseContainerRequest) -> Reply<Empty> {
        Ok(Empty::new())
    }

    async fn resume_container(&self, _: &TtrpcContext, _: wire::ResumeContainerRequest) -> Reply<Empty> {
        Ok(Empty::new())
    }
}
