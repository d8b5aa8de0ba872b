//! Dispatch of port and memory-mapped I/O to devices.

use std::fmt::Debug;
use std::ops::ControlFlow;
use std::sync::Arc;

use crate::lifecycle::ExitReason;

/// Something with registers. Calls come from any vCPU thread at once; devices lock themselves.
pub trait BusDevice: Debug + Send + Sync {
    /// Fills `data` with the registers at `offset` into the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes `data` to the registers at `offset`. Breaks when the write ends the machine.
    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitReason>;
}

/// Two devices claim the same addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("bus: range {start:#x}+{size:#x} overlaps a range already claimed")]
pub struct BusError {
    /// First address of the refused range.
    pub start: u64,
    /// Its length.
    pub size: u64,
}

#[derive(Debug, Clone)]
struct Entry {
    start: u64,
    size: u64,
    device: Arc<dyn BusDevice>,
}

/// An address space with devices in it; fixed once the machine is built, so lookups take no lock.
#[derive(Debug, Clone, Default)]
pub struct Bus {
    /// Sorted by `start`, without overlap.
    entries: Vec<Entry>,
}

impl Bus {
    /// Puts `device` at `start`..`start + size`.
    ///
    /// # Errors
    /// [`BusError`] when the range is empty, wraps around or overlaps another.
    pub fn insert(&mut self, start: u64, size: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let refused = BusError { start, size };
        let end = start
            .checked_add(size)
            .filter(|_| size > 0)
            .ok_or(refused.clone())?;
        let position = self.entries.partition_point(|e| e.start < start);
        let before = position.checked_sub(1).and_then(|p| self.entries.get(p));
        if before.is_some_and(|e| e.start + e.size > start) {
            return Err(refused);
        }
        if self.entries.get(position).is_some_and(|e| e.start < end) {
            return Err(refused);
        }
        self.entries.insert(position, Entry { start, size, device });
        Ok(())
    }

    /// Reads from the device at `address`; nothing there reads as all ones, as on a real bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes to the device at `address`; nothing there ignores it.
    pub fn write(&self, address: u64, data: &[u8]) -> ControlFlow<ExitReason> {
        match self.find(address) {
            Some((device, offset)) => device.write(offset, data),
            None => ControlFlow::Continue(()),
        }
    }

    fn find(&self, address: u64) -> Option<(&dyn BusDevice, u64)> {
        let position = self
            .entries
            .partition_point(|e| e.start <= address)
            .checked_sub(1)?;
        let entry = self.entries.get(position)?;
        let offset = address - entry.start;
        (offset < entry.size).then(|| (&*entry.device, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Probe(u8);

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }

        fn write(&self, _offset: u64, _data: &[u8]) -> ControlFlow<ExitReason> {
            ControlFlow::Break(ExitReason::PowerOff)
        }
    }

    fn bus() -> Bus {
        let mut bus = Bus::default();
        bus.insert(0x20, 4, Arc::new(Probe(0x20))).unwrap();
        bus.insert(0x10, 8, Arc::new(Probe(0x10))).unwrap();
        bus
    }

    #[test]
    fn read_when_inside_a_range_reaches_its_device_with_the_offset() {
        let mut data = [0];
        bus().read(0x13, &mut data);
        assert_eq!(data, [0x13]);
        bus().read(0x23, &mut data);
        assert_eq!(data, [0x23]);
    }

    #[test]
    fn read_when_nothing_is_there_gives_ones() {
        for address in [0, 0xf, 0x18, 0x24, u64::MAX] {
            let mut data = [0, 0];
            bus().read(address, &mut data);
            assert_eq!(data, [0xff, 0xff]);
            assert_eq!(bus().write(address, &data), ControlFlow::Continue(()));
        }
    }

    #[test]
    fn write_when_the_device_ends_the_machine_breaks() {
        assert_eq!(bus().write(0x20, &[1]), ControlFlow::Break(ExitReason::PowerOff));
    }

    #[test]
    fn insert_when_overlapping_is_refused() {
        for (start, size) in [
            (0x10, 1),
            (0xf, 2),
            (0x17, 1),
            (0x18, 9),
            (0x30, 0),
            (u64::MAX, 2),
            (0, 0x100),
        ] {
            assert!(
                bus().insert(start, size, Arc::new(Probe(0))).is_err(),
                "{start:#x}+{size:#x}"
            );
        }
        bus().insert(0x18, 8, Arc::new(Probe(0))).unwrap();
    }
}
