//! How much memory the guest has: hotpluggable memory and the balloon.

use std::time::Duration;

use crate::devices::virtio::balloon::{Balloon, BalloonError, BalloonStatistics, BalloonStatus};
use crate::devices::virtio::mem::ResizeMemoryError;
use crate::vm::{Vm, VmState, lock};

impl Vm {
    /// Gives the guest `bytes` of memory in total, more or less than it has, and waits at most `timeout` until its driver
    /// has plugged or unplugged that much. What exceeds the boot-time size is rounded up to
    /// [`GRANULARITY`](crate::devices::virtio::mem::GRANULARITY) (4 MiB). Returns the totals before and after.
    ///
    /// The guest may need a moment more to use new memory (Linux adds it in sections of 128 MiB). What it unplugs is freed on
    /// the host at once. It waits for other resizes, hotplug and saves.
    ///
    /// # Errors
    /// [`ResizeMemoryError`]; after a timeout the guest keeps what it has reached, and the next resize starts from there.
    pub fn resize_memory(&self, bytes: u64, timeout: Duration) -> Result<(u64, u64), ResizeMemoryError> {
        let _operation = lock(&self.operation);
        match self.state() {
            VmState::Running => {}
            state => return Err(ResizeMemoryError::State(state)),
        }
        let minimum = self.boot_memory;
        let above = bytes
            .checked_sub(minimum)
            .ok_or(ResizeMemoryError::BelowMinimum {
                requested: bytes,
                minimum,
            })?;
        match &self.mem {
            Some(mem) => {
                let (old, new) = mem.resize(minimum, above, timeout)?;
                Ok((minimum + old, minimum + new))
            }
            None if above == 0 => Ok((minimum, minimum)),
            None => Err(ResizeMemoryError::AboveMaximum {
                requested: bytes,
                maximum: minimum,
            }),
        }
    }

    /// Memory of the guest in bytes: boot-time and plugged.
    pub fn memory_size(&self) -> u64 {
        let plugged = self.mem.as_ref().map_or(0, |mem| mem.plugged());
        self.boot_memory + plugged
    }

    /// Most memory [`resize_memory`](Self::resize_memory) can give the guest, in bytes.
    pub fn max_memory_size(&self) -> u64 {
        let limit = self.mem.as_ref().map_or(0, |mem| mem.limit());
        self.boot_memory + limit
    }

    /// Asks the guest to give `bytes` to its balloon (absolute, rounded down to 4 KiB) and returns at once; see
    /// [`balloon`](Self::balloon) for what became of it.
    ///
    /// # Errors
    /// [`BalloonError`].
    pub fn set_balloon(&self, bytes: u64) -> Result<(), BalloonError> {
        self.with_balloon(|balloon| balloon.set_target(bytes))
    }

    /// Target and size of the balloon.
    ///
    /// # Errors
    /// [`BalloonError::State`] or [`BalloonError::Missing`].
    pub fn balloon(&self) -> Result<BalloonStatus, BalloonError> {
        self.with_balloon(|balloon| Ok(balloon.status()))
    }

    /// The guest's last memory statistics.
    ///
    /// # Errors
    /// [`BalloonError`].
    pub fn balloon_statistics(&self) -> Result<BalloonStatistics, BalloonError> {
        self.with_balloon(|balloon| balloon.statistics())
    }

    fn with_balloon<T>(
        &self,
        operation: impl FnOnce(&mut Balloon) -> Result<T, BalloonError>,
    ) -> Result<T, BalloonError> {
        match self.machine.get() {
            Some(machine) => machine.devices.with_any(operation).ok_or(BalloonError::Missing)?,
            None => Err(BalloonError::State(self.state())),
        }
    }
}
