//! Locks against the host's processes and among the guest's own.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::client::*;
use crate::config::FsCache;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::fs::locks::MAX_RANGES;
use crate::devices::virtio::fs::sys;
use crate::devices::virtio::fs::waiting::MAX_WAITING;
use crate::devices::virtio::test_ring::{Buf, NEXT, PATIENCE, WRITE as WRITABLE};

const READ: i32 = libc::F_RDLCK;
const WRITE: i32 = libc::F_WRLCK;
const UNLOCK: i32 = libc::F_UNLCK;
const FLOCK: u32 = 1;
const END: u64 = i64::MAX as u64;
/// Where a request that waits is kept.
const ASIDE: u64 = REQUEST + 0x10_0000;

/// `struct fuse_lk_in`.
fn lk(handle: u64, owner: u64, (start, end): (u64, u64), kind: i32, flags: u32) -> Vec<u8> {
    // The guest's process has the number of the owner.
    fields![handle, owner, start, end, kind, owner as u32, flags, 0u32]
}

struct Locked {
    c: Client,
    host: File,
    node: u64,
    handle: u64,
}

fn locked(threads: u8) -> Locked {
    let mut c = Client::with(FsCache::Auto, threads);
    let (file, handle) = c.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    let open = File::options()
        .read(true)
        .write(true)
        .open(c.share().join("file"));
    Locked {
        c,
        host: open.unwrap(),
        node: file.node,
        handle,
    }
}

/// Repeats what a lock that is given up by the end of its open file may still be in the way of: a child that another test
/// forks has a copy of every file until it executes its program.
fn soon<E: std::fmt::Debug>(mut lock: impl FnMut() -> Result<(), E>) {
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = lock() {
        assert!(Instant::now() < deadline, "{error:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

impl Locked {
    fn set(&mut self, owner: u64, range: (u64, u64), kind: i32) -> Result<(), i32> {
        let body = lk(self.handle, owner, range, kind, 0);
        self.c.call(SETLK, self.node, &body, 0).map(drop)
    }

    fn flock(&mut self, handle: u64, kind: i32) -> Result<(), i32> {
        let body = lk(handle, 1, (0, END), kind, FLOCK);
        self.c.call(SETLK, self.node, &body, 0).map(drop)
    }

    fn host_set(&self, kind: i32, start: i64, len: i64) -> std::io::Result<()> {
        sys::ofd_lock(self.host.as_fd(), libc::F_OFD_SETLK, kind, start, len).map(drop)
    }

    fn host_flock(&self, operation: i32) -> std::io::Result<()> {
        sys::flock(self.host.as_fd(), operation)
    }

    /// Sends a request number `place` of those that may wait.
    fn send_waiting(&mut self, place: u64, body: &[u8]) {
        let message = self.c.message(SETLKW, self.node, body);
        let (request, answer) = (ASIDE + place * 256, ASIDE + place * 256 + 128);
        self.c.guest.write(request, &message);
        self.c.guest.write(answer, &[0xa5; 16]);
        let chain = [Buf::Read(request, message.len() as u32), Buf::Write(answer, 16)];
        self.c.rings[REQUESTS].submit(&chain);
        self.c.rings[REQUESTS].kick();
    }

    /// The errno of the answer to that request.
    fn answer(&self, place: u64) -> i32 {
        let answer = self.c.guest.read(ASIDE + place * 256 + 128, 16);
        -(u32_at(&answer, 4) as i32)
    }

    fn wait_answer(&mut self, place: u64) -> i32 {
        assert_eq!(self.c.rings[REQUESTS].wait_used().len, 16);
        self.answer(place)
    }
}

#[test]
fn flock_holds_against_the_host_and_the_other_way() {
    const FLOCK_LOCKS: u32 = 1 << 10;
    const POSIX_LOCKS: u32 = 1 << 1;
    let mut l = locked(2);
    let flags = u32_at(&l.c.init().unwrap(), 12);
    assert_eq!(flags & (FLOCK_LOCKS | POSIX_LOCKS), FLOCK_LOCKS | POSIX_LOCKS);
    let (handle, node) = (l.handle, l.node);
    l.host_flock(libc::LOCK_EX).unwrap();
    assert_eq!(l.flock(handle, WRITE), Err(libc::EAGAIN));
    assert_eq!(l.flock(handle, READ), Err(libc::EAGAIN));
    l.host_flock(libc::LOCK_SH).unwrap();
    l.flock(handle, READ).unwrap();
    let other = l.c.open(node, libc::O_RDONLY).unwrap();
    l.flock(other, READ).unwrap();
    assert_eq!(l.flock(other, WRITE), Err(libc::EAGAIN));
    l.host_flock(libc::LOCK_UN).unwrap();
    l.c.release(node, other).unwrap();
    soon(|| l.flock(handle, WRITE));
    assert!(l.host_flock(libc::LOCK_SH).is_err());
    l.flock(handle, UNLOCK).unwrap();
    l.host_flock(libc::LOCK_EX).unwrap();
    l.host_flock(libc::LOCK_UN).unwrap();
    l.flock(handle, WRITE).unwrap();
    l.c.release(node, handle).unwrap();
    soon(|| l.host_flock(libc::LOCK_EX));
}

#[test]
fn ranges_hold_against_the_host_and_between_owners() {
    let mut l = locked(2);
    let (handle, node) = (l.handle, l.node);
    l.host_set(WRITE, 10, 10).unwrap();
    assert_eq!(l.set(1, (19, 30), READ), Err(libc::EAGAIN));
    l.set(1, (20, 29), WRITE).unwrap();
    l.set(1, (30, END), READ).unwrap();
    assert!(l.host_set(READ, 20, 1).is_err());
    assert!(l.host_set(READ, 30, 0).is_ok());
    // The host is told by its range, the guest's process by its number as well.
    let mut test = |owner: u64, range: (u64, u64), kind: i32| {
        let answer =
            l.c.call(GETLK, node, &lk(handle, owner, range, kind, 0), 24)
                .unwrap();
        let kind = u32_at(&answer, 16) as i32;
        (u64_at(&answer, 0), u64_at(&answer, 8), kind, u32_at(&answer, 20))
    };
    assert_eq!(test(1, (0, 15), READ), (10, 19, WRITE, 0));
    assert_eq!(test(2, (25, 26), READ), (20, 29, WRITE, 1));
    assert_eq!(test(2, (40, 41), WRITE), (30, END, READ, 1));
    assert_eq!(test(2, (0, 9), WRITE).2, UNLOCK);
    assert_eq!(test(1, (20, 29), WRITE).2, UNLOCK, "its own");
    assert_eq!(l.set(2, (25, 26), READ), Err(libc::EAGAIN));
    l.set(2, (35, 36), READ).unwrap();
    // Closing the file gives all of an owner's locks up, and nobody else's.
    let flush = fields![handle, 0u64, 1u64];
    l.c.call(FLUSH, node, &flush, 0).unwrap();
    soon(|| l.host_set(WRITE, 20, 10));
    assert!(l.host_set(WRITE, 35, 1).is_err());
    // So does the end of the open file, for locks that are its own.
    l.c.release(node, handle).unwrap();
    soon(|| l.host_set(WRITE, 35, 1));
}

#[test]
fn ranges_that_are_none_are_refused() {
    let mut l = locked(1);
    assert_eq!(l.set(1, (5, 4), WRITE), Err(libc::EINVAL));
    assert_eq!(l.set(1, (1 << 63, u64::MAX), WRITE), Err(libc::EINVAL));
    assert_eq!(l.set(1, (0, 1), 77), Err(libc::EINVAL));
    l.set(1, (0, u64::MAX), WRITE).unwrap();
    l.set(1, (0, u64::MAX), UNLOCK).unwrap();
    l.set(1, (0, 1), UNLOCK).unwrap();
    l.handle = 999;
    assert_eq!(l.set(1, (0, 1), WRITE), Err(libc::EBADF));
}

#[test]
fn ranges_when_there_are_too_many_are_refused() {
    let mut l = locked(1);
    for index in 0..MAX_RANGES as u64 {
        l.set(index % 3, (index * 2, index * 2), WRITE).unwrap();
    }
    assert_eq!(l.set(0, (1 << 40, 1 << 40), WRITE), Err(libc::ENOLCK));
    assert_eq!(l.set(7, (1 << 40, 1 << 40), WRITE), Err(libc::ENOLCK));
    assert!(l.host_set(WRITE, 1 << 40, 1).is_ok());
    l.set(0, (0, END), UNLOCK).unwrap();
    l.set(7, (1 << 41, END), WRITE).unwrap();
}

#[test]
fn wait_for_the_host_takes_no_thread_and_ends_with_its_lock() {
    let mut l = locked(1);
    let handle = l.handle;
    l.host_flock(libc::LOCK_EX).unwrap();
    l.host_set(WRITE, 0, 10).unwrap();
    l.send_waiting(0, &lk(handle, 1, (0, END), WRITE, FLOCK));
    l.send_waiting(1, &lk(handle, 5, (5, 6), READ, 0));
    // Both wait; the only thread serves others.
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(l.c.rings[REQUESTS].try_used(), None);
    assert!(l.c.getattr(ROOT).is_ok());
    l.host_flock(libc::LOCK_UN).unwrap();
    assert_eq!(l.wait_answer(0), 0);
    assert!(l.host_flock(libc::LOCK_SH).is_err());
    l.host_set(UNLOCK, 0, 0).unwrap();
    assert_eq!(l.wait_answer(1), 0);
    assert!(l.host_set(WRITE, 5, 1).is_err());
}

#[test]
fn wait_for_a_lock_of_the_guest_ends_when_it_is_given_up() {
    let mut l = locked(1);
    let (handle, node) = (l.handle, l.node);
    let other = l.c.open(node, libc::O_RDWR).unwrap();
    l.flock(handle, WRITE).unwrap();
    l.send_waiting(0, &lk(other, 2, (0, END), READ, FLOCK));
    l.set(1, (0, 9), WRITE).unwrap();
    l.send_waiting(1, &lk(other, 2, (9, 20), WRITE, 0));
    assert!(l.c.getattr(ROOT).is_ok());
    assert_eq!(l.c.rings[REQUESTS].try_used(), None);
    // The answer of the request that gives the lock up comes first.
    let unlock = |l: &mut Locked, body: &[u8]| {
        let message = l.c.message(SETLK, node, body);
        l.c.guest.write(REQUEST, &message);
        let chain = [Buf::Read(REQUEST, message.len() as u32), Buf::Write(ANSWER, 16)];
        l.c.rings[REQUESTS].submit(&chain);
        l.c.rings[REQUESTS].kick();
        l.c.rings[REQUESTS].wait_used();
        assert_eq!(u32_at(&l.c.guest.read(ANSWER, 16), 4), 0);
    };
    unlock(&mut l, &lk(handle, 1, (0, END), UNLOCK, FLOCK));
    assert_eq!(l.wait_answer(0), 0);
    unlock(&mut l, &lk(handle, 1, (0, 9), UNLOCK, 0));
    assert_eq!(l.wait_answer(1), 0);
    assert_eq!(l.set(1, (20, 20), READ), Err(libc::EAGAIN));
}

#[test]
fn waits_when_they_would_never_end_or_are_too_many_are_refused() {
    let mut l = locked(1);
    let handle = l.handle;
    l.set(1, (1, 1), WRITE).unwrap();
    l.set(2, (2, 2), WRITE).unwrap();
    l.set(3, (3, 3), WRITE).unwrap();
    l.send_waiting(0, &lk(handle, 1, (2, 2), WRITE, 0));
    l.send_waiting(1, &lk(handle, 2, (3, 3), WRITE, 0));
    assert!(l.c.getattr(ROOT).is_ok());
    let body = lk(handle, 3, (1, 1), WRITE, 0);
    assert_eq!(l.c.call(SETLKW, l.node, &body, 0), Err(libc::EDEADLK));
    // Many requests at one head, as only a hostile guest offers them.
    let first = l.c.message(SETLKW, l.node, &lk(handle, 9, (1, 1), READ, 0));
    l.c.guest.write(ASIDE + 0x8000, &first);
    let ring = &mut l.c.rings[REQUESTS];
    ring.descriptor(120, ASIDE + 0x8000, first.len() as u32, NEXT, 121);
    ring.descriptor(121, ASIDE + 0x9000, 16, WRITABLE, 0);
    // Two wait already.
    for _ in 0..MAX_WAITING - 2 {
        ring.offer(120);
    }
    ring.kick();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(ring.try_used(), None);
    for _ in 0..50 {
        ring.offer(120);
        ring.kick();
        assert_eq!(ring.wait_used().len, 16);
    }
    assert_eq!(
        u32_at(&l.c.guest.read(ASIDE + 0x9000, 16), 4) as i32,
        -libc::ENOLCK
    );
}

#[test]
fn locks_and_waits_survive_a_restore() {
    let mut l = locked(1);
    let (handle, node) = (l.handle, l.node);
    let other = l.c.open(node, libc::O_RDWR).unwrap();
    l.flock(handle, WRITE).unwrap();
    l.set(1, (0, 9), WRITE).unwrap();
    l.send_waiting(0, &lk(other, 2, (5, 5), READ, 0));
    assert!(l.c.getattr(ROOT).is_ok());
    let positions = l.c.fs.suspend();
    let state = l.c.fs.save().unwrap();
    // While the first process has the locks, a second one cannot.
    let error = l.c.restore_from(&state).unwrap_err().to_string();
    assert!(error.contains("lock"), "{error}");
    l.c.fs.reset();
    soon(|| l.c.restore_from(&state));
    assert!(l.host_flock(libc::LOCK_SH).is_err());
    assert!(l.host_set(READ, 9, 1).is_err());
    l.c.resume(&positions);
    assert!(l.c.getattr(ROOT).is_ok());
    assert_eq!(l.c.rings[REQUESTS].try_used(), None);
    assert_eq!(l.flock(other, READ), Err(libc::EAGAIN));
    let flush = fields![handle, 0u64, 1u64];
    let message = l.c.message(FLUSH, node, &flush);
    l.c.guest.write(REQUEST, &message);
    let chain = [Buf::Read(REQUEST, message.len() as u32), Buf::Write(ANSWER, 16)];
    l.c.rings[REQUESTS].submit(&chain);
    l.c.rings[REQUESTS].kick();
    l.c.rings[REQUESTS].wait_used();
    assert_eq!(l.wait_answer(0), 0);
    l.c.release(node, handle).unwrap();
    soon(|| l.host_flock(libc::LOCK_SH));
    // A reset forgets what waits.
    l.host_set(WRITE, 100, 1).unwrap();
    l.send_waiting(1, &lk(other, 2, (100, 100), READ, 0));
    std::thread::sleep(Duration::from_millis(20));
    l.c.fs.reset();
    l.host_set(UNLOCK, 100, 1).unwrap();
    l.c.rings = l.c.guest.activate(&mut l.c.fs, 64, true);
    assert!(l.c.init().is_ok());
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(l.c.rings[REQUESTS].try_used(), None);
}
