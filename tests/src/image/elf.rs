//! Programs of some instructions, as ELF files.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// Where the file is mapped.
const BASE: u64 = 0x40_0000;
/// Size of the ELF header and the one program header.
const HEADERS: u64 = 64 + 56;

/// ELF-64, executable, x86-64: one loaded segment that is the whole file, read-only. It starts with the first byte of `code`.
pub fn program(code: &[u8]) -> Vec<u8> {
    let size = HEADERS + code.len() as u64;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |file: &mut Vec<u8>, values: &[u16]| {
        file.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    };
    // Type, machine; version; entry, program headers, section headers; flags; sizes and counts.
    half(&mut file, &[2, 62, 1, 0]);
    file.extend(
        [BASE + HEADERS, 64, 0]
            .iter()
            .flat_map(|value| value.to_le_bytes()),
    );
    half(&mut file, &[0, 0, 64, 56, 1, 0, 0, 0]);
    // PT_LOAD, readable and executable; offset, addresses, sizes, alignment.
    half(&mut file, &[1, 0, 5, 0]);
    file.extend(
        [0, BASE, BASE, size, size, 0x1000]
            .iter()
            .flat_map(|value| value.to_le_bytes()),
    );
    file.extend(code);
    file
}

/// Writes a program that can be executed at once: the file was never open for writing in this process. What another thread
/// forks meanwhile would hold it open, and such a file cannot be executed.
///
/// # Errors
/// The file cannot be written.
pub fn write(path: &Path, code: &[u8]) -> io::Result<()> {
    let written = path.with_extension("written");
    fs::write(&written, program(code))?;
    fs::set_permissions(&written, fs::Permissions::from_mode(0o755))?;
    let copied = Command::new("cp").arg("-p").args([&written, path]).status()?;
    fs::remove_file(&written)?;
    match copied.success() {
        true => Ok(()),
        false => Err(io::Error::other(format!("cp: {copied}"))),
    }
}
