//! Generic event device (ACPI 6.5, 5.6.9): one interrupt tells the guest that something of the machine changed.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use acpi_tables::{Aml, aml};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::devices::virtio::transport::mmio::slots;
use crate::devices::{cpu_hotplug, power_button, vmgenid};
use crate::lifecycle::ExitReason;

/// Notification value of the button and of the generation id.
const STATUS_CHANGED: u8 = 0x80;

/// Its only I/O port: the pending events, cleared by reading.
pub const PORT: u16 = 0x610;

/// Something the guest can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Event {
    /// virtio-mmio slots were filled or emptied.
    Slots = 1,
    /// Processors are offered or asked for.
    Processors = 2,
    /// Somebody pressed the power button.
    PowerButton = 4,
    /// The machine has a new generation.
    Generation = 8,
}

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

    /// Tells the guest.
    ///
    /// # Errors
    /// The eventfd cannot be written.
    pub fn notify(&self, event: Event) -> io::Result<()> {
        self.pending.fetch_or(event as u8, Ordering::SeqCst);
        self.irqfd.write(1)
    }

    /// Sends the interrupt again if the guest has not asked what it was about: the edge was lost while the pin was masked.
    pub fn repeat(&self) {
        if self.pending.load(Ordering::SeqCst) != 0
            && let Err(error) = self.irqfd.write(1)
        {
            guest_log!(ERROR, %error, "GED: cannot write the irqfd");
        }
    }

    /// Events the guest has not fetched.
    pub fn pending(&self) -> u8 {
        self.pending.load(Ordering::SeqCst)
    }

    /// Takes over saved [`pending`](Self::pending) events.
    pub fn restore(&self, pending: u8) {
        self.pending.store(pending, Ordering::SeqCst);
        self.repeat();
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
    let (container, button) = (
        aml::Path::new(slots::CONTAINER_PATH),
        aml::Path::new(power_button::PATH),
    );
    let generation = aml::Path::new(vmgenid::PATH);
    let scan = aml::MethodCall::new(aml::Path::new(cpu_hotplug::SCAN_METHOD), vec![]);
    let (slots_changed, processors) = (Event::Slots as u8, Event::Processors as u8);
    let (pressed, renewed) = (Event::PowerButton as u8, Event::Generation as u8);
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
                    &aml::And::new(&aml::Local(1), &aml::Local(0), &slots_changed),
                    &aml::If::new(&aml::Local(1), vec![&aml::Notify::new(&container, &aml::ZERO)]),
                    &aml::And::new(&aml::Local(1), &aml::Local(0), &processors),
                    &aml::If::new(&aml::Local(1), vec![&scan]),
                    &aml::And::new(&aml::Local(1), &aml::Local(0), &pressed),
                    &aml::If::new(&aml::Local(1), vec![&aml::Notify::new(&button, &STATUS_CHANGED)]),
                    &aml::And::new(&aml::Local(1), &aml::Local(0), &renewed),
                    &aml::If::new(
                        &aml::Local(1),
                        vec![&aml::Notify::new(&generation, &STATUS_CHANGED)],
                    ),
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
        ged.notify(Event::Slots).unwrap();
        ged.repeat();
        assert_eq!(irqfd.read().unwrap(), 2);
        let mut data = [0];
        ged.read(0, &mut data);
        assert_eq!(data, [Event::Slots as u8]);
        ged.read(0, &mut data);
        assert_eq!(data, [0]);
        ged.repeat();
        assert!(irqfd.read().is_err());
    }
}
