//! Processors that come and go: their ACPI objects, and the registers through which the guest answers.
//!
//! The machine sets bits in the shared page and lets the GED run `CSCN`, which sends a Device Check or an Eject Request to
//! the processors concerned (ACPI 6.5, 5.6.6). The guest answers through `_OST` (6.3.5: what became of it) and `_EJ0`
//! (6.3.3: the processor is offline and given up), which write the registers here. Nothing of this needs more than an
//! unmodified Linux with CONFIG_ACPI_HOTPLUG_CPU; putting a new processor online is user space's affair
//! (`/sys/devices/system/cpu/cpuN/online`), taking one offline is the kernel's.

use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use acpi_tables::{Aml, aml};

use crate::acpi::aml::Raw;
use crate::acpi::shared_page::{Bitmap, SharedPage, bit_path, status_method};
use crate::bus::BusDevice;
use crate::lifecycle::ExitReason;

/// First I/O port.
pub const PORT: u16 = 0x630;
/// Number of ports.
pub const PORTS: u16 = 8;
/// The container and its method, as the GED names it.
pub const SCAN_METHOD: &str = "\\_SB_.CPUS.CSCN";

/// 8 bits: a processor was ejected.
const EJECT: u64 = 0;
/// 32 bits: index, status << 8, event << 16.
const STATUS: u64 = 4;

/// Source events of `_OST` (ACPI 6.5, table 6.27).
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
/// Status codes of `_OST` (table 6.28 and following).
const SUCCESS: u8 = 0;
const EJECT_IN_PROGRESS: u8 = 0x84;
const EJECT_PENDING: u8 = 0x85;

/// Where a processor stands between the machine and the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cpu {
    /// The guest does not have it.
    Absent,
    /// Announced, not yet answered.
    Inserting,
    /// The guest has it.
    Present,
    /// Asked for, not yet answered.
    Ejecting,
    /// The guest kept it as it was before the request, with this `_OST` status.
    Refused(u8),
}

/// The registers.
#[derive(Debug)]
pub struct CpuHotplug {
    shared: Arc<SharedPage>,
    cpus: Mutex<Vec<Cpu>>,
    changed: Condvar,
}

/// Saved presence of the processors of another machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{saved} processors saved, the machine has {present}")]
pub struct PresenceError {
    /// Processors of the saved machine.
    pub saved: usize,
    /// Processors of this one.
    pub present: usize,
}

impl CpuHotplug {
    /// `max` processors, of which the first `boot` are there.
    pub fn new(shared: Arc<SharedPage>, boot: u8, max: u8) -> Self {
        let cpus = (0..max).map(|index| {
            let present = index < boot;
            shared.set(Bitmap::CpuPresent, index, present);
            if present { Cpu::Present } else { Cpu::Absent }
        });
        Self {
            cpus: Mutex::new(cpus.collect()),
            shared,
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Cpu>> {
        self.cpus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where every processor stands, by index.
    pub fn cpus(&self) -> Vec<Cpu> {
        self.lock().clone()
    }

    /// Takes over saved presence, by index. The shared page is part of the guest's memory and says the same.
    ///
    /// # Errors
    /// It is another machine's.
    pub fn restore(&self, present: &[bool]) -> Result<(), PresenceError> {
        let mut cpus = self.lock();
        if cpus.len() != present.len() {
            return Err(PresenceError {
                saved: present.len(),
                present: cpus.len(),
            });
        }
        for ((index, cpu), present) in (0u8..).zip(cpus.iter_mut()).zip(present) {
            *cpu = if *present { Cpu::Present } else { Cpu::Absent };
            self.publish(index, *cpu);
        }
        Ok(())
    }

    /// Offers a processor to the guest; the GED must be told afterwards.
    pub fn insert(&self, index: u8) {
        self.set(index, Cpu::Inserting);
    }

    /// Asks for a processor back; the GED must be told afterwards.
    pub fn eject(&self, index: u8) {
        self.set(index, Cpu::Ejecting);
    }

    /// Gives up on a request: the processor is `Present` or `Absent`, whatever the guest says later.
    pub fn settle(&self, index: u8, cpu: Cpu) {
        self.set(index, cpu);
    }

    fn set(&self, index: u8, cpu: Cpu) {
        if let Some(entry) = self.lock().get_mut(usize::from(index)) {
            *entry = cpu;
            self.publish(index, cpu);
        }
    }

    fn publish(&self, index: u8, cpu: Cpu) {
        self.shared.set(Bitmap::CpuPresent, index, cpu != Cpu::Absent);
        self.shared.set(Bitmap::CpuInsert, index, cpu == Cpu::Inserting);
        self.shared.set(Bitmap::CpuEject, index, cpu == Cpu::Ejecting);
        self.changed.notify_all();
    }

    /// Waits until the guest has answered for every processor of `indices`, or until `deadline`; where they stand then.
    pub fn wait(&self, indices: &[u8], deadline: Instant) -> Vec<Cpu> {
        let mut cpus = self.lock();
        loop {
            let now: Vec<Cpu> = indices
                .iter()
                .filter_map(|index| cpus.get(usize::from(*index)).copied())
                .collect();
            let pending = |cpu: &Cpu| matches!(cpu, Cpu::Inserting | Cpu::Ejecting);
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO || !now.iter().any(pending) {
                return now;
            }
            cpus = self
                .changed
                .wait_timeout(cpus, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// `_EJ0`. A guest that gives up what nobody asked for keeps it: the machine's size is not its decision.
    fn ejected(&self, index: u8) {
        let mut cpus = self.lock();
        match cpus.get_mut(usize::from(index)) {
            Some(cpu @ Cpu::Ejecting) => {
                *cpu = Cpu::Absent;
                self.publish(index, Cpu::Absent);
            }
            _ => guest_log!(DEBUG, index, "CPU hotplug: ejected without a request"),
        }
    }

    /// `_OST`.
    fn reported(&self, index: u8, status: u8, event: u16) {
        let mut cpus = self.lock();
        let Some(cpu) = cpus.get_mut(usize::from(index)) else {
            return;
        };
        let next = match (*cpu, event as u8, status) {
            (Cpu::Inserting, DEVICE_CHECK, SUCCESS) => Cpu::Present,
            (Cpu::Ejecting, EJECT_REQUEST, SUCCESS | EJECT_IN_PROGRESS | EJECT_PENDING) => return,
            (Cpu::Inserting, DEVICE_CHECK, status) | (Cpu::Ejecting, EJECT_REQUEST, status) => {
                Cpu::Refused(status)
            }
            (cpu, ..) => {
                guest_log!(
                    DEBUG,
                    index,
                    status,
                    event,
                    ?cpu,
                    "CPU hotplug: answer without a question"
                );
                return;
            }
        };
        *cpu = next;
        self.publish(index, next);
    }
}

impl BusDevice for CpuHotplug {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitReason> {
        match (offset, data) {
            (EJECT, &[index]) => self.ejected(index),
            (STATUS, &[index, status, event_low, event_high]) => {
                self.reported(index, status, u16::from_le_bytes([event_low, event_high]));
            }
            _ => {}
        }
        ControlFlow::Continue(())
    }
}

/// Writes the processor container: one `ACPI0007` object for each of `max` processors, and `CSCN`.
pub fn write_aml(sink: &mut Vec<u8>, max: u8) {
    let mut body = Vec::new();
    aml::Name::new("_HID".into(), &"ACPI0010").to_aml_bytes(&mut body);
    aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A05")).to_aml_bytes(&mut body);
    Bitmap::CpuPresent.write_aml(&mut body, "CPPR", b'P', max);
    Bitmap::CpuInsert.write_aml(&mut body, "CPIN", b'I', max);
    Bitmap::CpuEject.write_aml(&mut body, "CPEJ", b'E', max);
    write_registers(&mut body);
    for index in 0..max {
        write_processor(&mut body, index);
    }
    let mut scan = Vec::new();
    for index in 0..max {
        for (bitmap, event) in [(b'I', DEVICE_CHECK), (b'E', EJECT_REQUEST)] {
            aml::If::new(
                &bit_path(bitmap, index),
                vec![&aml::Notify::new(&bit_path(b'C', index), &event)],
            )
            .to_aml_bytes(&mut scan);
        }
    }
    aml::Method::new("CSCN".into(), 0, true, vec![&Raw(&scan)]).to_aml_bytes(&mut body);
    aml::Device::new("CPUS".into(), vec![&Raw(&body)]).to_aml_bytes(sink);
}

/// The registers and `COST(index, event, status)`, which packs an answer.
fn write_registers(body: &mut Vec<u8>) {
    aml::OpRegion::new("CREG".into(), aml::OpRegionSpace::SystemIO, &PORT, &(PORTS as u8)).to_aml_bytes(body);
    let field = |access, entries| {
        aml::Field::new(
            "CREG".into(),
            access,
            aml::FieldLockRule::NoLock,
            aml::FieldUpdateRule::WriteAsZeroes,
            entries,
        )
    };
    field(
        aml::FieldAccessType::Byte,
        vec![aml::FieldEntry::Named(*b"CEJT", 8)],
    )
    .to_aml_bytes(body);
    field(
        aml::FieldAccessType::DWord,
        vec![
            aml::FieldEntry::Reserved(32),
            aml::FieldEntry::Named(*b"CSTS", 32),
        ],
    )
    .to_aml_bytes(body);
    aml::Method::new(
        "COST".into(),
        3,
        true,
        vec![
            &aml::And::new(&aml::Local(0), &aml::Arg(2), &0xffu8),
            &aml::ShiftLeft::new(&aml::Local(0), &aml::Local(0), &8u8),
            &aml::And::new(&aml::Local(1), &aml::Arg(1), &0xffffu16),
            &aml::ShiftLeft::new(&aml::Local(1), &aml::Local(1), &16u8),
            &aml::Or::new(&aml::Local(0), &aml::Local(0), &aml::Local(1)),
            &aml::Or::new(&aml::Local(0), &aml::Local(0), &aml::Arg(0)),
            &aml::Store::new(&aml::Path::new("CSTS"), &aml::Local(0)),
        ],
    )
    .to_aml_bytes(body);
}

fn write_processor(body: &mut Vec<u8>, index: u8) {
    // _MAT: the processor's MADT entry, enabled: Linux takes the APIC id from here when the processor is added
    // (drivers/acpi/processor_core.c, acpi_get_phys_id).
    let mat = aml::BufferData::new(vec![0, 8, index, index, 1, 0, 0, 0]);
    aml::Device::new(
        bit_path(b'C', index),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0007"),
            &aml::Name::new("_UID".into(), &index),
            &aml::Name::new("_MAT".into(), &mat),
            &Raw(&status_method(index)),
            &aml::Method::new(
                "_EJ0".into(),
                1,
                false,
                vec![&aml::Store::new(&aml::Path::new("CEJT"), &index)],
            ),
            &aml::Method::new(
                "_OST".into(),
                3,
                false,
                vec![&aml::MethodCall::new(
                    "COST".into(),
                    vec![&index, &aml::Arg(0), &aml::Arg(1)],
                )],
            ),
        ],
    )
    .to_aml_bytes(body);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hotplug() -> CpuHotplug {
        let memory =
            Arc::new(crate::memory::allocate(&crate::memory::layout::MemoryLayout::ram(64 << 20)).unwrap());
        CpuHotplug::new(Arc::new(SharedPage::new(memory)), 1, 4)
    }

    fn report(hotplug: &CpuHotplug, index: u8, event: u16, status: u8) {
        let [low, high] = event.to_le_bytes();
        let _ = hotplug.write(STATUS, &[index, status, low, high]);
    }

    #[test]
    fn insert_when_the_guest_agrees_is_present() {
        let hotplug = hotplug();
        hotplug.insert(2);
        report(&hotplug, 2, 1, SUCCESS);
        let far = Instant::now() + Duration::from_secs(60);
        assert_eq!(hotplug.wait(&[2], far), [Cpu::Present]);
    }

    #[test]
    fn eject_when_the_guest_refuses_or_is_silent_says_so() {
        let hotplug = hotplug();
        hotplug.eject(0);
        report(&hotplug, 0, 3, EJECT_IN_PROGRESS);
        assert_eq!(hotplug.wait(&[0], Instant::now()), [Cpu::Ejecting]);
        report(&hotplug, 0, 3, 0x82);
        let far = Instant::now() + Duration::from_secs(60);
        assert_eq!(hotplug.wait(&[0], far), [Cpu::Refused(0x82)]);
        hotplug.eject(0);
        let _ = hotplug.write(EJECT, &[0]);
        assert_eq!(hotplug.wait(&[0], far), [Cpu::Absent]);
    }

    #[test]
    fn answers_when_they_flood_the_log_are_told_of_a_few_times() {
        let hotplug = hotplug();
        let messages = [
            "CPU hotplug: ejected without a request",
            "CPU hotplug: answer without a question",
        ];
        crate::guest_log::recorder::assert_limited(&messages, 300, || {
            for _ in 0..300 {
                let _ = hotplug.write(EJECT, &[1]);
                report(&hotplug, 1, 1, SUCCESS);
            }
        });
    }

    #[test]
    fn answers_when_nobody_asked_change_nothing() {
        let hotplug = hotplug();
        let before = hotplug.cpus();
        for index in 0..=255 {
            let _ = hotplug.write(EJECT, &[index]);
            report(&hotplug, index, 1, SUCCESS);
            report(&hotplug, index, 3, 0x82);
            let _ = hotplug.write(EJECT, &[index, 0]);
        }
        assert_eq!(hotplug.cpus(), before);
    }
}
