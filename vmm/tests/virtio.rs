//! The virtio-mmio transport and hotplug registers, driven by tiny guests.

// All of it is a test; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod guest;

use dragonball::Vm;
use dragonball::config::{BlockConfig, DeviceConfig, RngConfig};
use dragonball::vm::{DeviceAddress, ExitReason, HotplugError, VmState};
use guest::{Code, LONG, Scratch, config, config_with, wait_for};

const SLOT: u64 = 0xd000_0000;
/// Presence of the slots, in the shared page.
const PRESENCE: u64 = 0xf_0000;

fn rng(id: &str) -> DeviceConfig {
    DeviceConfig::Rng(RngConfig { id: id.to_owned() })
}

fn run_with(code: &Code, devices: Vec<DeviceConfig>) -> Vec<String> {
    let scratch = Scratch::new();
    let vm = Vm::new(config_with(&scratch, code, devices)).unwrap();
    vm.start().unwrap();
    assert_eq!(
        vm.wait_timeout(LONG),
        Some(ExitReason::PowerOff),
        "{:?}",
        vm.console().tail(20)
    );
    vm.console().tail(100)
}

/// Writes `status`, then prints it back.
fn set_status(code: Code, status: u32) -> Code {
    code.store32(SLOT + 0x70, status).load32(SLOT + 0x70).print_al()
}

#[test]
fn probe_when_a_device_is_there_shows_its_identity() {
    let code = Code::default()
        .map_devices()
        .load32(SLOT)
        .print_al()
        .load32(SLOT + 4)
        .print_al()
        .load32(SLOT + 8)
        .print_al()
        .load32(SLOT + 0xb0)
        .print_al()
        .power_off();
    // "v" of the magic, version 2, entropy source, no shared memory.
    assert_eq!(run_with(&code, vec![rng("rng")]), ["76", "02", "04", "ff"]);
}

#[test]
fn handshake_when_version_1_is_not_accepted_refuses_features_ok() {
    let code = set_status(set_status(Code::default().map_devices(), 1), 3);
    let code = set_status(set_status(code, 11), 15).power_off();
    assert_eq!(run_with(&code, vec![rng("rng")]), ["01", "03", "03", "03"]);
}

/// MMIO writes that came to this process while a guest with an entropy source ran `code`.
fn mmio_writes(code: Code) -> u64 {
    let scratch = Scratch::new();
    let code = code.print("done\n").spin();
    let vm = Vm::new(config_with(&scratch, &code, vec![rng("rng")])).unwrap();
    vm.start().unwrap();
    wait_for(&vm, "done");
    let writes = vm.metrics().vcpus.iter().map(|vcpu| vcpu.mmio_write).sum();
    vm.stop().unwrap();
    writes
}

#[test]
fn acknowledgement_when_of_used_buffers_alone_does_not_leave_kvm() {
    let acknowledge = |value, times| {
        let code = Code::default().map_devices();
        (0..times).fold(code, |code, _| code.store32(SLOT + 0x64, value))
    };
    // Used buffers are 1, a changed configuration is 2.
    assert_eq!(mmio_writes(acknowledge(1, 20)), 0);
    assert_eq!(mmio_writes(acknowledge(3, 20)), 20);
    assert_eq!(mmio_writes(acknowledge(2, 20)), 20);
}

/// Up to FEATURES_OK with VIRTIO_F_VERSION_1 only.
fn negotiated() -> Code {
    let code = Code::default()
        .map_devices()
        .store32(SLOT + 0x70, 1)
        .store32(SLOT + 0x70, 3);
    set_status(code.store32(SLOT + 0x24, 1).store32(SLOT + 0x20, 1), 11)
}

fn queue(code: Code, desc: u32) -> Code {
    code.store32(SLOT + 0x30, 0)
        .store32(SLOT + 0x38, 8)
        .store32(SLOT + 0x80, desc)
        .store32(SLOT + 0x90, 0x4_1000)
        .store32(SLOT + 0xa0, 0x4_2000)
        .store32(SLOT + 0x44, 1)
}

/// Prints the low byte of QueueReady.
fn print_ready(code: Code) -> Code {
    code.store32(SLOT + 0x30, 0).load32(SLOT + 0x44).print_al()
}

#[test]
fn queue_when_configured_after_driver_ok_is_frozen() {
    let code = set_status(queue(negotiated(), 0x4_0000), 15);
    let code = print_ready(code.store32(SLOT + 0x44, 0));
    let code = print_ready(set_status(code, 0)).power_off();
    assert_eq!(run_with(&code, vec![rng("rng")]), ["0b", "0f", "01", "00", "00"]);
}

#[test]
fn queue_when_outside_memory_needs_reset() {
    let code = set_status(queue(negotiated(), 0x8000_0000), 15);
    let code = code.load32(SLOT + 0x60).print_al();
    let code = set_status(code, 0).power_off();
    // NEEDS_RESET with a configuration interrupt; a reset clears it.
    assert_eq!(run_with(&code, vec![rng("rng")]), ["0b", "4f", "02", "00"]);
}

#[test]
fn request_when_the_queue_is_kicked_is_answered() {
    // One writable descriptor of 8 bytes at 0x43000, available at once.
    let descriptor = Code::default()
        .store32(0x4_0000, 0x4_3000)
        .store32(0x4_0004, 0)
        .store32(0x4_0008, 8)
        .store32(0x4_000c, 2)
        .store32(0x4_1004, 0);
    let code = Code::default().raw(&negotiated().0).raw(&descriptor.0);
    let code = set_status(queue(code, 0x4_0000), 15)
        .store32(0x4_1000, 1 << 16)
        .store32(SLOT + 0x50, 0);
    // 1: mov eax, [used]; shr eax, 16; jz 1b
    let poll = Code::default().load32(0x4_2000).raw(&[0xc1, 0xe8, 16]);
    let back = -(poll.0.len() as i8 + 2);
    let code = code.raw(&poll.0).raw(&[0x74, back as u8]).print_al();
    let code = code
        .load32(0x4_2008)
        .print_al()
        .load32(SLOT + 0x60)
        .print_al()
        .power_off();
    assert_eq!(run_with(&code, vec![rng("rng")]), ["0b", "0f", "01", "08", "01"]);
}

#[test]
fn add_device_when_running_fills_a_slot_and_raises_the_event() {
    let scratch = Scratch::new();
    // Waits for the event, then prints presence, device id and the event register again.
    let poll = Code::default().in8(0x610).raw(&[0x84, 0xc0]);
    let back = -(poll.0.len() as i8 + 2);
    let code = Code::default()
        .map_devices()
        .load32(PRESENCE)
        .print_al()
        .load32(SLOT + 8)
        .print_al();
    let code = code
        .raw(&poll.0)
        .raw(&[0x74, back as u8])
        .print_al()
        .in8(0x610)
        .print_al();
    let code = code
        .load32(PRESENCE)
        .print_al()
        .load32(SLOT + 8)
        .print_al()
        .power_off();
    let mut config = config(&scratch, &code);
    config.hotplug_slots = 1;
    let disk = scratch.write("disk", &[0; 4096]);
    let block = |id: &str| {
        DeviceConfig::Block(BlockConfig {
            read_only: true,
            ..BlockConfig::new(id, &disk)
        })
    };
    let vm = Vm::new(config).unwrap();
    vm.start().unwrap();
    wait_for(&vm, "00\n00");

    let info = vm.add_device(block("hot")).unwrap();

    assert_eq!(
        info.address,
        DeviceAddress::Mmio {
            start: SLOT,
            size: 0x1000,
            gsi: 6,
            acpi_name: "LNRO0005:00".to_owned(),
        }
    );
    assert!(!info.needs_bind);
    assert_eq!(vm.wait_timeout(LONG), Some(ExitReason::PowerOff));
    assert_eq!(vm.console().tail(10), ["00", "00", "01", "00", "01", "02"]);
    assert!(matches!(
        vm.add_device(block("late")),
        Err(HotplugError::State {
            state: VmState::Stopped(_),
            ..
        })
    ));
}

#[test]
fn devices_when_added_and_removed_keep_the_books() {
    let scratch = Scratch::new();
    let mut config = config_with(&scratch, &Code::default().spin(), vec![rng("first")]);
    config.hotplug_slots = 2;
    let vm = Vm::new(config).unwrap();
    vm.start().unwrap();
    assert!(matches!(vm.add_device(rng("first")), Err(HotplugError::Exists(id)) if id == "first"));
    assert!(matches!(vm.remove_device("other"), Err(HotplugError::NotFound(id)) if id == "other"));
    let second = vm.add_device(rng("second")).unwrap();
    assert_eq!(vm.remove_device("second").unwrap().address, second.address);
    // A fresh slot is preferred to one that needs a bind.
    let third = vm.add_device(rng("third")).unwrap();
    assert_ne!(third.address, second.address);
    let fourth = vm.add_device(rng("fourth")).unwrap();
    assert_eq!((fourth.address, fourth.needs_bind), (second.address, true));
    assert!(matches!(
        vm.add_device(rng("fifth")),
        Err(HotplugError::NoFreeSlot { slots: 3, .. })
    ));
    let devices: Vec<_> = vm.metrics().devices.into_iter().map(|d| d.id).collect();
    assert_eq!(devices, ["first", "fourth", "third"]);
    vm.stop().unwrap();
}

#[test]
fn remove_device_when_the_driver_is_bound_is_refused() {
    let scratch = Scratch::new();
    let code = set_status(queue(negotiated(), 0x4_0000), 15)
        .print("bound\n")
        .spin();
    let vm = Vm::new(config_with(&scratch, &code, vec![rng("busy")])).unwrap();
    vm.start().unwrap();
    wait_for(&vm, "bound");
    assert!(matches!(vm.remove_device("busy"), Err(HotplugError::InUse(id)) if id == "busy"));
    assert!(vm.metrics().devices.iter().any(|d| d.active));
    vm.stop().unwrap();
}
