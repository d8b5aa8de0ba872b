#![allow(unsafe_code)]

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::{Console, ConsoleInput, ConsoleLog, INPUT_CAPACITY};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::test_ring::{
    BUFFERS, Buf, PATIENCE, TestGuest, TestRing, flood, survive_malformed_chains,
};
use crate::guest_log::recorder::assert_limited;

fn pipe() -> (std::fs::File, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for the two descriptors.
    assert_eq!(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: both descriptors were just created and belong to nobody else.
    unsafe { (std::fs::File::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) }
}

#[test]
fn tail_when_ring_overflows_keeps_the_newest() {
    let log = ConsoleLog::with_capacity(16);
    log.write(b"0123456789\n");
    log.write(b"abcdef\nghi");
    assert_eq!(
        log.tail(10),
        ["56789", "abcdef", "ghi"].map(|s| s.to_owned()).to_vec()[..].to_vec()
    );
    assert_eq!(log.tail(1), ["ghi"]);
    log.write(&[b'x'; 100]);
    assert_eq!(log.tail(5), ["x".repeat(16)]);
}

#[test]
fn tail_when_not_utf8_replaces() {
    let log = ConsoleLog::default();
    log.write(b"ok\r\n\xff\n");
    assert_eq!(log.tail(9), ["ok", "\u{fffd}"]);
    assert!(ConsoleLog::default().tail(3).is_empty());
}

#[test]
fn sink_when_set_late_gets_everything() {
    let log = ConsoleLog::default();
    log.write(b"early ");
    let (ours, theirs) = UnixStream::pair().unwrap();
    log.set_sink(theirs.into()).unwrap();
    log.write(b"late");
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut got = [0; 10];
    (&ours).read_exact(&mut got).unwrap();
    assert_eq!(&got, b"early late");
}

#[test]
fn sink_when_nobody_reads_drops_and_counts() {
    let log = ConsoleLog::default();
    let (mut reader, writer) = pipe();
    log.set_sink(writer).unwrap();
    let started = Instant::now();
    for _ in 0..64 {
        log.write(&[b'z'; 8192]);
    }
    assert!(started.elapsed() < PATIENCE);
    assert!(log.dropped() > 0);
    let mut some = [0; 4096];
    reader.read_exact(&mut some).unwrap();
    assert_eq!(some, [b'z'; 4096]);
}

#[test]
fn sink_when_a_terminal_gets_output_and_never_blocks() {
    let (mut master, mut terminal) = (0, 0);
    let null = std::ptr::null_mut();
    // SAFETY: both numbers have room, the rest is optional.
    let result = unsafe { libc::openpty(&raw mut master, &raw mut terminal, null, null.cast(), null.cast()) };
    assert_eq!(result, 0);
    // SAFETY: both descriptors were just created and belong to nobody else.
    let (master, mut terminal) =
        unsafe { (OwnedFd::from_raw_fd(master), std::fs::File::from_raw_fd(terminal)) };
    let log = ConsoleLog::default();
    log.set_sink(master).unwrap();
    log.write(b"typed\n");
    let mut line = [0; 6];
    terminal.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"typed\n");
    for _ in 0..64 {
        log.write(&[b'z'; 8192]);
    }
    assert!(log.dropped() > 0);
}

#[test]
fn sink_when_it_ends_is_forgotten() {
    let log = ConsoleLog::default();
    let (ours, theirs) = UnixStream::pair().unwrap();
    log.set_sink(theirs.into()).unwrap();
    drop(ours);
    log.write(b"one");
    let dropped = log.dropped();
    log.write(b"two");
    assert_eq!(log.dropped(), dropped);
    assert_eq!(log.tail(1), ["onetwo"]);
}

#[test]
fn sink_when_shared_keeps_its_flags() {
    let (_reader, writer) = pipe();
    let shared = writer.try_clone().unwrap();
    ConsoleLog::default().set_sink(writer).unwrap();
    // SAFETY: F_GETFL takes no argument and the descriptor is open.
    let flags = unsafe { libc::fcntl(shared.as_raw_fd(), libc::F_GETFL) };
    assert_eq!(flags & libc::O_NONBLOCK, 0);
    std::fs::File::from(shared).write_all(b"still blocking").unwrap();
}

#[test]
fn output_when_chained_arrives_in_order() {
    let guest = TestGuest::new();
    let log = ConsoleLog::default();
    let mut console = Console::new(log.clone()).unwrap().0;
    let mut rings = guest.activate(&mut console, 8, false);
    guest.write(BUFFERS, b"hello ");
    guest.write(BUFFERS + 0x1000, b"world\n");
    let used = rings[1].round_trip(&[Buf::Read(BUFFERS, 6), Buf::Read(BUFFERS + 0x1000, 6)]);
    assert_eq!(used.len, 0);
    guest.wait_interrupt();
    assert_eq!(log.tail(1), ["hello world"]);
    console.reset();
}

#[test]
fn output_when_huge_is_bounded() {
    let guest = TestGuest::new();
    let log = ConsoleLog::with_capacity(1 << 20);
    let mut console = Console::new(log.clone()).unwrap().0;
    let mut rings = guest.activate(&mut console, 8, true);
    guest.write(BUFFERS, &vec![b'q'; 1 << 20]);
    rings[1].round_trip(&[Buf::Read(BUFFERS, 1 << 20)]);
    assert_eq!(log.tail(1), ["q".repeat(64 << 10)]);
    console.reset();
}

#[test]
fn more_chains_than_one_turn_are_all_served() {
    let guest = TestGuest::new();
    let log = ConsoleLog::default();
    let mut console = Console::new(log.clone()).unwrap().0;
    let mut rings = guest.activate(&mut console, 256, true);
    guest.write(BUFFERS, b"x");
    for _ in 0..200 {
        rings[1].submit(&[Buf::Read(BUFFERS, 1)]);
    }
    rings[1].kick();
    for _ in 0..200 {
        rings[1].wait_used();
    }
    assert_eq!(log.tail(1), ["x".repeat(200)]);
    console.reset();
}

#[test]
fn malformed_chains_are_returned() {
    let guest = TestGuest::new();
    let log = ConsoleLog::default();
    let mut console = Console::new(log.clone()).unwrap().0;
    let mut rings = guest.activate(&mut console, 16, false);
    survive_malformed_chains(&mut rings[1]);
    assert_limited(&["console: chain dropped"], 300, || flood(&mut rings[1], 300));
    guest.write(BUFFERS, b"alive");
    rings[1].round_trip(&[Buf::Read(BUFFERS, 5)]);
    assert!(log.tail(1)[0].ends_with("alive"));
    console.reset();
}

#[test]
fn avail_index_when_it_jumps_stops_the_queue_until_reset() {
    let guest = TestGuest::new();
    let log = ConsoleLog::default();
    let mut console = Console::new(log.clone()).unwrap().0;
    let mut rings = guest.activate(&mut console, 16, true);
    rings[1].set_avail_index(1000);
    rings[1].kick();
    // The loop must stay responsive: `reset` waits for it.
    console.reset();
    guest.write(BUFFERS, b"again");
    let mut rings = guest.activate(&mut console, 16, true);
    rings[1].round_trip(&[Buf::Read(BUFFERS, 5)]);
    assert_eq!(log.tail(1), ["again"]);
    console.reset();
}

#[test]
fn reset_stops_the_worker() {
    let guest = TestGuest::new();
    let log = ConsoleLog::default();
    let mut console = Console::new(log.clone()).unwrap().0;
    let mut rings = guest.activate(&mut console, 16, false);
    console.reset();
    console.reset();
    guest.write(BUFFERS, b"late");
    rings[1].submit(&[Buf::Read(BUFFERS, 4)]);
    rings[1].kick();
    std::thread::sleep(Duration::from_millis(50));
    assert!(rings[1].try_used().is_none());
    assert!(log.tail(1).is_empty());
}

#[test]
fn interrupts_when_suppressed_are_not_sent() {
    let guest = TestGuest::new();
    let mut console = Console::new(ConsoleLog::default()).unwrap().0;
    let mut rings = guest.activate(&mut console, 16, false);
    rings[1].set_avail_flags(1);
    rings[1].round_trip(&[Buf::Read(BUFFERS, 4)]);
    console.reset();
    assert_eq!(guest.interrupts(), 0);

    let mut rings = guest.activate(&mut console, 16, true);
    rings[1].set_used_event(1);
    rings[1].round_trip(&[Buf::Read(BUFFERS, 4)]);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.interrupts(), 0);
    rings[1].round_trip(&[Buf::Read(BUFFERS, 4)]);
    guest.wait_interrupt();
    console.reset();
}

#[test]
fn config_space_reads_as_zero() {
    let mut data = [7; 16];
    Console::new(ConsoleLog::default())
        .unwrap()
        .0
        .read_config(u64::MAX, &mut data);
    assert_eq!(data, [0; 16]);
}

fn console() -> (TestGuest, Console, ConsoleInput) {
    let (console, input) = Console::new(ConsoleLog::default()).unwrap();
    (TestGuest::new(), console, input)
}

fn received(guest: &TestGuest, ring: &mut TestRing, address: u64) -> Vec<u8> {
    let used = ring.wait_used();
    guest.read(address, used.len as usize)
}

#[test]
fn input_when_buffers_are_there_arrives_with_an_interrupt() {
    for event_idx in [false, true] {
        let (guest, mut console, input) = console();
        let mut rings = guest.activate(&mut console, 8, event_idx);
        rings[0].submit(&[Buf::Write(BUFFERS, 4096)]);
        rings[0].kick();
        assert_eq!(input.push(b"ls\n"), 3);
        assert_eq!(received(&guest, &mut rings[0], BUFFERS), b"ls\n");
        guest.wait_interrupt();
        // Split over buffers as they come, in order.
        rings[0].submit(&[Buf::Write(BUFFERS, 2), Buf::Write(BUFFERS + 0x1000, 1)]);
        rings[0].kick();
        input.push(b"abcd");
        assert_eq!(rings[0].wait_used().len, 3);
        assert_eq!(
            [guest.read(BUFFERS, 2), guest.read(BUFFERS + 0x1000, 1)].concat(),
            b"abc"
        );
        rings[0].submit(&[Buf::Write(BUFFERS, 16)]);
        rings[0].kick();
        assert_eq!(received(&guest, &mut rings[0], BUFFERS), b"d");
    }
}

#[test]
fn input_when_the_guest_does_not_take_it_is_bounded() {
    let (guest, mut console, input) = console();
    // Before the driver is up, too.
    assert_eq!(input.push(&[b'x'; 3000]), 3000);
    assert_eq!(input.push(&[b'y'; 3000]), INPUT_CAPACITY - 3000);
    assert_eq!(input.push(b"z"), 0);
    let mut rings = guest.activate(&mut console, 8, true);
    rings[0].submit(&[Buf::Write(BUFFERS, 8192)]);
    rings[0].kick();
    let got = received(&guest, &mut rings[0], BUFFERS);
    assert_eq!(got.len(), INPUT_CAPACITY);
    assert!(got.starts_with(&[b'x'; 3000]) && got.ends_with(b"y"));
    assert_eq!(input.push(b"z"), 1);
}

#[test]
fn input_when_receive_chains_are_malformed_is_kept_for_a_good_one() {
    let (guest, mut console, input) = console();
    let mut rings = guest.activate(&mut console, 8, false);
    input.push(b"kept");
    survive_malformed_chains(&mut rings[0]);
    // Readable by the device only: no room.
    assert_eq!(rings[0].round_trip(&[Buf::Read(BUFFERS, 16)]).len, 0);
    assert_eq!(rings[0].round_trip(&[Buf::Write(BUFFERS, 16)]).len, 4);
    assert_eq!(guest.read(BUFFERS, 4), b"kept");
    input.push(b"x");
    rings[0].set_avail_index(40_000);
    rings[0].kick();
    // Output goes on.
    guest.write(BUFFERS, b"out");
    rings[1].round_trip(&[Buf::Read(BUFFERS, 3)]);
}

#[test]
fn suspend_and_restore_keep_input_and_what_is_in_the_rings() {
    let (guest, mut console, input) = console();
    let mut rings = guest.activate(&mut console, 8, true);
    guest.write(BUFFERS, b"out");
    rings[1].round_trip(&[Buf::Read(BUFFERS, 3)]);
    rings[0].submit(&[Buf::Write(BUFFERS, 2)]);
    rings[0].kick();
    input.push(b"typed");
    assert_eq!(received(&guest, &mut rings[0], BUFFERS), b"ty");
    let positions = console.suspend();
    assert_eq!(positions.len(), 2);
    input.push(b"!");
    // Offered while nobody looks; no kick follows.
    rings[0].submit(&[Buf::Write(BUFFERS, 2)]);
    rings[1].submit(&[Buf::Read(BUFFERS + 0x1000, 3)]);
    guest.resume(&mut console, &[&rings[0], &rings[1]], &positions, true);
    assert_eq!(received(&guest, &mut rings[0], BUFFERS), b"pe");
    rings[1].wait_used();

    let positions = console.suspend();
    let state = console.save().unwrap();
    let (mut console, _input) = Console::new(ConsoleLog::default()).unwrap();
    console.restore(&state).unwrap();
    rings[0].submit(&[Buf::Write(BUFFERS, 16)]);
    guest.resume(&mut console, &[&rings[0], &rings[1]], &positions, true);
    assert_eq!(received(&guest, &mut rings[0], BUFFERS), b"d!");
    console.reset();
}

#[test]
fn restore_when_the_state_is_damaged_or_too_large_is_refused() {
    let (_guest, mut console, _input) = console();
    let too_long = crate::devices::virtio::state::encode("console", &vec![0u8; INPUT_CAPACITY + 1]).unwrap();
    assert!(console.restore(&too_long).is_err());
    assert!(console.restore(&[]).is_err());
    assert!(console.restore(&[5, 1]).is_err());
}
