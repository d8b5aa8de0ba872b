//! ELF kernels: the loadable segments and the entry point, read with every bound checked.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{BootError, EntryPoint, KernelFault};
use crate::memory::layout;

const MAGIC: [u8; 4] = *b"\x7fELF";
const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// XEN_ELFNOTE_PHYS32_ENTRY: the PVH entry point (Xen public/elfnote.h).
const PVH_NOTE: u32 = 18;
/// A kernel has a handful of program headers; more is not a kernel.
const MAX_PROGRAM_HEADERS: u16 = 64;
const MAX_NOTES: u64 = 64 << 10;

/// A range of the file that belongs at a guest physical address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest physical address.
    pub address: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Bytes in the file, not 0.
    pub size: u64,
}

/// An ELF kernel ready to be loaded.
#[derive(Debug)]
pub struct Image {
    /// The open file.
    pub file: File,
    /// What to load.
    pub segments: Vec<Segment>,
    /// Where to start.
    pub entry: EntryPoint,
    /// First address after the last segment, zero-initialised memory included.
    pub end: u64,
}

struct ProgramHeader {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
    align: u64,
}

/// Whether the file starts like an ELF file.
pub fn is_elf(file: &File) -> bool {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0).is_ok() && magic == MAGIC
}

impl Image {
    /// Reads the headers of `file`, which is `file_size` bytes long and called `path` in errors.
    ///
    /// # Errors
    /// [`BootError::Truncated`] or [`BootError::Malformed`].
    pub fn open(path: &Path, file: File, file_size: u64) -> Result<Self, BootError> {
        let reader = Reader {
            path: path.to_owned(),
            file: &file,
            size: file_size,
        };
        let header = reader.bytes::<64>(0, "ELF header")?;
        let wide = match (header[4], header[5], u16_at(&header, 18)) {
            (CLASS_64, LITTLE_ENDIAN, MACHINE_X86_64) => true,
            (CLASS_32, LITTLE_ENDIAN, MACHINE_386) => false,
            (class, data, machine) => {
                return Err(reader.malformed(KernelFault::OtherMachine { class, data, machine }));
            }
        };
        let headers = reader.program_headers(&header, wide)?;
        let mut segments = Vec::new();
        let mut end = 0;
        for load in headers.iter().filter(|h| h.kind == PT_LOAD && h.memory_size > 0) {
            end = end.max(reader.check_load(load)?);
            if load.file_size > 0 {
                segments.push(Segment {
                    address: load.address,
                    offset: load.offset,
                    size: load.file_size,
                });
            }
        }
        if segments.is_empty() {
            return Err(reader.malformed(KernelFault::NoSegments));
        }
        let elf_entry = if wide {
            u64_at(&header, 24)
        } else {
            u64::from(u32_at(&header, 24))
        };
        let in_segment = |address: u64| {
            segments
                .iter()
                .any(|s| address >= s.address && address - s.address < s.size)
        };
        let entry = if wide && in_segment(elf_entry) {
            EntryPoint::Linux64(elf_entry)
        } else {
            let pvh = reader
                .pvh_entry(&headers)?
                .filter(|entry| in_segment(u64::from(*entry)));
            EntryPoint::Pvh(pvh.ok_or_else(|| reader.malformed(KernelFault::NoEntry(elf_entry)))?)
        };
        Ok(Self {
            file,
            segments,
            entry,
            end,
        })
    }
}

struct Reader<'a> {
    path: PathBuf,
    file: &'a File,
    size: u64,
}

impl Reader<'_> {
    fn malformed(&self, problem: KernelFault) -> BootError {
        BootError::Malformed {
            path: self.path.clone(),
            problem,
        }
    }

    fn check_end(&self, offset: u64, size: u64, what: &'static str) -> Result<(), BootError> {
        let needed = offset.saturating_add(size);
        if needed > self.size {
            return Err(BootError::Truncated {
                path: self.path.clone(),
                what,
                needed,
                size: self.size,
            });
        }
        Ok(())
    }

    fn read(&self, offset: u64, buffer: &mut [u8], what: &'static str) -> Result<(), BootError> {
        self.check_end(offset, buffer.len() as u64, what)?;
        self.file
            .read_exact_at(buffer, offset)
            .map_err(|source| BootError::File {
                what: "kernel",
                path: self.path.clone(),
                source,
            })
    }

    fn bytes<const N: usize>(&self, offset: u64, what: &'static str) -> Result<[u8; N], BootError> {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes, what)?;
        Ok(bytes)
    }

    fn program_headers(&self, header: &[u8; 64], wide: bool) -> Result<Vec<ProgramHeader>, BootError> {
        let (table, entry_size, count) = if wide {
            (u64_at(header, 32), u16_at(header, 54), u16_at(header, 56))
        } else {
            (
                u64::from(u32_at(header, 28)),
                u16_at(header, 42),
                u16_at(header, 44),
            )
        };
        let expected = if wide { 56 } else { 32 };
        if entry_size != expected || count > MAX_PROGRAM_HEADERS {
            return Err(self.malformed(KernelFault::ProgramHeaders {
                count,
                size: entry_size,
            }));
        }
        let mut headers = Vec::new();
        for index in 0..u64::from(count) {
            let offset = table.saturating_add(index * u64::from(entry_size));
            headers.push(if wide {
                let h = self.bytes::<56>(offset, "program headers")?;
                ProgramHeader {
                    kind: u32_at(&h, 0),
                    offset: u64_at(&h, 8),
                    address: u64_at(&h, 24),
                    file_size: u64_at(&h, 32),
                    memory_size: u64_at(&h, 40),
                    align: u64_at(&h, 48),
                }
            } else {
                let h = self.bytes::<32>(offset, "program headers")?;
                let field = |at| u64::from(u32_at(&h, at));
                ProgramHeader {
                    kind: u32_at(&h, 0),
                    offset: field(4),
                    address: field(12),
                    file_size: field(16),
                    memory_size: field(20),
                    align: field(28),
                }
            });
        }
        Ok(headers)
    }

    /// Checks one PT_LOAD; returns the first address after it.
    fn check_load(&self, load: &ProgramHeader) -> Result<u64, BootError> {
        self.check_end(load.offset, load.file_size, "a segment")?;
        let end = load.address.saturating_add(load.memory_size);
        if load.file_size > load.memory_size
            || load.address < layout::HIGH_RAM_START
            || end > layout::RAM_LOW_MAX
        {
            return Err(self.malformed(KernelFault::Segment {
                start: load.address,
                end,
            }));
        }
        Ok(end)
    }

    /// The entry point in a Xen PVH note, if there is one.
    fn pvh_entry(&self, headers: &[ProgramHeader]) -> Result<Option<u32>, BootError> {
        for header in headers
            .iter()
            .filter(|h| h.kind == PT_NOTE && h.file_size <= MAX_NOTES)
        {
            let mut notes = vec![0; header.file_size as usize];
            self.read(header.offset, &mut notes, "notes")?;
            // Linux's notes are 4-byte aligned; toolchains that add .note.gnu.property make it 8.
            let align = if header.align == 8 { 8 } else { 4 };
            if let Some(entry) = find_pvh_note(&notes, align) {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }
}

fn find_pvh_note(mut notes: &[u8], align: usize) -> Option<u32> {
    while let Some(header) = notes.get(..12) {
        let name_size = usize::try_from(u32_at(header, 0)).ok()?;
        let value_size = usize::try_from(u32_at(header, 4)).ok()?;
        let kind = u32_at(header, 8);
        let name = notes.get(12..12usize.checked_add(name_size)?)?;
        let value_start = 12usize.checked_add(name_size)?.checked_next_multiple_of(align)?;
        let value_end = value_start.checked_add(value_size)?;
        let value = notes.get(value_start..value_end)?;
        if kind == PVH_NOTE && name == b"Xen\0" {
            return Some(u32_at(value.get(..4)?, 0));
        }
        notes = notes.get(value_end.checked_next_multiple_of(align)?..)?;
    }
    None
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    array_at(bytes, at).map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    array_at(bytes, at).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    array_at(bytes, at).map_or(0, u64::from_le_bytes)
}

/// Callers pass constant offsets into buffers of constant size; beyond them reads as zero.
fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}
