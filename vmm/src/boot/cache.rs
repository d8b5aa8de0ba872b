//! The cache of kernels taken out of bzImages: `<cache>/vmlinux/<sha256 of the bzImage>`.
//!
//! Hashing a bzImage takes longer than booting from the cache, so `<cache>/by-file/` remembers the hash of a file by
//! device, inode, size and change times (what git uses to tell an unchanged file). Everything is written beside its
//! place and renamed, so concurrent boots see whole files or none.

use std::fs::{self, DirBuilder, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use super::BootError;
use super::bzimage::Header;
use crate::interrupted;

/// Opens the ELF kernel inside the bzImage `file`, extracting it first if the cache has none.
///
/// # Errors
/// [`BootError::Cache`] when the cache cannot be used, or what [`Header::decompress`] returns.
pub fn extracted(
    cache: &Path,
    path: &Path,
    file: &File,
    header: &Header,
) -> Result<(PathBuf, File), BootError> {
    let read_error = |source| BootError::File {
        what: "kernel",
        path: path.to_owned(),
        source,
    };
    let metadata = file.metadata().map_err(read_error)?;
    let pointer = cache.join("by-file").join(file_key(&metadata));
    if let Some(hash) = remembered_hash(&pointer) {
        let place = cache.join("vmlinux").join(hash);
        if let Ok(kernel) = File::open(&place) {
            return Ok((place, kernel));
        }
    }
    let hash = content_hash(file).map_err(read_error)?;
    let place = cache.join("vmlinux").join(&hash);
    if !place.exists() {
        write_atomically(&place, &header.decompress(path, file)?)?;
    }
    write_atomically(&pointer, hash.as_bytes())?;
    let kernel = File::open(&place).map_err(|source| BootError::Cache {
        path: place.clone(),
        source,
    })?;
    Ok((place, kernel))
}

fn file_key(metadata: &Metadata) -> String {
    format!(
        "{:x}-{:x}-{:x}-{:x}.{:x}-{:x}.{:x}",
        metadata.dev(),
        metadata.ino(),
        metadata.size(),
        metadata.mtime(),
        metadata.mtime_nsec(),
        metadata.ctime(),
        metadata.ctime_nsec()
    )
}

fn remembered_hash(pointer: &Path) -> Option<String> {
    let mut hash = String::new();
    File::open(pointer)
        .ok()?
        .take(65)
        .read_to_string(&mut hash)
        .ok()?;
    (hash.len() == 64 && hash.bytes().all(|b| b.is_ascii_hexdigit())).then_some(hash)
}

fn content_hash(mut file: &File) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match interrupted::again(|| file.read(&mut buffer))? {
            0 => break,
            read => hasher.update(buffer.get(..read).unwrap_or_default()),
        }
    }
    Ok(hasher
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

fn write_atomically(place: &Path, content: &[u8]) -> Result<(), BootError> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let error = |source| BootError::Cache {
        path: place.to_owned(),
        source,
    };
    let folder = place.parent().unwrap_or(Path::new("."));
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(folder)
        .map_err(error)?;
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    let temporary = folder.join(format!(".{}-{number}.tmp", std::process::id()));
    let written = File::options()
        .write(true)
        .create_new(true)
        .open(&temporary)
        .and_then(|mut file| file.write_all(content))
        .and_then(|()| fs::rename(&temporary, place));
    if written.is_err() {
        // Whatever was written of it is of no use; the first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_atomically_when_the_folder_is_new_creates_it_and_leaves_no_temporary() {
        let folder = std::env::temp_dir().join(format!("dragonball-cache-{}", std::process::id()));
        let place = folder.join("a/b");
        write_atomically(&place, b"x").unwrap();
        write_atomically(&place, b"y").unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"y");
        assert_eq!(fs::read_dir(folder.join("a")).unwrap().count(), 1);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn remembered_hash_when_not_a_hash_is_ignored() {
        let path = std::env::temp_dir().join(format!("dragonball-pointer-{}", std::process::id()));
        fs::write(&path, "../../etc/passwd").unwrap();
        assert_eq!(remembered_hash(&path), None);
        fs::write(&path, "0".repeat(64)).unwrap();
        assert_eq!(remembered_hash(&path), Some("0".repeat(64)));
        fs::remove_file(path).unwrap();
    }
}
