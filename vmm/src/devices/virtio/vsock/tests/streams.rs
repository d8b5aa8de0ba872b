//! Connections either way, half-closes, and what the host's calls report.

#![allow(unsafe_code)]

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::driver::{Driver, GUEST_CID};
use super::stack::{PATIENCE, Stack, alongside, pattern};
use crate::config::VsockConfig;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::vsock::connection::KILL_TIMEOUT;
use crate::devices::virtio::vsock::packet::{Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::devices::virtio::vsock::{ConnectPhase, Vsock, VsockError, VsockListener};

/// A stream with a bounded wait.
pub(super) fn bounded(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Host connects to a listening guest.
pub(super) fn host_connects(stack: &mut Stack, port: u32) -> (UnixStream, super::stack::Key) {
    stack.listening.insert(port);
    let handle = stack.driver.handle.clone();
    let stream = alongside(stack, move || handle.connect(port, PATIENCE)).unwrap();
    (bounded(stream), stack.accept())
}

/// Guest connects to a listening host.
pub(super) fn guest_connects(stack: &mut Stack, port: u32) -> (UnixStream, super::stack::Key) {
    let listener = stack.driver.handle.listen(port).unwrap();
    let key = stack.connect(port).unwrap();
    (bounded(listener.accept_timeout(PATIENCE).unwrap()), key)
}

#[test]
fn config_space_holds_the_guest_cid() {
    let (device, _handle) = Vsock::new(&VsockConfig {
        guest_cid: 0x1234_5678,
        uds_path: None,
    })
    .unwrap();
    let read = |offset, len| {
        let mut data = vec![0xff; len];
        device.read_config(offset, &mut data);
        data
    };
    assert_eq!(read(0, 8), 0x1234_5678_u64.to_le_bytes());
    assert_eq!(read(1, 2), [0x56, 0x34]);
    assert_eq!(read(4, 8), [0; 8]);
    assert_eq!(read(8, 4), [0; 4]);
    assert_eq!(read(u64::MAX, 4), [0; 4]);
    assert_eq!((device.device_type(), device.queue_sizes().len()), (19, 3));
}

#[test]
fn guest_connects_to_listener_and_both_sides_talk() {
    let mut stack = Stack::new();
    let (mut stream, key) = guest_connects(&mut stack, 1023);
    stack.send_all(key, b"ready\n");
    let mut line = [0; 6];
    stream.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"ready\n");
    stream.write_all(b"welcome").unwrap();
    assert_eq!(stack.read_exact(key, 7), b"welcome");
    stack.close(key);
    assert_eq!(stream.read(&mut line).unwrap(), 0);
    stack.driver.settle();
    let metrics = stack.driver.handle.metrics();
    assert_eq!((metrics.connections, metrics.open_connections), (1, 0));
    assert_eq!((metrics.rx_bytes, metrics.tx_bytes), (7, 6));
}

#[test]
fn host_connects_and_both_sides_talk() {
    for event_idx in [false, true] {
        let mut stack = Stack::on(Driver::with(None, event_idx));
        let (mut stream, key) = host_connects(&mut stack, 1024);
        assert!(key.1 >= 1 << 30, "host port {}", key.1);
        stream.write_all(b"ping").unwrap();
        assert_eq!(stack.read_exact(key, 4), b"ping");
        stack.send_all(key, b"pong");
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"pong");
        // Both directions end when the host's stream is dropped.
        drop(stream);
        stack.wait_closed(key);
        stack.wait("the table to be empty", |stack| {
            stack.driver.handle.metrics().open_connections == 0
        });
    }
}

#[test]
fn guest_connects_when_nobody_listens_is_refused() {
    let mut stack = Stack::new();
    assert_eq!(stack.connect(1023), None);
    assert_eq!(stack.driver.handle.metrics().refused, 1);
}

#[test]
fn listener_when_dropped_frees_the_port_and_keeps_accepted_streams() {
    let mut stack = Stack::new();
    let handle = stack.driver.handle.clone();
    let listener = handle.listen(5000).unwrap();
    assert!(matches!(handle.listen(5000), Err(VsockError::PortInUse(5000))));
    let accepted_key = stack.connect(5000).unwrap();
    let mut accepted = bounded(listener.accept_timeout(PATIENCE).unwrap());
    let waiting_key = stack.connect(5000).unwrap();
    drop(listener);
    stack.wait_closed(waiting_key);
    assert_eq!(stack.connect(5000), None);
    stack.send_all(accepted_key, b"still here");
    let mut data = [0; 10];
    accepted.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"still here");
    handle.listen(5000).unwrap();
}

#[test]
fn listener_is_pollable_and_accept_times_out() {
    let mut stack = Stack::new();
    let listener = stack.driver.handle.listen(1023).unwrap();
    let readable = |listener: &VsockListener| {
        // SAFETY: the listener lives longer than the borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(listener.as_raw_fd()) };
        let mut poll = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        rustix::event::poll(&mut poll, Some(&Timespec::default())).unwrap() == 1
    };
    assert!(!readable(&listener));
    let error = listener.accept_timeout(Duration::from_millis(20)).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("vsock port 1023: no connection from the guest after"),
        "{error}"
    );
    stack.connect(1023).unwrap();
    assert!(readable(&listener));
    listener.accept_timeout(PATIENCE).unwrap();
    assert!(!readable(&listener));
}

#[test]
fn listener_when_backlog_is_full_refuses() {
    let mut stack = Stack::new();
    let listener = stack.driver.handle.listen(9).unwrap();
    for _ in 0..super::super::listener::BACKLOG {
        stack.connect(9).unwrap();
    }
    assert_eq!(stack.connect(9), None);
    listener.accept_timeout(PATIENCE).unwrap();
    stack.connect(9).unwrap();
}

#[test]
fn connect_when_guest_listens_later_succeeds() {
    let mut stack = Stack::new();
    let handle = stack.driver.handle.clone();
    let thread = std::thread::spawn(move || handle.connect(1024, PATIENCE));
    stack.wait("some refusals", |stack| stack.log.len() >= 3);
    assert!(!thread.is_finished());
    stack.listening.insert(1024);
    stack.wait("the connection", |_| thread.is_finished());
    thread.join().unwrap().unwrap();
    let metrics = stack.driver.handle.metrics();
    assert!(metrics.retries >= 2, "{metrics:?}");
}

#[test]
fn connect_when_made_before_the_driver_is_up_succeeds() {
    let (device, handle) = Vsock::new(&VsockConfig {
        guest_cid: GUEST_CID,
        uds_path: None,
    })
    .unwrap();
    let caller = handle.clone();
    let thread = std::thread::spawn(move || caller.connect(1024, PATIENCE));
    std::thread::sleep(Duration::from_millis(20));
    let mut stack = Stack::on(Driver::around(device, handle, true));
    stack.listening.insert(1024);
    stack.wait("the connection", |_| thread.is_finished());
    thread.join().unwrap().unwrap();
}

#[test]
fn connect_when_guest_calls_out_retries_at_once() {
    let mut stack = Stack::new();
    let _listener = stack.driver.handle.listen(1023).unwrap();
    let handle = stack.driver.handle.clone();
    let thread = std::thread::spawn(move || handle.connect(1024, PATIENCE));
    let count = |stack: &Stack, op: Op| stack.log.iter().filter(|header| header.op == op as u16).count();
    stack.wait("some refusals", |stack| count(stack, Op::Request) >= 5);
    let before = count(&stack, Op::Request);
    stack.connect_start(1023);
    stack.wait("the answer", |stack| count(stack, Op::Response) == 1);
    // The repeated REQUEST is in front of the RESPONSE: no timer was waited for.
    let response = stack
        .log
        .iter()
        .position(|header| header.op == Op::Response as u16)
        .unwrap();
    stack.log.truncate(response);
    assert!(count(&stack, Op::Request) > before);
    stack.listening.insert(1024);
    stack.wait("the connection", |_| thread.is_finished());
    thread.join().unwrap().unwrap();
}

#[test]
fn connect_when_the_answer_is_lost_asks_again() {
    let mut driver = Driver::new();
    let handle = driver.handle.clone();
    let thread = std::thread::spawn(move || handle.connect(1024, PATIENCE));
    let first = driver.receive().header;
    let second = driver.receive().header;
    assert_eq!((first.op, second.op), (Op::Request as u16, Op::Request as u16));
    assert_eq!(
        (first.src_port, first.dst_port),
        (second.src_port, second.dst_port)
    );
    let mut stack = Stack::on(driver);
    stack.listening.insert(1024);
    // The guest was only slow: the connection is as good as any.
    let key = (first.dst_port, first.src_port);
    stack.control(key, Op::Response, 0);
    // On a busy machine the device asks once more before it sees the answer.
    while !thread.is_finished() {
        std::thread::sleep(Duration::from_millis(1));
    }
    stack.driver.settle();
    while let Some(again) = stack.driver.try_receive() {
        assert_eq!(
            (again.header.op, again.header.src_port),
            (first.op, first.src_port)
        );
    }
    stack.sockets.insert(key, Default::default());
    let mut stream = bounded(thread.join().unwrap().unwrap());
    stack.send_raw_data(key, b"hello");
    let mut data = [0; 5];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"hello");
}

#[test]
fn connect_when_it_times_out_names_port_phase_and_time() {
    let mut short = Duration::from_millis(50);
    let (device, handle) = Vsock::new(&VsockConfig {
        guest_cid: GUEST_CID,
        uds_path: None,
    })
    .unwrap();
    let phase = |result: Result<UnixStream, VsockError>| match result.unwrap_err() {
        VsockError::ConnectTimeout {
            port: 7,
            phase,
            elapsed,
        } => {
            assert!(elapsed >= short && elapsed < PATIENCE);
            phase
        }
        other => panic!("{other}"),
    };
    assert_eq!(phase(handle.connect(7, short)), ConnectPhase::DriverDown);

    let mut stack = Stack::on(Driver::around(device, handle, true));
    // The guest's driver is up, but nobody handles packets.
    assert_eq!(
        phase(stack.driver.handle.connect(7, short)),
        ConnectPhase::NoAnswer
    );
    // On a busy machine the guest's refusal takes longer than that.
    let (text, elapsed) = loop {
        let handle = stack.driver.handle.clone();
        let error = alongside(&mut stack, move || handle.connect(7, short)).unwrap_err();
        match &error {
            VsockError::ConnectTimeout {
                phase: ConnectPhase::NoAnswer,
                ..
            } if short < PATIENCE / 4 => short *= 4,
            VsockError::ConnectTimeout {
                port: 7,
                phase: ConnectPhase::Refused,
                elapsed,
            } => break (error.to_string(), *elapsed),
            other => panic!("{other}"),
        }
    };
    assert!(elapsed >= short);
    assert_eq!(
        text,
        format!("vsock port 7: no connection after {elapsed:.1?}: nobody listens in the guest")
    );
    // Nothing is left of the attempts.
    stack.wait("the table to be empty", |stack| {
        stack.driver.handle.metrics().open_connections == 0
    });
}

#[test]
fn half_close_by_the_guest_reaches_the_host_after_the_data() {
    let mut stack = Stack::new();
    let (mut stream, key) = host_connects(&mut stack, 1024);
    stack.send_all(key, b"last words");
    stack.control(key, Op::Shutdown, SHUTDOWN_SEND);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last words");
    // The other direction is still open.
    stream.write_all(b"answer").unwrap();
    assert_eq!(stack.read_exact(key, 6), b"answer");
    stream.shutdown(Shutdown::Write).unwrap();
    stack.wait_closed(key);
}

#[test]
fn half_close_by_the_host_reaches_the_guest_after_the_data() {
    let mut stack = Stack::new();
    let (mut stream, key) = host_connects(&mut stack, 1024);
    stream.write_all(b"request").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    stack.wait("the host's SHUTDOWN", |stack| {
        stack.sockets[&key].peer_shutdown == SHUTDOWN_SEND
    });
    assert_eq!(stack.read(key), b"request");
    stack.send_all(key, b"response");
    let mut data = [0; 8];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"response");
    stack.close(key);
    assert_eq!(stream.read(&mut data).unwrap(), 0);
}

#[test]
fn guest_that_stops_receiving_breaks_the_hosts_writes() {
    let mut stack = Stack::new();
    let (mut stream, key) = host_connects(&mut stack, 1024);
    stack.control(key, Op::Shutdown, SHUTDOWN_RECEIVE);
    let deadline = Instant::now() + PATIENCE;
    loop {
        match stream.write(b"x") {
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::BrokenPipe);
                break;
            }
            Ok(_) => assert!(Instant::now() < deadline),
        }
        stack.run_for(Duration::from_millis(1));
    }
    stack.send_all(key, b"more");
    let mut data = [0; 4];
    stream.read_exact(&mut data).unwrap();
    drop(stream);
    stack.wait_closed(key);
}

#[test]
fn host_that_leaves_while_the_guest_sends_closes_the_connection() {
    let mut stack = Stack::new();
    let (stream, key) = host_connects(&mut stack, 1024);
    drop(stream);
    stack.wait("both SHUTDOWN flags", |stack| {
        stack.sockets[&key].peer_shutdown == SHUTDOWN_BOTH
    });
    stack.wait("the table to be empty", |stack| {
        stack.driver.handle.metrics().open_connections == 0
    });
}

#[test]
fn guest_that_ignores_shutdown_is_reset_after_the_kill_timeout() {
    let mut driver = Driver::new();
    let listener = driver.handle.listen(1).unwrap();
    let mut stack = Stack::on(driver);
    let key = stack.connect(1).unwrap();
    let stream = listener.accept_timeout(PATIENCE).unwrap();
    let start = Instant::now();
    drop(stream);
    driver = stack.driver;
    let shutdown = driver.receive().header;
    assert_eq!(
        (shutdown.op, shutdown.flags),
        (Op::Shutdown as u16, SHUTDOWN_BOTH)
    );
    let reset = driver.receive().header;
    assert_eq!((reset.op, reset.dst_port), (Op::Rst as u16, key.0));
    assert!(start.elapsed() >= KILL_TIMEOUT, "{:?}", start.elapsed());
    driver.settle();
    assert_eq!(driver.handle.metrics().open_connections, 0);
}

#[test]
fn streams_given_to_the_host_are_blocking() {
    let mut stack = Stack::new();
    let (stream, _) = host_connects(&mut stack, 1024);
    let (accepted, _) = guest_connects(&mut stack, 1023);
    for stream in [stream, accepted] {
        let flags = rustix::fs::fcntl_getfl(&stream).unwrap();
        assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
    }
}

#[test]
fn data_in_front_of_a_guests_close_is_delivered() {
    let mut stack = Stack::new();
    for op in [Op::Shutdown, Op::Rst] {
        let (stream, key) = host_connects(&mut stack, 1024);
        // More than the socket pair takes at once: the rest is in the device's buffer when the connection ends.
        let data = pattern(stack.sockets[&key].credit() as usize);
        let mut sent = 0;
        while sent < data.len() {
            sent += stack.send_some(key, &data[sent..]);
        }
        stack.control(key, op, if op == Op::Shutdown { SHUTDOWN_BOTH } else { 0 });
        stack.run_for(Duration::from_millis(20));
        let mut all = Vec::new();
        let mut stream = stream;
        stream.read_to_end(&mut all).unwrap();
        assert!(all == data, "{} of {} bytes", all.len(), data.len());
        stack.wait("the table to be empty", |stack| {
            stack.driver.handle.metrics().open_connections == 0
        });
    }
}
