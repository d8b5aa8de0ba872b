use super::*;
use crate::memory::allocate;
use crate::memory::layout::MemoryLayout;

/// An ELF64 header, a PT_LOAD of `code` at 1 MiB and a PT_NOTE of `note`.
fn elf(entry: u64, code: &[u8], note: &[u8]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64, 0);
    file[18] = 62;
    file[24..32].copy_from_slice(&entry.to_le_bytes());
    file[32] = 64;
    file[54] = 56;
    file[56] = 2;
    let code_size = code.len() as u64;
    for (kind, offset, address, size, memory_size) in [
        (1u64, 0x1000, 0x10_0000, code_size, code_size + 64),
        (4, 0xb0, 0, note.len() as u64, 0),
    ] {
        for word in [kind, offset, address, address, size, memory_size, 4] {
            file.extend_from_slice(&word.to_le_bytes());
        }
    }
    assert_eq!(file.len(), 0xb0);
    file.extend_from_slice(note);
    file.resize(0x1000, 0);
    file.extend_from_slice(code);
    file
}

fn pvh_note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    // A note of another kind first: name "GNU", 5 bytes of value, padded.
    for word in [4u32, 5, 3] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"GNU\0abcde\0\0\0");
    for word in [4u32, 4, 18] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"Xen\0");
    note.extend_from_slice(&entry.to_le_bytes());
    note
}

struct Kernel(PathBuf);

impl Kernel {
    fn new(name: &str, content: &[u8]) -> Self {
        let path = std::env::temp_dir().join(format!("dragonball-boot-{name}-{}", std::process::id()));
        std::fs::write(&path, content).unwrap();
        Self(path)
    }

    fn load(&self, initramfs: Option<&Self>) -> (GuestMemory, Result<EntryPoint, BootError>) {
        let memory = allocate(&MemoryLayout::ram(64 << 20)).unwrap();
        let config = BootConfig {
            kernel: self.0.clone(),
            initramfs: initramfs.map(|file| file.0.clone()),
            cmdline: "a=b".to_owned(),
            cache_dir: std::env::temp_dir(),
        };
        let entry = load(&config, &memory, 64 << 20, 0xe_0000);
        (memory, entry)
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn read<const N: usize>(memory: &GuestMemory, address: u64) -> [u8; N] {
    let mut bytes = [0; N];
    memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

#[test]
fn load_when_linux_puts_everything_where_the_protocol_says() {
    let code: Vec<u8> = (0..0x1234u32).map(|i| i as u8).collect();
    let kernel = Kernel::new("linux", &elf(0x10_0000, &code, &[]));
    let initramfs = Kernel::new("initramfs", &[7; 0x1801]);

    let (memory, entry) = kernel.load(Some(&initramfs));

    assert_eq!(entry.unwrap(), EntryPoint::Linux64(0x10_0000));
    assert_eq!(read::<0x1234>(&memory, 0x10_0000).as_slice(), code);
    // The rest of the last page belongs to the zero-initialised part.
    assert_eq!(read::<64>(&memory, 0x10_1234), [0; 64]);
    assert_eq!(&read::<4>(&memory, layout::CMDLINE), b"a=b\0");
    assert_eq!(&read::<4>(&memory, layout::ZERO_PAGE + 0x202), b"HdrS");
    let address = u32::from_le_bytes(read(&memory, layout::ZERO_PAGE + 0x218));
    assert_eq!(
        u32::from_le_bytes(read(&memory, layout::ZERO_PAGE + 0x21c)),
        0x1801
    );
    assert_eq!(read::<0x1802>(&memory, address.into())[0x17ff..], [7, 7, 0]);
    assert_eq!(
        u64::from_le_bytes(read(&memory, layout::ZERO_PAGE + 0x70)),
        0xe_0000
    );
}

#[test]
fn load_when_there_is_only_a_pvh_note_uses_it() {
    let kernel = Kernel::new("pvh", &elf(0, &[0x90; 32], &pvh_note(0x10_0010)));
    let (memory, entry) = kernel.load(None);
    assert_eq!(entry.unwrap(), EntryPoint::Pvh(0x10_0010));
    assert_eq!(
        u32::from_le_bytes(read(&memory, layout::PVH_START_INFO)),
        0x336e_c578
    );
    assert_eq!(
        u64::from_le_bytes(read(&memory, layout::PVH_START_INFO + 32)),
        0xe_0000
    );
}

#[test]
fn load_when_the_entry_is_nowhere_is_refused() {
    for note in [pvh_note(0x20_0000), Vec::new(), vec![0xff; 40]] {
        let kernel = Kernel::new("nowhere", &elf(0, &[0x90; 32], &note));
        assert!(matches!(kernel.load(None).1, Err(BootError::Malformed { .. })));
    }
}

#[test]
fn load_when_a_header_field_is_wrong_never_panics() {
    let good = elf(0x10_0000, &[0x90; 32], &pvh_note(0x10_0010));
    for offset in 4..0xd8 {
        for value in [0, 1, 0x7f, 0xff] {
            let mut bad = good.clone();
            bad[offset] = value;
            let kernel = Kernel::new("fuzz", &bad);
            // Only that it returns matters.
            let _ = kernel.load(None);
        }
    }
}
