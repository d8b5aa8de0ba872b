//! A directory that ends with the input it was made for.

use std::path::Path;

use vmm_sys_util::tempdir::TempDir;

/// On tmpfs where there is one: a fuzzer makes thousands per second.
pub(super) fn scratch() -> TempDir {
    let shared_memory = Path::new("/dev/shm");
    let parent = match shared_memory.is_dir() {
        true => shared_memory.to_owned(),
        false => std::env::temp_dir(),
    };
    TempDir::new_with_prefix(parent.join("dragonball-fuzz")).unwrap()
}
