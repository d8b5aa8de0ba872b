//! A VM for tests: nothing runs, the guest is a [`FakeGuest`] in this process.

use std::collections::HashMap;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::{mpsc, watch};

use super::{
    Attach, AttachDirection, Capabilities, DeviceType, GuestListener, Hypervisor, VcpuThreadIds, VmExit,
};
use crate::agent::fake::{FakeGuest, serve};
use crate::config::HypervisorConfig;
use crate::error::{Error, ErrorKind, Result};

/// What the boot of a [`FakeHypervisor`] comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Boot {
    /// The agent announces itself.
    Announced,
    /// The agent only listens, as a stock one does.
    Silent,
    /// The guest panics.
    Panics,
    /// The guest hangs.
    Hangs,
    /// The VM cannot be built.
    Refused,
}

/// A VM without a machine.
pub(crate) struct FakeHypervisor {
    boot: Boot,
    pub(crate) guest: Arc<FakeGuest>,
    pub(crate) devices: Mutex<Vec<DeviceType>>,
    exit: watch::Sender<Option<VmExit>>,
    next_port: AtomicU32,
    refuses_devices: AtomicBool,
    /// Guest ports that a test serves.
    ports: Mutex<HashMap<u32, mpsc::UnboundedSender<UnixStream>>>,
}

impl FakeHypervisor {
    pub(crate) fn new(boot: Boot) -> Self {
        Self {
            boot,
            guest: Arc::default(),
            devices: Mutex::default(),
            exit: watch::Sender::new(None),
            next_port: AtomicU32::new(1 << 30),
            refuses_devices: AtomicBool::new(false),
            ports: Mutex::default(),
        }
    }

    /// The guest ends of what is connected to guest `port` from now on.
    pub(crate) fn serve_port(&self, port: u32) -> mpsc::UnboundedReceiver<UnixStream> {
        let (sender, connections) = mpsc::unbounded_channel();
        self.ports.lock().unwrap().insert(port, sender);
        connections
    }

    /// From now on, devices can neither be added nor removed; or they can again.
    pub(crate) fn refuse_devices(&self, refuse: bool) {
        self.refuses_devices.store(refuse, Ordering::Relaxed);
    }

    /// What happens before a device comes or goes: others get their turn, as while a real guest answers.
    async fn change_devices(&self) -> Result<()> {
        tokio::task::yield_now().await;
        if self.refuses_devices.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::ResourceExhausted, "no slot is free"));
        }
        Ok(())
    }

    /// Ends the VM.
    pub(crate) fn end(&self, exit: VmExit) {
        self.exit.send_if_modified(|current| {
            let running = current.is_none();
            current.get_or_insert(exit);
            running
        });
        self.guest.attached.lock().unwrap().clear();
        self.guest.attached_changed.notify_all();
    }
}

struct FakeListener(Option<UnixStream>);

impl GuestListener for FakeListener {
    fn accept(&mut self, timeout: Duration) -> Result<UnixStream> {
        self.0.take().ok_or_else(|| {
            std::thread::sleep(timeout);
            Error::new(ErrorKind::DeadlineExceeded, "nobody came")
        })
    }
}

#[async_trait]
impl Hypervisor for FakeHypervisor {
    async fn prepare_vm(
        &self,
        _id: &str,
        _netns: Option<String>,
        _annotations: &HashMap<String, String>,
    ) -> Result<()> {
        // A new VM, in the same object.
        self.exit.send_replace(None);
        Ok(())
    }

    async fn start_vm(&self, _timeout: Duration) -> Result<()> {
        match self.boot {
            Boot::Refused => Err(Error::new(
                ErrorKind::PermissionDenied,
                "/dev/kvm: permission denied",
            )),
            Boot::Panics => {
                self.end(VmExit::Panic);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    async fn stop_vm(&self) -> Result<()> {
        self.end(VmExit::Stopped);
        Ok(())
    }

    async fn wait_vm(&self) -> VmExit {
        self.exit
            .subscribe()
            .wait_for(Option::is_some)
            .await
            .unwrap()
            .clone()
            .unwrap()
    }

    async fn pause_vm(&self) -> Result<()> {
        Ok(())
    }

    async fn resume_vm(&self) -> Result<()> {
        Ok(())
    }

    async fn add_device(&self, device: DeviceType) -> Result<DeviceType> {
        self.change_devices().await?;
        self.devices.lock().unwrap().push(device.clone());
        Ok(device)
    }

    async fn remove_device(&self, id: &str) -> Result<()> {
        self.change_devices().await?;
        self.devices.lock().unwrap().retain(|device| device.id() != id);
        Ok(())
    }

    async fn update_device(&self, device: DeviceType) -> Result<()> {
        let mut devices = self.devices.lock().unwrap();
        let known = devices.iter_mut().find(|known| known.id() == device.id());
        *known.ok_or_else(|| Error::new(ErrorKind::NotFound, "no such device"))? = device;
        Ok(())
    }

    async fn get_agent_socket(&self) -> Result<String> {
        Ok(String::new())
    }

    async fn hypervisor_config(&self) -> HypervisorConfig {
        HypervisorConfig::default()
    }

    async fn get_thread_ids(&self) -> Result<VcpuThreadIds> {
        Ok(VcpuThreadIds::default())
    }

    async fn cleanup(&self) -> Result<()> {
        Ok(())
    }

    async fn check(&self) -> Result<()> {
        Ok(())
    }

    async fn get_jailer_root(&self) -> Result<String> {
        Ok(String::new())
    }

    async fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    async fn get_hypervisor_metrics(&self) -> Result<String> {
        Ok(String::new())
    }

    async fn vsock_connect(&self, port: u32, timeout: Duration) -> Result<UnixStream> {
        if let Some(served) = self.ports.lock().unwrap().get(&port) {
            let (host, guest) = UnixStream::pair().unwrap();
            served.send(guest).unwrap();
            return Ok(host);
        }
        let boots = matches!(self.boot, Boot::Announced | Boot::Silent);
        if port != 1024 || !boots {
            tokio::time::sleep(timeout).await;
            return Err(Error::new(
                ErrorKind::DeadlineExceeded,
                format!("vsock port {port}: nobody listens"),
            ));
        }
        if self.boot == Boot::Silent {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let (host, guest) = UnixStream::pair().unwrap();
        serve(self.guest.clone(), guest);
        Ok(host)
    }

    fn vsock_listen(&self, _port: u32) -> Result<Box<dyn GuestListener>> {
        if self.boot != Boot::Announced {
            return Ok(Box::new(FakeListener(None)));
        }
        let (host, mut guest) = UnixStream::pair().unwrap();
        guest.write_all(b"ready\n").unwrap();
        Ok(Box::new(FakeListener(Some(host))))
    }

    fn vsock_attach(&self, attach: Attach) -> Result<u32> {
        if self.exit.borrow().is_some() {
            return Err(Error::new(ErrorKind::Unavailable, "the VM is gone"));
        }
        let port = self.next_port.fetch_add(1, Ordering::Relaxed);
        assert!(
            attach.port == 1027
                && matches!(
                    attach.direction,
                    AttachDirection::ToGuest | AttachDirection::FromGuest
                )
        );
        self.guest.attached.lock().unwrap().insert(port, attach.fd);
        Ok(port)
    }

    async fn vsock_wait(&self, port: u32, timeout: Duration) -> bool {
        let guest = self.guest.clone();
        let wait = move || {
            let deadline = Instant::now() + timeout;
            let mut attached = guest.attached.lock().unwrap();
            while attached.contains_key(&port) {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return false;
                }
                attached = guest.attached_changed.wait_timeout(attached, left).unwrap().0;
            }
            true
        };
        tokio::task::spawn_blocking(wait).await.unwrap()
    }

    fn vsock_close(&self, port: u32) {
        self.guest.detach(port);
    }

    fn console_tail(&self, _lines: usize) -> Vec<String> {
        vec![
            "Kernel panic - not syncing".into(),
            "\u{1b}[0m---[ end ]---".into(),
        ]
    }
}
