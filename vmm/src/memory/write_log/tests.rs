#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use io_uring::types::Fd;
use io_uring::{IoUring, opcode};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};
use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::confinement::Confinement;
use crate::memory::image::{Contents, Pages};
use crate::memory::pager::Pager;
use crate::memory::seal::{BLOCK, Seal};
use crate::memory::{allocate, discard};

const FIRST: [u8; 16] = [1; 16];
const SECOND: [u8; 16] = [2; 16];
/// The pages the tests use begin here, at a huge page.
const BEGIN: u64 = 16 << 20;

fn layout() -> MemoryLayout {
    MemoryLayout::with_windows(64 << 20, 128 << 20, 128 << 20)
}

fn address(page: u64) -> GuestAddress {
    GuestAddress(page * PAGE)
}

/// Number of the `n`th page of the tests.
fn page(n: u64) -> u64 {
    BEGIN / PAGE + n
}

fn anonymous() -> (Arc<GuestMemory>, WriteLog) {
    let memory = Arc::new(allocate(&layout()).unwrap());
    let log = WriteLog::new(&memory, &layout(), Beneath::Zeros).unwrap();
    (memory, log)
}

fn written(log: &WriteLog, id: [u8; 16]) -> Vec<u64> {
    log.written_since(id).unwrap().within(0..u64::MAX).collect()
}

#[test]
fn log_when_never_started_or_started_with_another_save_says_so() {
    let (_memory, mut log) = anonymous();
    assert!(matches!(log.written_since(FIRST), Err(WriteLogError::OtherSave)));
    log.restart(FIRST).unwrap();
    assert!(written(&log, FIRST).is_empty());
    assert!(matches!(log.written_since(SECOND), Err(WriteLogError::OtherSave)));
    log.restart(SECOND).unwrap();
    assert!(matches!(log.written_since(FIRST), Err(WriteLogError::OtherSave)));
}

#[test]
fn log_when_pages_are_written_has_exactly_those_even_of_huge_pages() {
    let (memory, mut log) = anonymous();
    // All of a huge page, if the host has one.
    memory
        .write_slice(&vec![7; 2 << 20], GuestAddress(BEGIN))
        .unwrap();
    log.restart(FIRST).unwrap();
    memory.read_obj::<u8>(address(page(5))).unwrap();
    assert!(written(&log, FIRST).is_empty());
    memory.write_obj(1u8, address(page(3))).unwrap();
    // By the kernel, for a system call.
    let file = TempFile::new().unwrap();
    file.as_file().set_len(PAGE).unwrap();
    let host = memory.get_host_address(address(page(9))).unwrap();
    // SAFETY: a page of the memory, which nobody else uses.
    let count = unsafe { libc::pread(file.as_file().as_raw_fd(), host.cast(), 100, 0) };
    assert_eq!(count, 100);
    // And for a ring, without the page cache where the file system can.
    let host = memory.get_host_address(address(page(11))).unwrap();
    read_by_ring(file.as_path(), host);
    let expected = [page(3), page(9), page(11)];
    assert_eq!(written(&log, FIRST), expected);
    // Asking changes nothing; restarting does.
    assert_eq!(written(&log, FIRST), expected);
    log.restart(SECOND).unwrap();
    assert!(written(&log, SECOND).is_empty());
    memory.write_obj(1u8, address(page(3))).unwrap();
    assert_eq!(written(&log, SECOND), [page(3)]);
}

#[test]
fn log_when_blocks_are_opened_and_sealed_goes_on() {
    let (memory, mut log) = anonymous();
    let layout = layout();
    let window = layout.window(RegionKind::Hotplug).unwrap();
    let host = memory.get_host_address(GuestAddress(window.start)).unwrap() as usize;
    let seal = Seal::new(&memory, host, window.size as usize).unwrap();
    let at = |block: u64| GuestAddress(window.start + block * BLOCK);
    // The blocks of pages, and how many pages of each; a block may be one huge page. The window follows the RAM in a file.
    let blocks = |pages: Vec<u64>| -> Vec<(u64, usize)> {
        let block = |page: &u64| (page * PAGE - (64 << 20)) / BLOCK;
        pages
            .chunk_by(|a, b| block(a) == block(b))
            .map(|run| (block(&run[0]), run.len()))
            .collect()
    };
    seal.open(0, 2 * BLOCK).unwrap();
    memory.write_obj(1u8, at(0)).unwrap();
    memory.write_obj(1u8, at(1)).unwrap();
    log.restart(FIRST).unwrap();
    assert!(written(&log, FIRST).is_empty());
    seal.open(2 * BLOCK, 2 * BLOCK).unwrap();
    memory.write_obj(1u8, at(1)).unwrap();
    memory.write_obj(1u8, at(3)).unwrap();
    seal.close(0, BLOCK).unwrap();
    // Block 0 was there and is not any more.
    let changed = blocks(written(&log, FIRST));
    assert_eq!(
        changed.iter().map(|(block, _)| *block).collect::<Vec<_>>(),
        [0, 1, 3]
    );
    assert_eq!(changed[1], (1, 1));
    log.restart(SECOND).unwrap();
    assert!(written(&log, SECOND).is_empty());
    seal.open(0, BLOCK).unwrap();
    memory.write_obj(1u8, at(0)).unwrap();
    assert_eq!(blocks(written(&log, SECOND))[0].0, 0);
}

/// Reads a page of the file to `to` by io_uring, as the block device does.
fn read_by_ring(path: &Path, to: *mut u8) {
    let mut options = File::options();
    options.read(true);
    let file = options
        .clone()
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .or_else(|_| options.open(path))
        .unwrap();
    let mut ring = IoUring::new(2).unwrap();
    let read = opcode::Read::new(Fd(file.as_raw_fd()), to, PAGE as u32).build();
    // SAFETY: file and page outlive the request, which is waited for.
    unsafe { ring.submission().push(&read).unwrap() };
    ring.submit_and_wait(1).unwrap();
    assert_eq!(ring.completion().next().unwrap().result(), PAGE as i32);
}

#[test]
fn log_when_pages_are_discarded_has_those_that_were_there() {
    let (memory, mut log) = anonymous();
    memory
        .write_slice(&vec![7; 4 << 20], GuestAddress(BEGIN))
        .unwrap();
    log.restart(FIRST).unwrap();
    let never_touched = 40 << 20;
    discard(&memory, never_touched, PAGE).unwrap();
    discard(&memory, page(1) * PAGE, 2 * PAGE).unwrap();
    discard(&memory, BEGIN + (2 << 20), 2 << 20).unwrap();
    // Read again, one of them: zeros are there now.
    assert_eq!(memory.read_obj::<u8>(address(page(2))).unwrap(), 0);
    let expected: Vec<u64> = [page(1), page(2)]
        .into_iter()
        .chain(page(512)..page(1024))
        .collect();
    assert_eq!(written(&log, FIRST), expected);
}

#[test]
fn log_when_pages_are_swapped_out_still_knows_what_was_written() {
    let (memory, mut log) = anonymous();
    memory
        .write_slice(&vec![7; 2 << 20], GuestAddress(BEGIN))
        .unwrap();
    log.restart(FIRST).unwrap();
    memory.write_obj(1u8, address(page(3))).unwrap();
    page_out(&memory);
    assert_eq!(written(&log, FIRST), [page(3)]);
    memory.read_obj::<u8>(address(page(4))).unwrap();
    memory.write_obj(1u8, address(page(5))).unwrap();
    assert_eq!(written(&log, FIRST), [page(3), page(5)]);
    page_out(&memory);
    log.restart(SECOND).unwrap();
    assert!(written(&log, SECOND).is_empty());
    memory.write_obj(1u8, address(page(6))).unwrap();
    assert_eq!(written(&log, SECOND), [page(6)]);
}

#[test]
fn log_when_memory_is_mapped_anew_says_so() {
    let (memory, mut log) = anonymous();
    log.restart(FIRST).unwrap();
    let host = memory.get_host_address(GuestAddress(BEGIN)).unwrap();
    // SAFETY: replaces a page of the memory, which nobody else uses.
    let mapped = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        libc::mmap64(host.cast(), 4096, libc::PROT_READ, flags, -1, 0)
    };
    assert_ne!(mapped, libc::MAP_FAILED);
    assert!(matches!(
        log.written_since(FIRST),
        Err(WriteLogError::Remapped { .. })
    ));
    assert!(log.restart(SECOND).is_err());
    // Nothing is known of either.
    assert!(matches!(log.written_since(FIRST), Err(WriteLogError::OtherSave)));
    assert!(matches!(log.written_since(SECOND), Err(WriteLogError::OtherSave)));
}

#[test]
fn log_when_the_kernel_does_not_know_the_scan_says_so() {
    let (_memory, mut log) = anonymous();
    log.restart(FIRST).unwrap();
    // Answers as the pagemap of a kernel before 6.7 does.
    log.pagemap = File::open("/dev/null").unwrap();
    assert!(matches!(
        log.written_since(FIRST),
        Err(WriteLogError::NotSupported(_))
    ));
    assert!(matches!(log.restart(SECOND), Err(WriteLogError::NotSupported(_))));
}

#[test]
fn log_when_another_descriptor_watches_the_memory_is_refused() {
    let (memory, mut log) = anonymous();
    let other = Userfaultfd::open(Watch::Writes).unwrap();
    let place = image::places(&memory, &layout()).unwrap()[0];
    other.register(place.host as u64, place.len as u64).unwrap();
    assert!(matches!(log.restart(FIRST), Err(WriteLogError::Register { .. })));
}

/// A save with the numbers 1.. in the pages of the tests, a run of zeros among them.
fn source() -> (TempFile, Contents) {
    let memory = allocate(&layout()).unwrap();
    for n in (0..600).filter(|n| n % 7 != 0) {
        memory.write_obj(n + 1, address(page(n))).unwrap();
    }
    let file = TempFile::new().unwrap();
    let written = image::write(&memory, &layout(), None, Pages::All, file.as_file()).unwrap();
    (file, written.contents)
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Fresh,
    Eager,
    Mapped,
    Paged,
}

/// Memory with a log, made in one of the ways a machine's is.
struct Setup {
    memory: Arc<GuestMemory>,
    log: WriteLog,
    /// The save the log is about.
    base: ([u8; 16], File),
    source: Option<TempFile>,
    _pager: Option<Pager>,
}

impl Setup {
    fn new(kind: Kind) -> Self {
        let memory = Arc::new(allocate(&layout()).unwrap());
        let (file, contents) = source();
        let mut pager = None;
        let beneath = match kind {
            Kind::Fresh => Beneath::Zeros,
            Kind::Eager => {
                image::read(&memory, &layout(), file.as_file(), &contents, |kind| {
                    kind == RegionKind::Ram
                })
                .unwrap();
                Beneath::Zeros
            }
            Kind::Mapped => {
                image::map_private(&memory, &layout(), file.as_file()).unwrap();
                Beneath::File
            }
            Kind::Paged => {
                let watch = Watch::MissingAndWrites;
                let started = Pager::start(
                    &memory,
                    &layout(),
                    file.as_file(),
                    (watch, Confinement::default()),
                    |_| unreachable!(),
                )
                .unwrap();
                Beneath::Pager(pager.insert(started).userfaultfd().clone())
            }
        };
        let mut log = WriteLog::new(&memory, &layout(), beneath).unwrap();
        match kind {
            Kind::Fresh | Kind::Eager => log.restart(FIRST).unwrap(),
            Kind::Mapped | Kind::Paged => log.start_at_source(FIRST),
        }
        let base = match kind {
            Kind::Fresh => {
                let empty = TempFile::new().unwrap().into_file();
                empty.set_len(image::file_size(&layout())).unwrap();
                empty
            }
            _ => file.as_file().try_clone().unwrap(),
        };
        Self {
            memory,
            log,
            base: (FIRST, base),
            source: matches!(kind, Kind::Mapped | Kind::Paged).then_some(file),
            _pager: pager,
        }
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::Write { first, pages, value } => {
                for n in first..first + pages {
                    self.memory.write_obj(value, address(page(n))).unwrap();
                }
            }
            Step::Clear { first, pages } => {
                let zeros = vec![0; (pages * PAGE) as usize];
                self.memory.write_slice(&zeros, address(page(first))).unwrap();
            }
            Step::Read { first, pages } => {
                for n in first..first + pages {
                    self.memory.read_obj::<u64>(address(page(n))).unwrap();
                }
            }
            Step::Discard { first, pages } => {
                discard(&self.memory, page(first) * PAGE, pages * PAGE).unwrap();
            }
            Step::PageOut => page_out(&self.memory),
            Step::Save => {
                let file = TempFile::new().unwrap();
                self.write(Pages::All, file.as_file());
                let id = [self.base.0[0] + 1; 16];
                self.log.restart(id).unwrap();
                self.base = (id, file.into_file());
            }
        }
    }

    fn write(&self, pages: Pages, out: &File) -> image::Written {
        let backing = self.source.as_ref().map(TempFile::as_file);
        image::write(&self.memory, &layout(), backing, pages, out).unwrap()
    }

    /// The difference to the last save, by the log and by comparing.
    fn differences(&self) -> [(image::Written, TempFile); 2] {
        let among = self.log.written_since(self.base.0).unwrap();
        [Some(&among), None].map(|among| {
            let out = TempFile::new().unwrap();
            let base = &self.base.1;
            (self.write(Pages::Changed { base, among }, out.as_file()), out)
        })
    }

    /// What a machine reads that is restored from the difference.
    fn restored(&self, (written, file): &(image::Written, TempFile)) -> Vec<u8> {
        let clone = allocate(&layout()).unwrap();
        image::map_private(&clone, &layout(), &self.base.1).unwrap();
        image::read(&clone, &layout(), file.as_file(), &written.contents, |kind| {
            kind != RegionKind::Pmem
        })
        .unwrap();
        content(&clone)
    }
}

/// Swaps the pages of the tests out, if the host has swap.
fn page_out(memory: &GuestMemory) {
    let host = memory.get_host_address(GuestAddress(BEGIN)).unwrap();
    // SAFETY: the range is in the mapping of RAM; the advice does not change content.
    unsafe { libc::madvise(host.cast(), 4 << 20, libc::MADV_PAGEOUT) };
}

/// The pages of the tests.
fn content(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; 1200 * PAGE as usize];
    memory.read_slice(&mut bytes, GuestAddress(BEGIN)).unwrap();
    bytes
}

#[derive(Debug, Clone)]
enum Step {
    Write { first: u64, pages: u64, value: u64 },
    Clear { first: u64, pages: u64 },
    Read { first: u64, pages: u64 },
    Discard { first: u64, pages: u64 },
    PageOut,
    Save,
}

mod slow_properties {
    use proptest::prelude::*;

    use super::*;

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        // Near huge pages' borders, and in few places, so that they meet.
        let range = (0u64..600, prop_oneof![1u64..4, Just(513u64)]);
        let step = prop_oneof![
            4 => (range.clone(), 0u64..4).prop_map(|((first, pages), value)| Step::Write { first, pages, value }),
            1 => range.clone().prop_map(|(first, pages)| Step::Clear { first, pages }),
            2 => range.clone().prop_map(|(first, pages)| Step::Read { first, pages }),
            4 => range.prop_map(|(first, pages)| Step::Discard { first, pages }),
            1 => Just(Step::PageOut),
            2 => Just(Step::Save),
        ];
        proptest::collection::vec(step, 0..12)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn difference_when_by_log_is_the_one_by_comparing(
            kind in prop_oneof![Just(Kind::Fresh), Just(Kind::Eager), Just(Kind::Mapped), Just(Kind::Paged)],
            steps in steps(),
        ) {
            let mut setup = Setup::new(kind);
            for step in &steps {
                setup.apply(step);
            }
            let [log, comparing] = setup.differences();
            prop_assert_eq!(&log.0.contents, &comparing.0.contents);
            let now = content(&setup.memory);
            prop_assert!(setup.restored(&log) == now, "by log");
            prop_assert!(setup.restored(&comparing) == now, "by comparing");
        }
    }
}

#[test]
fn difference_when_little_was_written_looks_at_little() {
    for kind in [Kind::Eager, Kind::Mapped, Kind::Paged] {
        let mut setup = Setup::new(kind);
        // Reading is no writing, wherever pages come from.
        setup.apply(&Step::Read { first: 0, pages: 600 });
        let write = |first| Step::Write {
            first,
            pages: 1,
            value: 9999,
        };
        setup.apply(&write(10));
        setup.apply(&write(20));
        let [log, comparing] = setup.differences();
        assert_eq!(log.0.pages_read, 2, "{kind:?}");
        assert!(comparing.0.pages_read >= 500, "{kind:?}");
        setup.apply(&Step::Save);
        setup.apply(&write(30));
        let [log, _] = setup.differences();
        assert_eq!(log.0.pages_read, 1, "{kind:?} after a save");
    }
}

#[test]
fn difference_when_pages_were_discarded_after_a_save_has_what_is_below_them() {
    let discarded = [Step::Discard { first: 10, pages: 3 }];
    // The middle one is brought in again.
    let read = [
        Step::Discard { first: 10, pages: 3 },
        Step::Read { first: 11, pages: 1 },
    ];
    for kind in [Kind::Fresh, Kind::Eager, Kind::Mapped, Kind::Paged] {
        for steps in [&discarded[..], &read[..]] {
            let mut setup = Setup::new(kind);
            setup.apply(&Step::Write {
                first: 10,
                pages: 3,
                value: 9999,
            });
            setup.apply(&Step::Save);
            steps.iter().for_each(|step| setup.apply(step));
            let [log, comparing] = setup.differences();
            assert_eq!(log.0.contents, comparing.0.contents, "{kind:?}: {steps:?}");
            assert!(
                setup.restored(&log) == content(&setup.memory),
                "{kind:?}: {steps:?}"
            );
        }
    }
}
