//! Global system interrupts: which pin of the I/O APIC is whose.
//!
//! Interrupts are edge-triggered and exclusive. Pins 0 to 4 keep their ISA meaning (4 is COM1).

pub mod io_apic;

/// First pin given out.
const FIRST: u32 = 5;
/// What an I/O APIC has at least; some kernels take it for granted.
const MIN_PINS: u32 = 24;

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
        (gsi < u32::from(io_apic::MAX_PINS)).then(|| {
            self.next += 1;
            gsi
        })
    }

    /// Pins of an I/O APIC that has all those given out.
    pub fn pins(&self) -> u8 {
        // At most MAX_PINS.
        self.next.max(MIN_PINS) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocate_when_exhausted_gives_none_after_every_pin_once() {
        let mut allocator = GsiAllocator::default();
        assert_eq!(allocator.pins(), 24);
        let all: Vec<u32> = std::iter::from_fn(|| allocator.allocate()).collect();
        assert_eq!(all, (5..u32::from(io_apic::MAX_PINS)).collect::<Vec<_>>());
        assert_eq!(allocator.pins(), io_apic::MAX_PINS);
        assert_eq!(allocator.allocate(), None);
    }
}
