//! What can be changed about an interface while the guest uses it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;
use vmm_sys_util::eventfd::EventFd;

use super::counters::Counters;
use crate::devices::virtio::Interrupt;
use crate::devices::virtio::config::KnobError;
use crate::rate_limiter::{RateLimiter, RateLimiterConfig};

/// Offset of `status` in `struct virtio_net_config` (5.1.4).
const STATUS: usize = 6;

/// Limits in force.
#[derive(Debug, Clone, Copy)]
pub(super) struct LimitConfigs {
    pub(super) rx: RateLimiterConfig,
    pub(super) tx: RateLimiterConfig,
}

/// What device, worker and handles share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) id: String,
    pub(super) counters: Counters,
    pub(super) link_up: AtomicBool,
    /// While a driver runs the device.
    pub(super) interrupt: Mutex<Option<Interrupt>>,
    pub(super) limits: Mutex<LimitConfigs>,
    /// Tells the worker that `limits` changed.
    pub(super) changed: EventFd,
    /// Limits the changes of the TAP the guest asks for.
    pub(super) changes: Mutex<RateLimiter>,
    /// Tells the worker that such a change is done.
    pub(super) switched: EventFd,
}

impl Shared {
    /// Writes the link's state to the configuration space (le16 at [`STATUS`]; bit 0).
    pub(super) fn write_status(&self, space: &mut [u8]) {
        let up = self.link_up.load(Ordering::SeqCst);
        let status = if up { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        for (to, from) in space.iter_mut().skip(STATUS).zip(status.to_le_bytes()) {
            *to = from;
        }
    }
}

/// A lock of a value that no panic can leave half-written.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A handle to an interface, good for as long as the device exists and without effect after that.
#[derive(Debug, Clone)]
pub struct NetHandle(pub(super) Arc<Shared>);

impl NetHandle {
    /// Plugs or pulls the cable, as the guest sees it (VIRTIO_NET_S_LINK_UP; 5.1.4). Frames already in a queue or in the
    /// TAP still pass.
    pub fn set_link(&self, up: bool) {
        if self.0.link_up.swap(up, Ordering::SeqCst) == up {
            return;
        }
        if let Some(interrupt) = &*lock(&self.0.interrupt) {
            interrupt.config(|space| self.0.write_status(space));
        }
    }

    /// Puts other limits in force at once.
    ///
    /// # Errors
    /// [`KnobError`]; the old limits stay.
    pub fn set_rate_limits(&self, rx: RateLimiterConfig, tx: RateLimiterConfig) -> Result<(), KnobError> {
        KnobError::check_limiter(&self.0.id, "rx_rate_limiter", &rx)?;
        KnobError::check_limiter(&self.0.id, "tx_rate_limiter", &tx)?;
        *lock(&self.0.limits) = LimitConfigs { rx, tx };
        if let Err(error) = self.0.changed.write(1) {
            tracing::error!(device = %self.0.id, %error, "net: cannot tell the worker about new limits");
        }
        Ok(())
    }
}
