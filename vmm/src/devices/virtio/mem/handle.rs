//! The host's side: setting the target and waiting for the guest.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::error::ResizeMemoryError;
use super::region::Region;
use super::{BLOCK_SIZE, GRANULARITY};
use crate::devices::virtio::{Interrupt, read_space};

/// What the device, its worker and handles share.
#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Behind the lock of [`Shared`].
#[derive(Debug)]
pub(super) struct State {
    /// `None` when the device is gone.
    pub(super) region: Option<Region>,
    /// Present while a driver runs the device.
    pub(super) interrupt: Option<Interrupt>,
}

impl Shared {
    pub(super) fn new(region: Region) -> Self {
        Self {
            state: Mutex::new(State {
                region: Some(region),
                interrupt: None,
            }),
            changed: Condvar::new(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `struct virtio_mem_config` (5.15.4): block_size, node_id and padding, addr, region_size, usable_region_size,
    /// plugged_size, requested_size, eight bytes each.
    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let fields = state.region.as_ref().map(|region| {
            [
                BLOCK_SIZE,
                0,
                region.start(),
                region.size(),
                region.size(),
                region.plugged(),
                region.requested(),
            ]
        });
        let space = fields.unwrap_or_default().map(u64::to_le_bytes);
        read_space(space.as_flattened(), offset, data);
    }

    /// Changes the state and wakes everybody who waits for it.
    pub(super) fn update<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.lock());
        self.changed.notify_all();
        result
    }
}

/// A handle to the device; clones refer to the same one.
#[derive(Debug, Clone)]
pub struct MemHandle {
    shared: Arc<Shared>,
    /// One resize at a time.
    resizing: Arc<Mutex<()>>,
}

impl MemHandle {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            resizing: Arc::default(),
        }
    }

    /// Bytes plugged now; 0 when the device is gone.
    pub fn plugged(&self) -> u64 {
        self.shared.lock().region.as_ref().map_or(0, Region::plugged)
    }

    /// Most bytes that can be plugged.
    pub fn limit(&self) -> u64 {
        self.shared.lock().region.as_ref().map_or(0, Region::limit)
    }

    /// Asks the guest for `bytes` plugged, in addition to the `boot` bytes it always has (for errors only), rounded up to
    /// [`GRANULARITY`], and waits for it. Returns the plugged bytes before and after.
    ///
    /// # Errors
    /// [`ResizeMemoryError`]. After [`ResizeMemoryError::Timeout`] what was reached is the target.
    pub fn resize(&self, boot: u64, bytes: u64, timeout: Duration) -> Result<(u64, u64), ResizeMemoryError> {
        let _one = self.resizing.lock().unwrap_or_else(PoisonError::into_inner);
        // A timeout beyond the clock's range waits for ever.
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.shared.lock();
        let region = state.region.as_mut().ok_or(ResizeMemoryError::Ended)?;
        let (old, limit) = (region.plugged(), region.limit());
        let target = bytes.checked_next_multiple_of(GRANULARITY).unwrap_or(u64::MAX);
        if target > limit {
            return Err(ResizeMemoryError::AboveMaximum {
                requested: boot.saturating_add(bytes),
                maximum: boot.saturating_add(limit),
            });
        }
        let target = target / BLOCK_SIZE * BLOCK_SIZE;
        if target == old && target == region.requested() {
            return Ok((old, old));
        }
        let interrupt = state.interrupt.clone().ok_or(ResizeMemoryError::NoDriver)?;
        if let Some(region) = &mut state.region {
            region.request(target);
        }
        drop(state);
        interrupt.config(|space| self.shared.read_config(0, space));
        let mut state = self.shared.lock();
        loop {
            let region = state.region.as_mut().ok_or(ResizeMemoryError::Ended)?;
            let reached = region.plugged();
            if reached == target {
                return Ok((old, target));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                region.request(reached);
                drop(state);
                interrupt.config(|space| self.shared.read_config(0, space));
                return Err(ResizeMemoryError::Timeout {
                    target: boot.saturating_add(target),
                    reached: boot.saturating_add(reached),
                    timeout_ms: timeout.as_millis(),
                });
            }
            state = match left {
                Some(left) => {
                    let waited = self.shared.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let waited = self.shared.changed.wait(state);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }
}
