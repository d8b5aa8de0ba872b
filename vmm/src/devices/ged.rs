//! Generic event device (ACPI 6.5, 5.6.9): one interrupt tells the guest to look at the virtio-mmio slots again.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use acpi_tables::{Aml, aml};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::devices::virtio::slots;
use crate::vm::ExitReason;

/// Its only I/O port: the pending events, cleared by reading.
pub const PORT: u16 = 0x610;

/// The presence of a virtio-mmio slot changed.
const SLOTS_CHANGED: u8 = 1;

/// The event register and its interrupt.
#[derive(Debug)]
pub struct Ged {
    pending: AtomicU8,
    irqfd: Arc<EventFd>,
}

impl Ged {
    /// `irqfd` is bound to the GSI given to [`write_aml`].
    pub fn new(irqfd: Arc<EventFd>) -> Self {
        Self {
            pending: AtomicU8::new(0),
            irqfd,
        }
    }

    /// Tells the guest that slots were filled or emptied.
    ///
    /// # Errors
    /// The eventfd cannot be written.
    pub fn notify_slots_changed(&self) -> io::Result<()> {
        self.pending.fetch_or(SLOTS_CHANGED, Ordering::SeqCst);
        self.irqfd.write(1)
    }
}

impl BusDevice for Ged {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = self.pending.swap(0, Ordering::SeqCst);
        }
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> ControlFlow<ExitReason> {
        ControlFlow::Continue(())
    }
}

/// Writes the device. Linux ignores a Notify on an `LNRO0005` device; a Bus Check on the container around them makes it
/// scan, so that is what the event method sends.
pub fn write_aml(sink: &mut Vec<u8>, gsi: u32) {
    let container = aml::Path::new(slots::CONTAINER_PATH);
    aml::Device::new(
        "GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::Interrupt::new(true, true, false, false, gsi)]),
            ),
            &aml::OpRegion::new("GEDR".into(), aml::OpRegionSpace::SystemIO, &PORT, &1u8),
            &aml::Field::new(
                "GEDR".into(),
                aml::FieldAccessType::Byte,
                aml::FieldLockRule::NoLock,
                aml::FieldUpdateRule::WriteAsZeroes,
                vec![aml::FieldEntry::Named(*b"EVTS", 8)],
            ),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![
                    &aml::Store::new(&aml::Local(0), &aml::Path::new("EVTS")),
                    &aml::And::new(&aml::Local(1), &aml::Local(0), &SLOTS_CHANGED),
                    &aml::If::new(&aml::Local(1), vec![&aml::Notify::new(&container, &aml::ZERO)]),
                ],
            ),
        ],
    )
    .to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_when_notified_gives_the_event_once_and_the_interrupt_fires() {
        let irqfd = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let ged = Ged::new(irqfd.clone());
        ged.notify_slots_changed().unwrap();
        assert_eq!(irqfd.read().unwrap(), 1);
        let mut data = [0];
        ged.read(0, &mut data);
        assert_eq!(data, [SLOTS_CHANGED]);
        ged.read(0, &mut data);
        assert_eq!(data, [0]);
    }
}
