//! Features, configuration space, activation.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::config::NetConfig;
use super::counters::Counters;
use super::handle::{LimitConfigs, NetHandle, Shared, lock};
use super::rx::RxQueue;
use super::state::NetState;
use super::switch::{self, Switcher};
use super::tap::{self, Backend, Tap, TapError};
use super::tx::TxQueue;
use super::worker::{Limiters, NetWorker, Pair, usual_frame};
use crate::devices::virtio::config::{OpenError, OpenErrorKind};
use crate::devices::virtio::queue::served_queue::{ServedQueue, queue_position};
use crate::devices::virtio::state::{self, QueuePosition, StateError};
use crate::devices::virtio::{
    ActivateError, Activation, ActiveQueue, CHAIN_FEATURES, OnLoop, VirtioDevice, read_space,
};
use crate::rate_limiter::RateLimiter;

/// Entries of the control queue: one command is outstanding at a time.
const CONTROL_QUEUE_SIZE: u16 = 16;

/// An interface cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Its TAP.
    #[error("network {id}: {source}")]
    Tap {
        /// Device id.
        id: String,
        /// Cause.
        source: TapError,
    },
    /// An eventfd or timer.
    #[error("network {id}: eventfd or timerfd: {source}")]
    EventFd {
        /// Device id.
        id: String,
        /// Cause.
        source: io::Error,
    },
}

impl From<NetError> for OpenError {
    fn from(error: NetError) -> Self {
        let kind = match &error {
            NetError::Tap { source, .. } => source.kind(),
            NetError::EventFd { source, .. } => OpenErrorKind::of(source),
        };
        Self::new(kind, error)
    }
}

/// A network interface.
#[derive(Debug)]
pub struct Net {
    shared: Arc<Shared>,
    backends: Vec<Arc<dyn Backend>>,
    queue_sizes: Vec<u16>,
    mtu: Option<u16>,
    /// What a suspended device knows; while a worker runs, the link is in `shared` and the rest with the worker.
    state: NetState,
    running: Option<OnLoop<NetWorker>>,
}

impl Net {
    /// Opens the TAP of a valid configuration, or makes it.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn new(config: &NetConfig) -> Result<Self, NetError> {
        let taps =
            tap::open(&config.tap, usize::from(config.queue_pairs)).map_err(|e| tap_error(config, e))?;
        Self::with_taps(config, taps)
    }

    /// Takes over open queues of a TAP, one for each queue pair of a valid configuration, instead of opening it by name.
    ///
    /// # Errors
    /// [`NetError::Tap`] when they are no TAPs with virtio headers (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR; for more than one
    /// pair IFF_MULTI_QUEUE), or not as many as queue pairs.
    pub fn with_fds(config: &NetConfig, fds: Vec<OwnedFd>) -> Result<Self, NetError> {
        let taps = tap::adopt(&config.tap, fds, usize::from(config.queue_pairs))
            .map_err(|e| tap_error(config, e))?;
        Self::with_taps(config, taps)
    }

    fn with_taps(config: &NetConfig, taps: Vec<Tap>) -> Result<Self, NetError> {
        let backends = taps.into_iter().map(|tap| Arc::new(tap) as Arc<dyn Backend>);
        Self::with_backends(config, backends.collect())
    }

    /// `backends`: one for each queue pair.
    pub(super) fn with_backends(
        config: &NetConfig,
        backends: Vec<Arc<dyn Backend>>,
    ) -> Result<Self, NetError> {
        let mut queue_sizes = vec![config.queue_size; 2 * backends.len()];
        if backends.len() > 1 {
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        let host_error = |source| NetError::EventFd {
            id: config.id.clone(),
            source,
        };
        let eventfd = || EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(host_error);
        let shared = Arc::new(Shared {
            id: config.id.clone(),
            counters: Counters::default(),
            link_up: AtomicBool::new(true),
            interrupt: Mutex::default(),
            limits: Mutex::new(LimitConfigs {
                rx: config.rx_rate_limiter,
                tx: config.tx_rate_limiter,
            }),
            changed: eventfd()?,
            changes: Mutex::new(RateLimiter::new(&switch::LIMIT).map_err(host_error)?),
            switched: eventfd()?,
        });
        Ok(Self {
            shared,
            backends,
            queue_sizes,
            mtu: config.mtu,
            state: NetState {
                mac: config.mac.unwrap_or_else(|| stable_mac(config)),
                pairs: 1,
                link_up: true,
                limits: None,
            },
            running: None,
        })
    }

    /// A handle for changes while the guest uses the interface.
    pub fn handle(&self) -> NetHandle {
        NetHandle(self.shared.clone())
    }

    fn multi_queue(&self) -> bool {
        self.backends.len() > 1
    }

    fn host_error(&self, what: &'static str) -> impl Fn(io::Error) -> ActivateError {
        let device = self.shared.id.clone();
        move |source| ActivateError::Host {
            device: device.clone(),
            what,
            source,
        }
    }

    fn limiters(&self) -> io::Result<Limiters> {
        let configs = *lock(&self.shared.limits);
        let mut limiters = Limiters {
            rx: RateLimiter::new(&configs.rx)?,
            tx: RateLimiter::new(&configs.tx)?,
        };
        if let Some(limits) = &self.state.limits {
            limiters.rx.restore(&limits.rx);
            limiters.tx.restore(&limits.tx);
        }
        Ok(limiters)
    }
}

fn tap_error(config: &NetConfig, source: TapError) -> NetError {
    NetError::Tap {
        id: config.id.clone(),
        source,
    }
}

/// A locally administered address (second bit of the first byte), the same for the same device on the same TAP.
fn stable_mac(config: &NetConfig) -> [u8; 6] {
    let mut hash = Sha256::new();
    let netns = config.tap.netns.as_ref().map(|path| path.as_os_str());
    for part in [
        config.id.as_bytes(),
        config.tap.name.as_bytes(),
        netns.unwrap_or_default().as_encoded_bytes(),
    ] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let mut mac = [0x02; 6];
    for (to, from) in mac.iter_mut().skip(1).zip(hash.finalize()) {
        *to = from;
    }
    mac
}

/// What the driver can take, in the TAP's words. Segments need checksums (5.1.3.1).
fn offload(features: u64) -> u32 {
    let has = |bit: u32| features & 1 << bit != 0;
    if !has(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut flags = libc::TUN_F_CSUM;
    if has(VIRTIO_NET_F_GUEST_TSO4) {
        flags |= libc::TUN_F_TSO4;
    }
    if has(VIRTIO_NET_F_GUEST_TSO6) {
        flags |= libc::TUN_F_TSO6;
    }
    flags
}

/// Takes queue `index` out of an activation, if the driver set it up.
fn take_optional(activation: &mut Activation, index: usize) -> Option<ActiveQueue> {
    let at = activation.queues.iter().position(|queue| queue.index == index)?;
    Some(activation.queues.remove(at))
}

impl VirtioDevice for Net {
    fn id(&self) -> &str {
        &self.shared.id
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let mut features = CHAIN_FEATURES
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_GUEST_CSUM
            | 1 << VIRTIO_NET_F_GUEST_TSO4
            | 1 << VIRTIO_NET_F_GUEST_TSO6
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS;
        if self.mtu.is_some() {
            features |= 1 << VIRTIO_NET_F_MTU;
        }
        if self.multi_queue() {
            features |= 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
        }
        features
    }

    /// `struct virtio_net_config` (5.1.4): mac, status, max_virtqueue_pairs, mtu.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = self.state.mac.to_vec();
        // The configuration limits pairs to 8.
        let max_pairs = self.backends.len() as u16;
        for field in [0, max_pairs, self.mtu.unwrap_or(0)] {
            space.extend_from_slice(&field.to_le_bytes());
        }
        self.shared.write_status(&mut space);
        read_space(&space, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let features = activation.features;
        let has = |bit: u32| features & 1 << bit != 0;
        // MQ needs the control queue (5.1.3.1); without MQ that comes after the first pair (5.1.2).
        let multi_queue = has(VIRTIO_NET_F_MQ) && has(VIRTIO_NET_F_CTRL_VQ);
        let max_pairs = if multi_queue { self.backends.len() } else { 1 };
        let device = self.shared.id.clone();
        let serve = |queue, activation: &Activation| {
            ServedQueue::new(
                &device,
                queue,
                activation.memory.clone(),
                activation.interrupt.clone(),
            )
        };

        let mut control = None;
        if has(VIRTIO_NET_F_CTRL_VQ) {
            let queue = take_optional(&mut activation, 2 * max_pairs);
            control = queue.map(|queue| serve(queue, &activation));
        }
        let segments = has(VIRTIO_NET_F_GUEST_TSO4) || has(VIRTIO_NET_F_GUEST_TSO6);
        let want = usual_frame(segments, self.mtu);
        let mut pairs = Vec::new();
        for (index, backend) in self.backends.iter().enumerate().take(max_pairs) {
            let (rx, tx) = (2 * index, 2 * index + 1);
            let set_up = |index| activation.queues.iter().any(|queue| queue.index == index);
            // The first pair must be there, the others may be.
            if index > 0 && !(set_up(rx) && set_up(tx)) {
                break;
            }
            let rx = activation.take_queue(&device, rx)?;
            let tx = activation.take_queue(&device, tx)?;
            let rx = RxQueue::new(serve(rx, &activation), has(VIRTIO_NET_F_MRG_RXBUF), want);
            let queue = serve(tx, &activation);
            pairs.push(Pair::new(backend.clone(), rx, TxQueue::new(queue)));
        }
        let idle = activation
            .queues
            .iter()
            .map(|queue| queue_position(queue.index, &queue.queue))
            .collect();

        let active = usize::from(self.state.pairs).clamp(1, pairs.len());
        switch::set_up(&self.shared, &self.backends, offload(features), active)
            .map_err(|(what, source)| self.host_error(what)(source))?;
        let limiters = self.limiters().map_err(self.host_error("timerfd"))?;
        let confinement = activation.confinement;
        let switched = |queue| Ok((queue, Switcher::spawn(self.shared.clone(), confinement)?));
        let control = control.map(switched).transpose();
        let control = control.map_err(self.host_error("thread to switch queues"))?;
        let worker = NetWorker::new(pairs, active, control, idle, limiters, self.shared.clone());
        self.running = Some(OnLoop::start(activation.io, worker)?);
        *lock(&self.shared.interrupt) = Some(activation.interrupt);
        Ok(())
    }

    fn reset(&mut self) {
        self.suspend();
        self.state.pairs = 1;
    }

    fn suspend(&mut self) -> Vec<QueuePosition> {
        let Some(running) = self.running.take() else {
            return Vec::new();
        };
        *lock(&self.shared.interrupt) = None;
        let remains = running.stop(&self.shared.id, NetWorker::stop);
        self.state.pairs = remains.pairs;
        self.state.limits = Some(remains.limits);
        remains.positions
    }

    fn save(&self) -> Result<Vec<u8>, StateError> {
        let state = NetState {
            link_up: self.shared.link_up.load(Ordering::SeqCst),
            ..self.state
        };
        state::encode(&self.shared.id, &state)
    }

    fn restore(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        self.state = NetState::decode(&self.shared.id, bytes, self.backends.len())?;
        self.shared.link_up.store(self.state.link_up, Ordering::SeqCst);
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.shared.counters.all()
    }
}
