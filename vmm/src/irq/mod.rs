//! Allocation of global system interrupts: the 24 pins of KVM's I/O APIC.
//!
//! Interrupts are edge-triggered and exclusive, so the pins bound the number of devices. Pins 0 to 4 keep their ISA
//! meaning (4 is COM1); the machine has no MSI controller to go beyond 24.

/// First pin given out.
const FIRST: u32 = 5;
/// Pins of the I/O APIC.
const PINS: u32 = 24;

/// Most virtio-mmio slots of a machine: the pins left after the GED's.
pub const MAX_SLOTS: u8 = (PINS - FIRST - 1) as u8;

/// Hands out pins in ascending order.
#[derive(Debug)]
pub struct GsiAllocator {
    next: u32,
}

impl Default for GsiAllocator {
    fn default() -> Self {
        Self { next: FIRST }
    }
}

impl GsiAllocator {
    /// The next free pin, `None` when all are taken.
    pub fn allocate(&mut self) -> Option<u32> {
        let gsi = self.next;
        (gsi < PINS).then(|| {
            self.next += 1;
            gsi
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocate_when_exhausted_gives_none_after_every_pin_once() {
        let mut allocator = GsiAllocator::default();
        let all: Vec<u32> = std::iter::from_fn(|| allocator.allocate()).collect();
        assert_eq!(all, (5..24).collect::<Vec<_>>());
        assert_eq!(all.len(), usize::from(MAX_SLOTS) + 1);
        assert_eq!(allocator.allocate(), None);
    }
}
