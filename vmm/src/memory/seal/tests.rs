#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

use super::*;

const LEN: u64 = 32 * BLOCK;

/// Memory of `len` bytes, sealed.
fn sealed(len: u64) -> (Arc<GuestMemory>, Seal) {
    let memory = Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), len as usize)]).unwrap());
    let start = memory.get_host_address(GuestAddress(0)).unwrap() as usize;
    let seal = Seal::new(&memory, start, len as usize).unwrap();
    (memory, seal)
}

/// Whether the kernel can put a byte at `offset`.
fn kernel_writes(memory: &GuestMemory, offset: u64) -> bool {
    let zero = File::open("/dev/zero").unwrap();
    let at = memory.get_host_address(GuestAddress(offset)).unwrap();
    // SAFETY: the kernel checks the address itself.
    match unsafe { libc::read(zero.as_raw_fd(), at.cast(), 1) } {
        1 => true,
        _ => {
            assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT));
            false
        }
    }
}

fn resident_pages(memory: &GuestMemory, len: u64) -> usize {
    let host = memory.get_host_address(GuestAddress(0)).unwrap();
    let mut pages = vec![0u8; (len / 4096) as usize];
    // SAFETY: the range is mapped and `pages` has a byte for each page.
    let result = unsafe { libc::mincore(host.cast(), len as usize, pages.as_mut_ptr()) };
    assert_eq!(result, 0);
    pages.iter().filter(|page| **page & 1 != 0).count()
}

#[test]
fn blocks_when_opened_can_be_used_and_their_neighbours_cannot() {
    let (memory, seal) = sealed(LEN);
    seal.open(4 * BLOCK, 2 * BLOCK).unwrap();
    let usable: Vec<bool> = (3..8)
        .map(|block| kernel_writes(&memory, block * BLOCK))
        .collect();
    assert_eq!(usable, [false, true, true, false, false]);
    assert!(!kernel_writes(&memory, 4 * BLOCK - 1) && kernel_writes(&memory, 6 * BLOCK - 1));
    memory.write_obj(7u8, GuestAddress(5 * BLOCK)).unwrap();
    seal.close(5 * BLOCK, BLOCK).unwrap();
    assert!(kernel_writes(&memory, 4 * BLOCK) && !kernel_writes(&memory, 5 * BLOCK));
    // It was freed.
    seal.open(5 * BLOCK, BLOCK).unwrap();
    assert_eq!(memory.read_obj::<u8>(GuestAddress(5 * BLOCK)).unwrap(), 0);
    assert_eq!((seal.open_bytes(), seal.strays()), (2 * BLOCK, 0));
    // What is left behind can be used by all.
    drop(seal);
    assert!(kernel_writes(&memory, 0));
}

#[test]
fn changes_when_not_of_whole_blocks_in_that_state_are_refused() {
    let (_memory, seal) = sealed(LEN);
    seal.open(BLOCK, BLOCK).unwrap();
    for (offset, len) in [
        (0, 4096),
        (4096, BLOCK),
        (0, 0),
        (LEN, BLOCK),
        (LEN - BLOCK, 2 * BLOCK),
        (u64::MAX - BLOCK + 1, BLOCK),
    ] {
        assert!(
            seal.open(offset, len).is_err() && seal.close(offset, len).is_err(),
            "{offset:#x} {len:#x}"
        );
    }
    assert!(seal.open(0, 2 * BLOCK).is_err());
    assert!(seal.close(0, 2 * BLOCK).is_err());
    assert_eq!(seal.open_bytes(), BLOCK);
}

#[test]
fn threads_when_they_use_sealed_blocks_go_on_with_a_bounded_number_of_pages() {
    let (memory, seal) = sealed(LEN);
    seal.open(0, BLOCK).unwrap();
    std::thread::scope(|scope| {
        for thread in 1..5u64 {
            let memory = &memory;
            scope.spawn(move || {
                for page in 0..1000 {
                    // Over the border of two pages.
                    let at = GuestAddress(thread * 4 * BLOCK + page * 4096 + 4092);
                    memory.write_obj(u64::MAX, at).unwrap();
                }
            });
        }
    });
    assert!(seal.strays() >= 4000);
    let resident = resident_pages(&memory, LEN);
    assert!((1..=STRAYS).contains(&resident), "{resident}");
    // A block with lent pages is plugged: they are not taken back from it later.
    seal.open(4 * BLOCK, 16 * BLOCK).unwrap();
    assert_eq!(resident_pages(&memory, LEN), 0);
    memory
        .write_slice(&vec![5; 16 * BLOCK as usize], GuestAddress(4 * BLOCK))
        .unwrap();
    for page in 0..1000u64 {
        memory
            .write_obj(1u8, GuestAddress(24 * BLOCK + page * 4096))
            .unwrap();
    }
    let mut bytes = vec![0; 16 * BLOCK as usize];
    memory.read_slice(&mut bytes, GuestAddress(4 * BLOCK)).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 5));
}

#[test]
fn runs_when_too_many_are_refused_and_what_is_open_stays() {
    let len = (2 * MAX_RUNS + 4) * BLOCK;
    let (_memory, seal) = sealed(len);
    for run in 0..MAX_RUNS {
        seal.open(2 * run * BLOCK, BLOCK).unwrap();
    }
    let error = seal.open(2 * MAX_RUNS * BLOCK, BLOCK).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded);
    // One run less, then one more.
    seal.open(BLOCK, BLOCK).unwrap();
    seal.open(2 * MAX_RUNS * BLOCK, BLOCK).unwrap();
    let error = seal.close(BLOCK, BLOCK).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded);
    assert!(seal.is_open(0, 3 * BLOCK));
    seal.close(0, 3 * BLOCK).unwrap();
    assert_eq!(seal.open_bytes(), (MAX_RUNS - 1) * BLOCK);
}

#[test]
fn fault_when_not_on_a_sealed_block_ends_the_process_as_before() {
    let (_memory, _seal) = sealed(LEN);
    // SAFETY: the child only faults, and has no handler of a panic or an exit to run.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        // SAFETY: not sound at all; the child dies of it. No core is wanted.
        unsafe {
            libc::prctl(libc::PR_SET_DUMPABLE, 0);
            std::ptr::write_volatile(8 as *mut u8, 1);
            libc::_exit(0);
        }
    }
    let mut status = 0;
    // SAFETY: the child is ours, the status outlives the call.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert!(
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV,
        "{status:#x}"
    );
}

/// A vCPU in real mode whose next instruction stores a byte at the beginning of `block`, and then halts.
fn about_to_store(vcpu: &kvm_ioctls::VcpuFd, block: u64) {
    let mut sregs = vcpu.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    sregs.ds.base = block * BLOCK;
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rflags, regs.rax) = (0x1000, 2, 0x55);
    vcpu.set_regs(&regs).unwrap();
}

#[test]
fn vcpu_when_it_stores_to_a_sealed_block_of_its_memslot_stops_there() {
    let Ok(kvm) = kvm_ioctls::Kvm::new() else {
        eprintln!("not run: no KVM");
        return;
    };
    let (memory, seal) = sealed(LEN);
    let vm = kvm.create_vm().unwrap();
    let region = kvm_bindings::kvm_userspace_memory_region {
        memory_size: LEN,
        userspace_addr: memory.get_host_address(GuestAddress(0)).unwrap() as u64,
        ..Default::default()
    };
    // SAFETY: the memory outlives the VM.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
    seal.open(0, 2 * BLOCK).unwrap();
    // mov [0], al; hlt
    memory
        .write_slice(&[0xa2, 0, 0, 0xf4], GuestAddress(0x1000))
        .unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    about_to_store(&vcpu, 1);
    assert!(matches!(vcpu.run(), Ok(kvm_ioctls::VcpuExit::Hlt)));
    about_to_store(&vcpu, 4);
    assert!(is_stopped(&vcpu.run()));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(BLOCK)).unwrap(), 0x55);
    // Plugged, it can go on; unplugged again, what KVM had mapped is gone.
    seal.open(4 * BLOCK, BLOCK).unwrap();
    about_to_store(&vcpu, 4);
    assert!(matches!(vcpu.run(), Ok(kvm_ioctls::VcpuExit::Hlt)));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(4 * BLOCK)).unwrap(), 0x55);
    seal.close(4 * BLOCK, BLOCK).unwrap();
    about_to_store(&vcpu, 4);
    assert!(is_stopped(&vcpu.run()));
    assert_eq!(memory.read_obj::<u8>(GuestAddress(4 * BLOCK)).unwrap(), 0);
}

/// KVM finds no page for the store; an instruction it emulates is MMIO then.
fn is_stopped(exit: &Result<kvm_ioctls::VcpuExit, kvm_ioctls::Error>) -> bool {
    match exit {
        Ok(kvm_ioctls::VcpuExit::MmioWrite(address, [0x55])) => *address == 4 * BLOCK,
        Err(error) => error.errno() == libc::EFAULT,
        _ => false,
    }
}

mod slow_properties {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn blocks_when_opened_and_closed_at_random_are_open_or_sealed(
            changes in vec((any::<bool>(), 0..LEN / BLOCK, 1..6u64), 1..60),
            query in (0..LEN / 4096, 1..2000u64),
        ) {
            let (memory, seal) = sealed(LEN);
            let start = memory.get_host_address(GuestAddress(0)).unwrap() as usize;
            let mut model = [false; (LEN / BLOCK) as usize];
            for (open, first, count) in changes {
                let range = first as usize..(first + count) as usize;
                let fits = model.get(range.clone()).is_some_and(|blocks| blocks.iter().all(|block| *block != open));
                let change = if open { Seal::open } else { Seal::close };
                prop_assert_eq!(change(&seal, first * BLOCK, count * BLOCK).is_ok(), fits);
                if fits {
                    model[range].fill(open);
                }
            }
            let usable: Vec<bool> = (0..LEN / BLOCK).map(|block| kernel_writes(&memory, block * BLOCK + 4096)).collect();
            prop_assert_eq!(&usable[..], &model[..]);
            prop_assert_eq!(seal.open_bytes(), model.iter().filter(|open| **open).count() as u64 * BLOCK);
            let runs = model.chunk_by(|a, b| a == b).filter(|run| run[0]).count();
            prop_assert_eq!(seal.area.runs.load(Ordering::Relaxed), runs as u64);
            let (offset, len) = (query.0 * 4096, query.1 * 4096);
            let mut pages = (query.0..query.0 + query.1).map(|page| page * 4096 / BLOCK);
            let open = pages.all(|block| model.get(block as usize).is_some_and(|open| *open));
            prop_assert_eq!(seal.is_open(offset, len), open);
            let mut expected: Vec<Range<usize>> = Vec::new();
            for (block, _) in model.iter().enumerate().filter(|(_, open)| !**open) {
                let at = start + block * BLOCK as usize;
                match expected.last_mut() {
                    Some(last) if last.end == at => last.end += BLOCK as usize,
                    _ => expected.push(at..at + BLOCK as usize),
                }
            }
            prop_assert_eq!(sealed_in(start, LEN as usize), expected);
        }
    }
}
