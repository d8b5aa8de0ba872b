//! What finding a difference costs while a machine is paused, by comparing all memory with the base and by the log of writes;
//! and what the log costs the machine. Memory without a machine, all of it in use; needs no KVM.
//!
//! `cargo bench -p dragonball --bench difference [-- FOLDER]`: the files go to FOLDER (default /dev/shm).

// All of it is a benchmark; clippy.toml knows functions with an attribute for that only.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dragonball::memory::image::{self, Pages};
use dragonball::memory::layout::MemoryLayout;
use dragonball::memory::page_set::PageSet;
use dragonball::memory::write_log::{Beneath, WriteLog};
use dragonball::memory::{GuestMemory, allocate};
use vm_memory::{Bytes, GuestAddress};

const PAGE: u64 = 4096;

fn timed<T>(operation: impl FnOnce() -> T) -> (T, Duration) {
    let started = Instant::now();
    let result = operation();
    (result, started.elapsed())
}

/// A file that goes with the process.
fn file(folder: &Path) -> File {
    let path = folder.join(format!("dragonball-difference-{}", std::process::id()));
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

/// Writes `mib` MiB: single pages, as far from each other as they can be.
fn dirty(memory: &GuestMemory, layout: &MemoryLayout, mib: u64, value: u64) {
    let total = image::file_size(layout) / PAGE;
    let count = mib << 20 >> PAGE.trailing_zeros();
    for n in 0..count {
        let mut address = n * total / count * PAGE;
        for region in layout.regions() {
            if address < region.size {
                address += region.start;
                break;
            }
            address -= region.size;
        }
        memory.write_obj(value, GuestAddress(address)).unwrap();
    }
}

/// Memory without a zero page.
fn full(layout: &MemoryLayout) -> Arc<GuestMemory> {
    let memory = Arc::new(allocate(layout).unwrap());
    let content = vec![7; 1 << 20];
    for region in layout.regions() {
        for offset in (0..region.size).step_by(content.len()) {
            let address = GuestAddress(region.start + offset);
            memory.write_slice(&content, address).unwrap();
        }
    }
    memory
}

fn measure(folder: &Path, size_mib: u64, changes: &[u64]) {
    let layout = MemoryLayout::ram(size_mib << 20);
    let base = file(folder);
    let save = |memory: &GuestMemory| image::write(memory, &layout, None, Pages::All, &base).unwrap();
    let (_, time) = timed(|| save(&full(&layout)));
    println!("{size_mib} MiB: filling the memory and a full save {time:?}");
    for changed in changes {
        let memory = full(&layout);
        let writes = |value| timed(|| dirty(&memory, &layout, *changed, value)).1;
        let difference = |among: Option<&PageSet>| {
            let base = &base;
            let pages = Pages::Changed { base, among };
            image::write(&memory, &layout, None, pages, &file(folder)).unwrap()
        };
        let mut log = WriteLog::new(&memory, &layout, Beneath::Zeros).unwrap();
        let before = writes(1);
        let (_, start) = timed(|| log.restart([1; 16]).unwrap());
        let with_log = writes(2);
        // So that the first that is measured does not wait for the host's own pages.
        difference(None);
        let (by_log, log_time) = timed(|| difference(Some(&log.written_since([1; 16]).unwrap())));
        let (compared, comparing_time) = timed(|| difference(None));
        let (_, restart) = timed(|| log.restart([2; 16]).unwrap());
        let again = writes(3);
        println!(
            "  {changed} MiB changed: comparing {comparing_time:?} ({} pages), by the log {log_time:?} ({} pages); \
             start {start:?}, restart {restart:?}; the writes {before:?}, with the log {with_log:?}, once more {again:?}",
            compared.pages_read, by_log.pages_read
        );
    }
}

fn main() {
    // Cargo passes --bench.
    let folder = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with("--"));
    let folder = PathBuf::from(folder.unwrap_or_else(|| "/dev/shm".to_owned()));
    measure(&folder, 512, &[0, 1, 16, 128]);
    measure(&folder, 4096, &[0, 1, 16, 128, 1024]);
}
