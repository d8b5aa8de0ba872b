//! Resets, many connections, and a device with nothing to do.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{Duration, Instant};

use event_manager::{EventOps, Events, MutEventSubscriber};

use super::driver::{Driver, GUEST_CID};
use super::stack::{PATIENCE, Stack, alongside, pattern};
use super::streams::{bounded, guest_connects, host_connects};
use crate::config::VsockConfig;
use crate::descriptors::Budget;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::vsock::muxer::{MAX_CONNECTIONS, MAX_OF_GUEST};
use crate::devices::virtio::vsock::packet::Op;
use crate::devices::virtio::vsock::{AttachOptions, Direction, Vsock, VsockError};

#[test]
fn reset_closes_connections_and_keeps_listeners() {
    let mut stack = Stack::new();
    let listener = stack.driver.handle.listen(1023).unwrap();
    let key = stack.connect(1023).unwrap();
    let mut accepted = bounded(listener.accept_timeout(PATIENCE).unwrap());
    let (mut connected, _) = host_connects(&mut stack, 1024);
    stack.send_all(key, b"before");
    stack.driver.restart();
    let mut all = String::new();
    accepted.read_to_string(&mut all).unwrap();
    assert_eq!(all, "before");
    assert_eq!(connected.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(stack.driver.handle.metrics().open_connections, 0);
    // The same device, driven anew.
    stack.sockets.clear();
    let key = stack.connect(1023).unwrap();
    let mut accepted = bounded(listener.accept_timeout(PATIENCE).unwrap());
    stack.send_all(key, b"after");
    let mut data = [0; 5];
    accepted.read_exact(&mut data).unwrap();
    let (mut connected, key) = host_connects(&mut stack, 1024);
    connected.write_all(b"again").unwrap();
    assert_eq!(stack.read_exact(key, 5), b"again");
}

#[test]
fn connect_that_waits_survives_a_reset() {
    let mut stack = Stack::new();
    let handle = stack.driver.handle.clone();
    let thread = std::thread::spawn(move || handle.connect(1024, PATIENCE));
    stack.wait("a refusal", |stack| !stack.log.is_empty());
    stack.driver.device.reset();
    std::thread::sleep(Duration::from_millis(20));
    stack.driver.restart();
    stack.listening.insert(1024);
    stack.wait("the connection", |_| thread.is_finished());
    thread.join().unwrap().unwrap();
}

#[test]
fn reset_of_an_idle_or_unused_device_is_harmless() {
    let mut stack = Stack::new();
    stack.driver.device.reset();
    stack.driver.device.reset();
    for _ in 0..20 {
        stack.driver.restart();
    }
    stack.sockets.clear();
    let (mut stream, key) = host_connects(&mut stack, 1024);
    stream.write_all(b"x").unwrap();
    assert_eq!(stack.read_exact(key, 1), b"x");
}

#[test]
fn connect_when_the_device_is_dropped_returns_at_once() {
    let mut stack = Stack::new();
    let handle = stack.driver.handle.clone();
    let thread = std::thread::spawn(move || handle.connect(1024, 10 * PATIENCE));
    stack.wait("the request", |stack| !stack.log.is_empty());
    let start = Instant::now();
    drop(stack);
    assert!(matches!(thread.join().unwrap(), Err(VsockError::Stopped)));
    assert!(start.elapsed() < PATIENCE);
}

#[test]
fn a_thousand_connections_work_at_once() {
    let mut stack = Stack::new();
    let listener = stack.driver.handle.listen(7).unwrap();
    stack.listening.insert(8);
    let mut streams = Vec::new();
    for _ in 0..500 {
        let key = stack.connect(7).unwrap();
        streams.push((bounded(listener.accept_timeout(PATIENCE).unwrap()), key));
    }
    let handle = stack.driver.handle.clone();
    let opened = alongside(&mut stack, move || -> Vec<UnixStream> {
        (0..500)
            .map(|_| bounded(handle.connect(8, PATIENCE).unwrap()))
            .collect()
    });
    for stream in opened {
        streams.push((stream, stack.accept()));
    }
    assert_eq!(stack.driver.handle.metrics().open_connections, 1000);
    // Every stream has its own bytes, both ways.
    for (index, (stream, key)) in streams.iter_mut().enumerate() {
        let message = format!("message {index}");
        stream.write_all(message.as_bytes()).unwrap();
        stack.send_all(*key, message.as_bytes());
    }
    for (index, (stream, key)) in streams.iter_mut().enumerate() {
        let message = format!("message {index}");
        assert_eq!(stack.read_exact(*key, message.len()), message.as_bytes());
        let mut data = vec![0; message.len()];
        stream.read_exact(&mut data).unwrap();
        assert_eq!(data, message.as_bytes());
    }
    drop(streams);
    stack.wait("the table to be empty", |stack| {
        stack.driver.handle.metrics().open_connections == 0
    });
}

#[test]
fn storm_of_short_connections_leaves_nothing_behind() {
    let mut stack = Stack::new();
    stack.listening.insert(8);
    let threads: Vec<_> = (0..8)
        .map(|thread: u8| {
            let handle = stack.driver.handle.clone();
            std::thread::spawn(move || {
                for round in 0..1250u32 {
                    let mut stream = bounded(handle.connect(8, PATIENCE).unwrap());
                    let message = [u32::from(thread).to_le_bytes(), round.to_le_bytes()].concat();
                    stream.write_all(&message).unwrap();
                    let mut echo = [0; 8];
                    stream.read_exact(&mut echo).unwrap();
                    assert_eq!(echo[..], message);
                }
            })
        })
        .collect();
    let mut live = Vec::new();
    stack.wait("the storm to be over", |stack| {
        live.extend(stack.backlog.drain(..));
        live.retain(|&key| {
            let data = stack.read(key);
            if !data.is_empty() {
                stack.send_some(key, &data);
            }
            !stack.sockets[&key].closed
        });
        threads.iter().all(|thread| thread.is_finished())
    });
    for thread in threads {
        thread.join().unwrap();
    }
    stack.wait("the table to be empty", |stack| {
        stack.driver.handle.metrics().open_connections == 0
    });
    assert_eq!(stack.driver.handle.metrics().connections, 10_000);
}

#[test]
fn table_when_the_guest_fills_it_has_room_for_the_host() {
    let mut stack = Stack::new();
    let listener = stack.driver.handle.listen(7).unwrap();
    stack.listening.insert(8);
    let mut streams = Vec::new();
    for _ in 0..MAX_OF_GUEST {
        let key = stack.connect(7).unwrap();
        streams.push((listener.accept_timeout(PATIENCE).unwrap(), key));
    }
    for _ in MAX_OF_GUEST..MAX_CONNECTIONS {
        assert_eq!(stack.connect(7), None);
    }
    let mut of_host = Vec::new();
    for _ in MAX_OF_GUEST..MAX_CONNECTIONS {
        of_host.push(host_connects(&mut stack, 8));
    }
    let handle = stack.driver.handle.clone();
    let error = alongside(&mut stack, move || handle.connect(8, PATIENCE)).unwrap_err();
    assert_eq!(error.to_string(), "vsock port 8: all 1024 connections are in use");
    // The host's connections do not make room for the guest's.
    assert_eq!(stack.connect(7), None);
    let (_, key) = streams.pop().unwrap();
    stack.close(key);
    stack.connect(7).unwrap();
    assert_eq!(stack.connect(7), None);
}

#[test]
fn table_when_full_gives_up_last_bytes_nobody_reads_first() {
    let mut stack = Stack::new();
    let listener = stack.driver.handle.listen(7).unwrap();
    let leave_bytes = |stack: &mut Stack| {
        let key = stack.connect(7).unwrap();
        let stuck = listener.accept_timeout(PATIENCE).unwrap();
        let credit = stack.sockets[&key].credit() as usize;
        let mut sent = 0;
        while sent < credit {
            sent += stack.send_some(key, &pattern(credit - sent));
        }
        stack.close(key);
        stuck
    };
    let stuck = leave_bytes(&mut stack);
    let mut streams = Vec::new();
    for _ in 0..MAX_OF_GUEST {
        stack.connect(7).unwrap();
        streams.push(listener.accept_timeout(PATIENCE).unwrap());
    }
    let open = stack.driver.handle.metrics().open_connections;
    assert_eq!(open, MAX_OF_GUEST as u64);
    drop(stuck);
}

#[test]
fn table_when_the_guest_fills_it_keeps_last_bytes_of_the_hosts_connections() {
    let mut stack = Stack::new();
    let listener = stack.driver.handle.listen(7).unwrap();
    let (mut reader, key) = host_connects(&mut stack, 8);
    let data = pattern(stack.sockets[&key].credit() as usize);
    let mut sent = 0;
    while sent < data.len() {
        sent += stack.send_some(key, &data[sent..]);
    }
    stack.close(key);
    let mut streams = Vec::new();
    while stack.connect(7).is_some() {
        streams.push(listener.accept_timeout(PATIENCE).unwrap());
    }
    assert_eq!(streams.len(), MAX_OF_GUEST);
    let of_host: Vec<_> = (MAX_OF_GUEST + 1..MAX_CONNECTIONS)
        .map(|_| host_connects(&mut stack, 8))
        .collect();
    assert_eq!(stack.connect(7), None);
    assert_eq!(of_host.len() + streams.len() + 1, MAX_CONNECTIONS);
    let mut received = vec![0; data.len()];
    alongside(&mut stack, move || {
        reader.read_exact(&mut received).unwrap();
        assert!(received == data);
    });
}

#[test]
fn descriptors_when_used_up_by_other_devices_are_refused_to_the_guest_alone() {
    let budget = Budget::new(10);
    let config = VsockConfig {
        guest_cid: GUEST_CID,
        uds_path: None,
    };
    let (device, handle) = Vsock::with_descriptors(&config, budget.clone()).unwrap();
    let mut stack = Stack::on(Driver::around(device, handle, true));
    let listener = stack.driver.handle.listen(7).unwrap();
    let of_a_share = budget.take(6).unwrap();
    let mut keys = [stack.connect(7).unwrap(), stack.connect(7).unwrap()];
    assert_eq!(stack.connect(7), None);
    stack.listening.insert(8);
    host_connects(&mut stack, 8);
    drop(of_a_share);
    stack.connect(7).unwrap();
    keys[0] = stack.connect(7).unwrap();
    for key in keys {
        stack.close(key);
    }
    drop(listener);
    stack.wait("the descriptors to come back", |_| budget.take(4).is_ok());
}

/// Learns the loop's thread id.
struct ThreadId(Arc<AtomicI32>);

impl MutEventSubscriber for ThreadId {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {}

    fn init(&mut self, _ops: &mut EventOps<'_>) {
        // SAFETY: has no preconditions.
        self.0.store(unsafe { libc::gettid() }, Ordering::SeqCst);
    }
}

/// The device's thread.
fn device_thread(stack: &Stack) -> i32 {
    let tid = Arc::new(AtomicI32::new(0));
    let io = &stack.driver.guest.io;
    let id = io.add(Arc::new(Mutex::new(ThreadId(tid.clone())))).unwrap();
    io.remove(id).unwrap();
    tid.load(Ordering::SeqCst)
}

/// Whether a thread sleeps, and the time it ran or wanted to: on a busy machine a busy loop mostly waits for its turn. To
/// look does not wake it.
fn sleeps_and_wanted(tid: i32) -> (bool, Duration) {
    let read = |name| std::fs::read_to_string(format!("/proc/self/task/{tid}/{name}")).unwrap();
    let wanted = read("schedstat");
    let wanted = wanted
        .split(' ')
        .take(2)
        .map(|field| field.parse::<u64>().unwrap());
    let sleeps = read("stat").rsplit_once(") ").unwrap().1.starts_with('S');
    (sleeps, Duration::from_nanos(wanted.sum()))
}

fn assert_idle(stack: &mut Stack, what: &str) {
    stack.run_for(Duration::from_millis(20));
    let tid = device_thread(stack);
    // A loop that does not sleep is busy every time; one that does may have something to finish first.
    let mut wanted = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let (slept, before) = sleeps_and_wanted(tid);
        std::thread::sleep(Duration::from_millis(100));
        let (sleeps, after) = sleeps_and_wanted(tid);
        wanted.push((slept, sleeps, after - before));
        if slept && sleeps && after - before < Duration::from_millis(20) {
            return;
        }
    }
    panic!("{what}: {wanted:?} of 100 ms each");
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let (read_end, write_end) = std::io::pipe().unwrap();
    (read_end.into(), write_end.into())
}

#[test]
fn device_when_there_is_nothing_to_do_sleeps() {
    let mut stack = Stack::new();
    stack.listening.insert(1027);
    let attach = |stack: &mut Stack, fd: OwnedFd, direction| {
        let options = AttachOptions {
            direction,
            timeout: PATIENCE,
        };
        stack.driver.handle.attach(fd, 1027, options).unwrap();
        stack.accept()
    };
    let (read_end, write_end) = pipe();
    drop(write_end);
    attach(&mut stack, read_end, Direction::ToGuest);
    assert_idle(&mut stack, "stdin that has ended");

    let (read_end, write_end) = pipe();
    attach(&mut stack, write_end, Direction::FromGuest);
    drop(read_end);
    assert_idle(&mut stack, "stdout without reader");

    let (_read_end, write_end) = pipe();
    let key = attach(&mut stack, write_end, Direction::FromGuest);
    let data = pattern(1 << 20);
    let mut sent = 0;
    loop {
        stack.run_for(Duration::from_millis(5));
        let more = stack.send_some(key, &data[sent..]);
        if more == 0 {
            break;
        }
        sent += more;
    }
    assert_idle(&mut stack, "stdout with a stuck reader");

    let file = std::env::temp_dir().join(format!("dragonball-idle-{}", std::process::id()));
    std::fs::write(&file, pattern(1 << 20)).unwrap();
    attach(&mut stack, File::open(&file).unwrap().into(), Direction::ToGuest);
    std::fs::remove_file(&file).unwrap();
    assert_idle(&mut stack, "a file the guest has no credit for");

    let (mut stream, _) = host_connects(&mut stack, 1024);
    stream.set_nonblocking(true).unwrap();
    while stream.write(&data).is_ok() {
        stack.run_for(Duration::from_millis(1));
    }
    drop(stream);
    assert_idle(&mut stack, "a client that left bytes the guest has no credit for");

    let (_stream, key) = guest_connects(&mut stack, 1023);
    stack.control(key, Op::CreditRequest, 0);
    assert_idle(&mut stack, "an open stream");

    stack.driver.tx.set_avail_index(40_000);
    stack.driver.tx.kick();
    stack.driver.rx.set_avail_index(40_000);
    stack.driver.rx.kick();
    assert_idle(&mut stack, "broken rings");
}

#[test]
fn driver_without_event_idx_is_asked_for_notifications_only_when_needed() {
    // VRING_USED_F_NO_NOTIFY is set on the rx ring while the device has nothing to put there.
    let driver = Driver::with(None, false);
    let flags = |ring_base: u64| {
        let bytes = driver.guest.read(ring_base + 0xc000, 2);
        u16::from_le_bytes([bytes[0], bytes[1]])
    };
    let rx = crate::devices::virtio::test_ring::RINGS;
    assert_eq!(flags(rx), 1);
    assert_eq!(flags(rx + 0x1_0000), 0);
}
