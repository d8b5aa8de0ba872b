//! Attached descriptors: stdio's FIFOs and everything else.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::flow::MUCH;
use super::stack::{Key, PATIENCE, Stack, pattern};
use crate::devices::virtio::vsock::packet::{Op, SHUTDOWN_BOTH, SHUTDOWN_SEND};
use crate::devices::virtio::vsock::{AttachOptions, Direction, VsockError};

const PORT: u32 = 1027;

/// A file that is removed at the end of the test.
struct Temporary(PathBuf);

impl Temporary {
    fn new(name: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self(std::env::temp_dir().join(format!("dragonball-{name}-{}-{number}", std::process::id())))
    }

    fn fifo() -> Self {
        let path = Self::new("fifo");
        let mode = 0o600.into();
        rustix::fs::mknodat(rustix::fs::CWD, &path.0, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        path
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn options(direction: Direction) -> AttachOptions {
    AttachOptions {
        direction,
        timeout: PATIENCE,
    }
}

/// Attaches `fd` and accepts its connection in the guest.
fn attach(stack: &mut Stack, fd: impl Into<OwnedFd>, direction: Direction) -> (u32, Key) {
    stack.listening.insert(PORT);
    let port = stack
        .driver
        .handle
        .attach(fd.into(), PORT, options(direction))
        .unwrap();
    let key = stack.accept();
    assert_eq!(key, (PORT, port));
    (port, key)
}

fn pipe() -> (File, File) {
    let (read_end, write_end) = std::io::pipe().unwrap();
    (OwnedFd::from(read_end).into(), OwnedFd::from(write_end).into())
}

/// Both sides of a pseudo terminal.
fn terminal() -> (File, OwnedFd) {
    let (mut main, mut side) = (-1, -1);
    let (name, settings, size) = (std::ptr::null_mut(), std::ptr::null(), std::ptr::null());
    // SAFETY: two integers to fill; the other arguments may be null.
    let result = unsafe { libc::openpty(&mut main, &mut side, name, settings, size) };
    assert_eq!(result, 0);
    // SAFETY: just opened, owned by nobody else.
    unsafe { (File::from_raw_fd(main), OwnedFd::from_raw_fd(side)) }
}

fn nonblocking() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.custom_flags(libc::O_NONBLOCK);
    options
}

#[test]
fn stdin_pipe_of_20_mib_arrives_whole_and_ends() {
    let mut stack = Stack::new();
    let (read_end, mut write_end) = pipe();
    let (port, key) = attach(&mut stack, read_end, Direction::ToGuest);
    let data = pattern(MUCH);
    let sent = data.clone();
    let thread = std::thread::spawn(move || write_end.write_all(&sent).unwrap());
    let received = stack.read_exact(key, MUCH);
    assert!(received == data);
    thread.join().unwrap();
    stack.wait("the end of stdin", |stack| {
        stack.sockets[&key].peer_shutdown == SHUTDOWN_SEND
    });
    stack.close(key);
    assert!(stack.driver.handle.wait_attached(port, PATIENCE));
}

#[test]
fn stdout_fifo_of_20_mib_arrives_whole_and_ends() {
    let mut stack = Stack::new();
    let fifo = Temporary::fifo();
    let mut reader = nonblocking().read(true).open(&fifo.0).unwrap();
    let writer = nonblocking().write(true).open(&fifo.0).unwrap();
    let (port, key) = attach(&mut stack, writer, Direction::FromGuest);
    let data = pattern(MUCH);
    rustix::fs::fcntl_setfl(&reader, rustix::fs::OFlags::empty()).unwrap();
    let thread = std::thread::spawn(move || {
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        all
    });
    stack.send_all(key, &data);
    // The process has exited: its agent closes at once, with much of the output still on its way.
    stack.control(key, Op::Shutdown, SHUTDOWN_BOTH);
    stack.wait_closed(key);
    assert!(stack.driver.handle.wait_attached(port, PATIENCE));
    assert!(thread.join().unwrap() == data);
}

#[test]
fn stdout_when_guest_ends_its_side_closes_the_fifo() {
    let mut stack = Stack::new();
    let (mut read_end, write_end) = pipe();
    let (port, key) = attach(&mut stack, write_end, Direction::FromGuest);
    stack.send_all(key, b"bye\n");
    stack.control(key, Op::Shutdown, SHUTDOWN_SEND);
    stack.wait_closed(key);
    assert!(stack.driver.handle.wait_attached(port, PATIENCE));
    let mut all = String::new();
    read_end.read_to_string(&mut all).unwrap();
    assert_eq!(all, "bye\n");
}

#[test]
fn stdin_fifo_without_a_writer_waits_for_one() {
    let mut stack = Stack::new();
    let fifo = Temporary::fifo();
    let reader = nonblocking().read(true).open(&fifo.0).unwrap();
    let (_, key) = attach(&mut stack, reader, Direction::ToGuest);
    stack.run_for(Duration::from_millis(30));
    assert_eq!(
        stack.sockets[&key].peer_shutdown, 0,
        "no writer yet is not the end"
    );
    let mut writer = OpenOptions::new().write(true).open(&fifo.0).unwrap();
    stack.run_for(Duration::from_millis(10));
    writer.write_all(b"typed").unwrap();
    assert_eq!(stack.read_exact(key, 5), b"typed");
    drop(writer);
    stack.wait("the end of stdin", |stack| {
        stack.sockets[&key].peer_shutdown == SHUTDOWN_SEND
    });
    // The device has let go of the FIFO: a new writer finds no reader.
    stack.wait("the FIFO to be released", |_| {
        nonblocking()
            .write(true)
            .open(&fifo.0)
            .is_err_and(|e| e.raw_os_error() == Some(libc::ENXIO))
    });
}

#[test]
fn stdin_fifo_whose_writer_has_gone_ends_after_its_data() {
    let mut stack = Stack::new();
    let fifo = Temporary::fifo();
    let reader = nonblocking().read(true).open(&fifo.0).unwrap();
    let mut writer = OpenOptions::new().write(true).open(&fifo.0).unwrap();
    writer.write_all(b"early").unwrap();
    drop(writer);
    let (_, key) = attach(&mut stack, reader, Direction::ToGuest);
    assert_eq!(stack.read_exact(key, 5), b"early");
    stack.wait("the end of stdin", |stack| {
        stack.sockets[&key].peer_shutdown == SHUTDOWN_SEND
    });
}

#[test]
fn stdout_when_reader_vanishes_keeps_draining_the_guest() {
    let mut stack = Stack::new();
    let fifo = Temporary::fifo();
    let reader = nonblocking().read(true).open(&fifo.0).unwrap();
    let writer = nonblocking().write(true).open(&fifo.0).unwrap();
    let (_, key) = attach(&mut stack, writer, Direction::FromGuest);
    let data = pattern(1 << 20);
    // The reader leaves while the device holds bytes for it.
    stack.send_some(key, &data);
    stack.send_some(key, &data);
    stack.run_for(Duration::from_millis(10));
    drop(reader);
    stack.send_all(key, &data);
    assert!(!stack.sockets[&key].closed);
    stack.wait("the bytes to be dropped", |stack| {
        stack.driver.handle.metrics().dropped_bytes >= 1 << 20
    });
    // A new reader (containerd came back) gets what is written from now on.
    let mut reader = nonblocking().read(true).open(&fifo.0).unwrap();
    stack.send_all(key, b"news");
    let mut line = [0; 8];
    stack.wait("the new reader", |_| matches!(reader.read(&mut line), Ok(4)));
    assert_eq!(&line[..4], b"news");
}

#[test]
fn stdout_when_reader_is_stuck_lets_others_work_and_the_device_go() {
    let mut stack = Stack::new();
    let (mut stuck_reader, write_end) = pipe();
    let (stuck_port, stuck_key) = attach(&mut stack, write_end, Direction::FromGuest);
    let data = pattern(1 << 20);
    let mut sent = 0;
    loop {
        stack.run_for(Duration::from_millis(5));
        let more = stack.send_some(stuck_key, &data[sent..]);
        if more == 0 {
            break;
        }
        sent += more;
    }
    // The guest's process is dead; its connection is gone, its output is not.
    stack.control(stuck_key, Op::Rst, 0);
    let (mut other, write_end) = pipe();
    let (port, key) = attach(&mut stack, write_end, Direction::FromGuest);
    stack.send_all(key, b"other");
    let mut word = [0; 5];
    other.read_exact(&mut word).unwrap();
    stack.close(key);
    assert!(stack.driver.handle.wait_attached(port, PATIENCE));
    assert!(
        !stack
            .driver
            .handle
            .wait_attached(stuck_port, Duration::from_millis(20))
    );
    // The reader comes back late and gets all of it.
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        stuck_reader.read_to_end(&mut all).unwrap();
        all
    });
    assert!(stack.driver.handle.wait_attached(stuck_port, PATIENCE));
    assert!(reader.join().unwrap() == data[..sent]);
}

#[test]
fn device_that_goes_away_ends_a_stuck_stdout() {
    let mut stack = Stack::new();
    let (mut read_end, write_end) = pipe();
    let (port, key) = attach(&mut stack, write_end, Direction::FromGuest);
    let data = pattern(256 * 1024);
    stack.send_some(key, &data);
    stack.send_some(key, &data);
    let handle = stack.driver.handle.clone();
    let start = std::time::Instant::now();
    drop(stack);
    assert!(start.elapsed() < PATIENCE);
    assert!(handle.wait_attached(port, Duration::ZERO));
    let mut all = Vec::new();
    read_end.read_to_end(&mut all).unwrap();
    assert!(matches!(handle.connect(1, PATIENCE), Err(VsockError::Stopped)));
    assert!(matches!(handle.listen(1), Err(VsockError::Stopped)));
    assert!(matches!(handle.close_attached(port), Err(VsockError::Stopped)));
}

#[test]
fn last_words_before_the_device_stops_are_delivered() {
    let mut stack = Stack::new();
    let (mut read_end, write_end) = pipe();
    let (_, key) = attach(&mut stack, write_end, Direction::FromGuest);
    stack.wait("the device to see the answer", |stack| {
        stack.driver.handle.metrics().connections == 1
    });
    stack.run_for(Duration::from_millis(20));
    // In the ring, without a kick the device could have seen.
    let header = stack.header(key, Op::Rw, 0, 5);
    stack.driver.send_without_kick(header, b"bye!\n");
    drop(stack);
    let mut all = String::new();
    read_end.read_to_string(&mut all).unwrap();
    assert_eq!(all, "bye!\n");
}

#[test]
fn close_attached_ends_stdin_after_what_is_in_the_pipe() {
    let mut stack = Stack::new();
    let (read_end, mut write_end) = pipe();
    let (port, key) = attach(&mut stack, read_end, Direction::ToGuest);
    write_end.write_all(b"rest").unwrap();
    stack.driver.handle.close_attached(port).unwrap();
    stack.wait("the end of stdin", |stack| {
        stack.sockets[&key].peer_shutdown == SHUTDOWN_SEND
    });
    assert_eq!(stack.read(key), b"rest");
    stack.close(key);
    assert!(stack.driver.handle.wait_attached(port, PATIENCE));
    assert!(matches!(stack.driver.handle.close_attached(port), Err(VsockError::NotAttached(p)) if p == port));
}

#[test]
fn close_attached_before_the_guest_accepts_is_remembered() {
    let mut stack = Stack::new();
    let (read_end, mut write_end) = pipe();
    write_end.write_all(b"all").unwrap();
    let handle = stack.driver.handle.clone();
    let port = handle
        .attach(read_end.into(), PORT, options(Direction::ToGuest))
        .unwrap();
    handle.close_attached(port).unwrap();
    stack.run_for(Duration::from_millis(20));
    stack.listening.insert(PORT);
    let key = stack.accept();
    stack.wait("the end of stdin", |stack| {
        stack.sockets[&key].peer_shutdown == SHUTDOWN_SEND
    });
    assert_eq!(stack.read(key), b"all");
    // An output that nobody has accepted is simply given up.
    stack.listening.clear();
    let (_read_end, write_end) = pipe();
    let port = handle
        .attach(write_end.into(), PORT, options(Direction::FromGuest))
        .unwrap();
    stack.run_for(Duration::from_millis(5));
    handle.close_attached(port).unwrap();
    assert!(handle.wait_attached(port, PATIENCE));
}

#[test]
fn close_attached_of_stdout_closes_the_connection() {
    let mut stack = Stack::new();
    let (_read_end, write_end) = pipe();
    let (port, key) = attach(&mut stack, write_end, Direction::FromGuest);
    stack.wait("the device to see the answer", |stack| {
        stack.driver.handle.metrics().connections == 1
    });
    stack.driver.handle.close_attached(port).unwrap();
    stack.wait_closed(key);
    assert_eq!(stack.sockets[&key].peer_shutdown, SHUTDOWN_BOTH);
    assert!(stack.driver.handle.wait_attached(port, PATIENCE));
}

/// More than a pipe holds.
const BACKLOG: usize = 100 << 10;

#[test]
fn close_attached_of_a_stdout_that_nobody_reads_gives_buffer_and_descriptor_back() {
    let mut stack = Stack::new();
    let (mut read_end, write_end) = pipe();
    let (port, key) = attach(&mut stack, write_end, Direction::FromGuest);
    stack.send_all(key, &pattern(BACKLOG));
    stack.driver.handle.close_attached(port).unwrap();
    stack.wait_closed(key);
    assert!(stack.driver.handle.wait_attached(port, PATIENCE));
    let mut taken = Vec::new();
    read_end.read_to_end(&mut taken).unwrap();
    assert!(taken.len() < BACKLOG, "the pipe's part only: {}", taken.len());
}

#[test]
fn close_attached_after_the_guests_end_gives_up_what_nobody_reads() {
    let mut stack = Stack::new();
    let (_read_end, write_end) = pipe();
    let (port, key) = attach(&mut stack, write_end, Direction::FromGuest);
    stack.send_all(key, &pattern(BACKLOG));
    stack.control(key, Op::Shutdown, SHUTDOWN_BOTH);
    stack.control(key, Op::Rst, 0);
    let handle = stack.driver.handle.clone();
    stack.run_for(Duration::from_millis(20));
    assert!(
        !handle.wait_attached(port, Duration::ZERO),
        "it waits for its reader"
    );
    handle.close_attached(port).unwrap();
    stack.run_for(Duration::from_millis(20));
    assert!(handle.wait_attached(port, PATIENCE));
    stack.wait("the table to be empty", |_| {
        handle.metrics().open_connections == 0
    });
}

#[test]
fn attach_when_guest_never_accepts_closes_the_descriptor_in_time() {
    let mut stack = Stack::new();
    let (mut read_end, write_end) = pipe();
    let options = AttachOptions {
        direction: Direction::FromGuest,
        timeout: Duration::from_millis(50),
    };
    let port = stack
        .driver
        .handle
        .attach(write_end.into(), PORT, options)
        .unwrap();
    stack.run_for(Duration::from_millis(80));
    assert!(stack.driver.handle.wait_attached(port, PATIENCE));
    assert_eq!(read_end.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn attach_when_descriptor_is_not_open_for_the_direction_fails() {
    let stack = Stack::new();
    let (read_end, write_end) = pipe();
    for (fd, direction, need) in [
        (read_end, Direction::FromGuest, "writing"),
        (write_end, Direction::Both, "reading"),
    ] {
        let error = stack
            .driver
            .handle
            .attach(fd.into(), 9, options(direction))
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("vsock port 9: descriptor is not open for {need}")
        );
    }
}

#[test]
fn regular_files_work_though_epoll_refuses_them() {
    let mut stack = Stack::new();
    let (source, sink) = (Temporary::new("source"), Temporary::new("sink"));
    let data = pattern(1 << 20);
    std::fs::write(&source.0, &data).unwrap();
    let (_, key) = attach(&mut stack, File::open(&source.0).unwrap(), Direction::ToGuest);
    assert!(stack.read_exact(key, data.len()) == data);
    stack.wait("the end of the file", |stack| {
        stack.sockets[&key].peer_shutdown == SHUTDOWN_SEND
    });
    let (port, key) = attach(&mut stack, File::create(&sink.0).unwrap(), Direction::FromGuest);
    stack.send_all(key, &data);
    stack.close(key);
    assert!(stack.driver.handle.wait_attached(port, PATIENCE));
    assert!(std::fs::read(&sink.0).unwrap() == data);
}

#[test]
fn dev_null_is_an_empty_stdin_and_a_bottomless_stdout() {
    let mut stack = Stack::new();
    let (_, key) = attach(&mut stack, File::open("/dev/null").unwrap(), Direction::ToGuest);
    stack.wait("the end of stdin", |stack| {
        stack.sockets[&key].peer_shutdown == SHUTDOWN_SEND
    });
    let null = OpenOptions::new().write(true).open("/dev/null").unwrap();
    let (_, key) = attach(&mut stack, null, Direction::FromGuest);
    stack.send_all(key, &pattern(1 << 20));
}

#[test]
fn socket_and_terminal_go_both_ways() {
    let mut stack = Stack::new();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let (_, key) = attach(&mut stack, theirs, Direction::Both);
    ours.write_all(b"question").unwrap();
    assert_eq!(stack.read_exact(key, 8), b"question");
    stack.send_all(key, b"answer");
    let mut answer = [0; 6];
    ours.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"answer");

    let (mut main, side) = terminal();
    let (port, key) = attach(&mut stack, side, Direction::Both);
    main.write_all(b"ls\n").unwrap();
    assert_eq!(stack.read_exact(key, 3), b"ls\n");
    stack.send_all(key, b"file");
    let mut seen = [0; 64];
    let mut all = Vec::new();
    while !all.ends_with(b"file") {
        let count = main.read(&mut seen).unwrap();
        all.extend_from_slice(&seen[..count]);
    }
    // The terminal's window is closed.
    drop(main);
    stack.wait("the end of the terminal", |stack| {
        stack.sockets[&key].peer_shutdown & SHUTDOWN_SEND != 0
    });
    stack.close(key);
    assert!(stack.driver.handle.wait_attached(port, PATIENCE));
}
