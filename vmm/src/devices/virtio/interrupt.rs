//! How a device tells its driver that something happened, whatever the transport.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of configuration space that a driver can read; beyond them it reads zero. The largest used by a device here has
/// 64.
pub const CONFIG_BYTES: usize = 0x100;

/// What a driver can read of a device's configuration.
pub type ConfigSpace = [u8; CONFIG_BYTES];

/// A transport's side of an [`Interrupt`].
pub trait Notify: Debug + Send + Sync {
    /// Tells the driver that queue `queue` has used buffers.
    fn used(&self, queue: usize);

    /// Makes the driver read what `fill` makes of the configuration; returns whether that is something else now. `fill` gets
    /// what could be read before. Of two calls at a time the one whose `fill` ran last stays.
    fn show_config(&self, fill: &mut dyn FnMut(&mut ConfigSpace)) -> bool;

    /// Tells the driver to read the configuration again.
    fn config(&self);
}

/// The device's way to interrupt the guest.
#[derive(Debug, Clone)]
pub struct Interrupt {
    transport: Arc<dyn Notify>,
    raised: Arc<AtomicU64>,
}

impl Interrupt {
    /// An interrupt that `transport` delivers.
    pub fn new(transport: Arc<dyn Notify>) -> Self {
        Self {
            transport,
            raised: Arc::default(),
        }
    }

    /// Interrupts sent since the device was made.
    pub fn raised(&self) -> u64 {
        self.raised.load(Ordering::Relaxed)
    }

    /// Tells the driver that used buffers are waiting in queue `queue`. Call it only when the queue's `needs_notification`
    /// says so.
    pub fn used(&self, queue: usize) {
        self.raised.fetch_add(1, Ordering::Relaxed);
        self.transport.used(queue);
    }

    /// Changes what the driver reads of the device's configuration and tells it to read it again. `fill` changes what was there
    /// before; a device passes its [`read_config`](super::VirtioDevice::read_config), and must not hold a lock that takes.
    pub fn config(&self, fill: impl FnMut(&mut ConfigSpace)) {
        self.show_config(fill);
        self.raised.fetch_add(1, Ordering::Relaxed);
        self.transport.config();
    }

    /// Changes what the driver reads of the device's configuration, without telling it; returns whether that is something
    /// else now. `fill` as for [`config`](Self::config).
    pub fn show_config(&self, mut fill: impl FnMut(&mut ConfigSpace)) -> bool {
        self.transport.show_config(&mut fill)
    }
}
