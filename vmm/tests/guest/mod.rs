//! A guest of a few hundred bytes: hand-assembled code wrapped in an ELF file and booted like any kernel.

#![allow(dead_code, reason = "each test binary uses its own part")]

pub mod hanging;
pub mod initramfs;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use dragonball::Vm;
use dragonball::config::{
    BootConfig, Confinement, ConsoleConfig, CpuConfig, DeviceConfig, MemoryConfig, VcpuConfig, VmConfig,
};
use dragonball::vm::ExitReason;

/// Where the guest's code is loaded and starts.
pub const LOAD: u64 = 0x10_0000;
/// Far beyond what any test needs; only reached when something is broken.
pub const LONG: Duration = Duration::from_secs(120);

/// Bytes of x86-64 code, appended instruction by instruction.
#[derive(Debug, Default, Clone)]
pub struct Code(pub Vec<u8>);

impl Code {
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// mov dx, port; mov al, value; out dx, al
    pub fn out8(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.raw(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    /// mov dx, port; in al, dx
    pub fn in8(self, port: u16) -> Self {
        let [low, high] = port.to_le_bytes();
        self.raw(&[0x66, 0xba, low, high, 0xec])
    }

    /// Prints text on COM1.
    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out8(0x3f8, byte))
    }

    /// mov dword [address], value (through rdi)
    pub fn store32(self, address: u64, value: u32) -> Self {
        // mov rdi, imm64; mov dword [rdi], imm32
        self.raw(&[0x48, 0xbf])
            .raw(&address.to_le_bytes())
            .raw(&[0xc7, 0x07])
            .raw(&value.to_le_bytes())
    }

    /// Maps the 2 MiB pages at 0xd000_0000 and 0xfee0_0000, which the boot page tables leave out, with a page directory at
    /// 0x3_0000.
    pub fn map_devices(self) -> Self {
        let page_directory_pointer = 0xa000;
        self.store32(0x3_0000 + (0xd000_0000 >> 21 & 511) * 8, 0xd000_0083)
            .store32(0x3_0000 + (0xfee0_0000 >> 21 & 511) * 8, 0xfee0_0083)
            .store32(page_directory_pointer + 3 * 8, 0x3_0003)
    }

    /// mov eax, [address] (through rdi)
    pub fn load32(self, address: u64) -> Self {
        self.raw(&[0x48, 0xbf])
            .raw(&address.to_le_bytes())
            .raw(&[0x8b, 0x07])
    }

    /// Prints the lowest byte of eax as two hexadecimal digits and a newline.
    pub fn print_al(mut self) -> Self {
        // mov bl, al
        self = self.raw(&[0x88, 0xc3]);
        for shift in [4u8, 0] {
            // mov al, bl; shr al, shift; and al, 15; cmp al, 10; sbb al, 0x69; das is gone in 64-bit: use add/cmp.
            self = self.raw(&[0x88, 0xd8, 0xc0, 0xe8, shift, 0x24, 0x0f, 0x04, b'0']);
            // cmp al, '9'; jbe +2; add al, 'a' - '9' - 1
            self = self.raw(&[0x3c, b'9', 0x76, 0x02, 0x04, b'a' - b'9' - 1]);
            // mov dx, 0x3f8; out dx, al
            self = self.raw(&[0x66, 0xba, 0xf8, 0x03, 0xee]);
        }
        self.print("\n")
    }

    /// Ends the machine through the sleep control register.
    pub fn power_off(self) -> Self {
        self.out8(0x600, 5 << 2 | 1 << 5).halt()
    }

    /// cli; 1: hlt; jmp 1b
    pub fn halt(self) -> Self {
        self.raw(&[0xfa, 0xf4, 0xeb, 0xfd])
    }

    /// 1: jmp 1b
    pub fn spin(self) -> Self {
        self.raw(&[0xeb, 0xfe])
    }
}

/// An ELF64 file with one segment holding `code`, entered at its beginning.
pub fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    file.extend_from_slice(b"\x7fELF\x02\x01\x01");
    file.resize(16, 0);
    file.extend_from_slice(&2u16.to_le_bytes());
    file.extend_from_slice(&62u16.to_le_bytes());
    file.extend_from_slice(&1u32.to_le_bytes());
    file.extend_from_slice(&LOAD.to_le_bytes());
    file.extend_from_slice(&64u64.to_le_bytes());
    file.extend_from_slice(&0u64.to_le_bytes());
    file.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    file.extend_from_slice(&1u32.to_le_bytes());
    file.extend_from_slice(&7u32.to_le_bytes());
    for word in [
        0x1000,
        LOAD,
        LOAD,
        code.len() as u64,
        code.len() as u64 + 0x1000,
        0x1000,
    ] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.resize(0x1000, 0);
    file.extend_from_slice(code);
    file
}

/// A folder of its own, removed at the end.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("dragonball-kvm-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A machine with a serial console that runs `code`.
pub fn config(scratch: &Scratch, code: &Code) -> VmConfig {
    VmConfig {
        id: "tiny".to_owned(),
        vcpus: VcpuConfig { boot: 1, max: 1 },
        cpu: CpuConfig::default(),
        memory: MemoryConfig::fixed(64),
        boot: BootConfig {
            kernel: scratch.write("kernel", &elf(&code.0)),
            initramfs: None,
            cmdline: String::new(),
            cache_dir: scratch.path().join("cache"),
        },
        console: ConsoleConfig::Serial,
        vsock: None,
        devices: Vec::new(),
        hotplug_slots: 0,
        confinement: Confinement::default(),
    }
}

/// The same with devices.
pub fn config_with(scratch: &Scratch, code: &Code, devices: Vec<DeviceConfig>) -> VmConfig {
    VmConfig {
        devices,
        ..config(scratch, code)
    }
}

/// Runs `code` to its end.
pub fn run(code: &Code) -> (ExitReason, Vec<String>) {
    let scratch = Scratch::new();
    let vm = Vm::new(config(&scratch, code)).unwrap();
    vm.start().unwrap();
    let reason = vm.wait_timeout(LONG).expect("the guest ends by itself");
    (reason, vm.console().tail(100))
}

/// Waits until the console shows `text`.
pub fn wait_for(vm: &Vm, text: &str) {
    let end = std::time::Instant::now() + LONG;
    while !vm.console().tail(1000).join("\n").contains(text) {
        assert!(
            std::time::Instant::now() < end,
            "no {text:?} in {:?}",
            vm.console().tail(20)
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}
