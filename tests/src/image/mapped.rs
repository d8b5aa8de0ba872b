//! A program that writes to a file through memory only: it maps the new file `out` of its working folder, closes it, puts an `x`
//! at the beginning of each page, and ends.

use std::io;
use std::path::Path;

use super::elf;

/// Bytes of the file.
pub const SIZE: u32 = 32 << 20;
/// Bytes of a page.
pub const PAGE: usize = 4096;

/// x86-64. Nothing is checked: without the mapping the program dies of SIGSEGV.
fn code() -> Vec<u8> {
    let size = SIZE.to_le_bytes();
    let parts: [&[u8]; 15] = [
        &[0xb8, 2, 0, 0, 0],                    // mov eax, SYS_open
        &[0x48, 0x8d, 0x3d, 106, 0, 0, 0],      // lea rdi, [rip + 106]: the name
        &[0xbe, 0x42, 0x02, 0, 0],              // mov esi, O_RDWR | O_CREAT | O_TRUNC
        &[0xba, 0xa4, 0x01, 0, 0],              // mov edx, 0644
        &[0x0f, 0x05, 0x89, 0xc3],              // syscall; mov ebx, eax
        &[0xb8, 77, 0, 0, 0, 0x89, 0xdf, 0xbe], // mov eax, SYS_ftruncate; mov edi, ebx; mov esi, size
        &size,
        &[0x0f, 0x05, 0xb8, 9, 0, 0, 0, 0x31, 0xff, 0xbe], // syscall; mov eax, SYS_mmap; xor edi, edi; mov esi, size
        &size,
        // mov edx, PROT_READ | PROT_WRITE; mov r10d, MAP_SHARED; mov r8d, ebx; xor r9d, r9d; syscall; mov r12, rax
        &[
            0xba, 3, 0, 0, 0, 0x41, 0xba, 1, 0, 0, 0, 0x41, 0x89, 0xd8, 0x45, 0x31, 0xc9, 0x0f, 0x05, 0x49,
            0x89, 0xc4,
        ],
        // mov eax, SYS_close; mov edi, ebx; syscall; mov rdi, r12; mov ecx, size
        &[0xb8, 3, 0, 0, 0, 0x89, 0xdf, 0x0f, 0x05, 0x4c, 0x89, 0xe7, 0xb9],
        &size,
        // 1: mov byte [rdi], 'x'; add rdi, 4096; sub ecx, 4096; jnz 1
        &[
            0xc6, 0x07, b'x', 0x48, 0x81, 0xc7, 0, 0x10, 0, 0, 0x81, 0xe9, 0, 0x10, 0, 0, 0x75, 0xee,
        ],
        &[0xb8, 231, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05], // mov eax, SYS_exit_group; xor edi, edi; syscall
        b"out\0",
    ];
    parts.concat()
}

/// Writes the program.
///
/// # Errors
/// The file cannot be written.
pub fn write(path: &Path) -> io::Result<()> {
    elf::write(path, &code())
}

/// How many pages of the file `out` it has written to have arrived there.
///
/// # Errors
/// The file cannot be read.
pub fn pages_in(path: &Path) -> io::Result<usize> {
    let bytes = std::fs::read(path)?;
    Ok(bytes
        .chunks(PAGE)
        .filter(|page| page.first() == Some(&b'x'))
        .count())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn program_when_run_writes_to_every_page() {
        let folder = std::env::temp_dir().join(format!("mapped-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        write(&folder.join("program")).unwrap();

        let status = Command::new("./program").current_dir(&folder).status().unwrap();

        assert!(status.success(), "{status}");
        assert_eq!(pages_in(&folder.join("out")).unwrap(), SIZE as usize / PAGE);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
