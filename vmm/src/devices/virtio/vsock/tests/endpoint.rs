//! The Unix socket endpoint, end to end.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::driver::{Driver, GUEST_CID};
use super::stack::{PATIENCE, Stack, alongside};
use super::streams::bounded;
use crate::config::VsockConfig;
use crate::devices::virtio::vsock::Vsock;

fn socket_path() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("dragonball-hvsock-{}-{number}", std::process::id()))
}

fn stack() -> (Stack, PathBuf) {
    let path = socket_path();
    (Stack::on(Driver::with(Some(path.clone()), true)), path)
}

/// Says `line` and returns the answer, read byte by byte.
fn talk(path: PathBuf, line: &'static str) -> (UnixStream, String) {
    let mut client = bounded(UnixStream::connect(path).unwrap());
    client.write_all(line.as_bytes()).unwrap();
    let mut answer = String::new();
    let mut byte = [0];
    while !answer.ends_with('\n') && client.read(&mut byte).is_ok_and(|count| count == 1) {
        answer.push(char::from(byte[0]));
    }
    (client, answer)
}

#[test]
fn client_that_says_connect_gets_ok_and_the_stream() {
    let (mut stack, path) = stack();
    stack.listening.insert(1024);
    for line in ["CONNECT 1024\n", "connect 1024\n"] {
        let path = path.clone();
        let (mut client, answer) = alongside(&mut stack, move || talk(path, line));
        let key = stack.accept();
        assert_eq!(answer, format!("OK {}\n", key.1));
        client.write_all(b"to guest").unwrap();
        assert_eq!(stack.read_exact(key, 8), b"to guest");
        stack.send_all(key, b"to host");
        let mut data = [0; 7];
        client.read_exact(&mut data).unwrap();
        assert_eq!(&data, b"to host");
        stack.close(key);
        assert_eq!(client.read(&mut data).unwrap(), 0);
    }
}

#[test]
fn client_that_does_not_wait_for_ok_loses_nothing() {
    let (mut stack, path) = stack();
    stack.listening.insert(1024);
    let mut client = bounded(UnixStream::connect(&path).unwrap());
    for piece in ["CONN", "ECT 1", "024\nhello", " guest"] {
        client.write_all(piece.as_bytes()).unwrap();
        stack.run_for(Duration::from_millis(5));
    }
    let key = stack.accept();
    assert_eq!(stack.read_exact(key, 11), b"hello guest");
    stack.send_all(key, b"hello host\n");
    let mut lines = BufReader::new(client).lines();
    assert!(lines.next().unwrap().unwrap().starts_with("OK "));
    assert_eq!(lines.next().unwrap().unwrap(), "hello host");
}

#[test]
fn client_whose_port_nobody_listens_on_is_closed_at_once() {
    let (mut stack, path) = stack();
    let (_client, answer) = alongside(&mut stack, move || talk(path, "CONNECT 9\n"));
    assert_eq!(answer, "");
    // At once: it was not asked again after its refusal.
    let metrics = stack.driver.handle.metrics();
    assert_eq!((metrics.refused, metrics.retries), (1, 0));
    stack.wait("the table to be empty", |stack| {
        stack.driver.handle.metrics().open_connections == 0
    });
}

#[test]
fn clients_that_do_not_follow_the_protocol_are_closed() {
    let (mut stack, path) = stack();
    stack.listening.insert(1024);
    for line in [
        "\n",
        "HELLO 1024\n",
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 4294967296\n",
        "CONNECT 1024 but much too long",
    ] {
        let path = path.clone();
        let (_client, answer) = alongside(&mut stack, move || talk(path, line));
        assert_eq!(answer, "", "{line:?}");
    }
    assert!(stack.log.is_empty());
    // One that says nothing is closed after two seconds.
    let (_client, answer) = alongside(&mut stack, move || talk(path, ""));
    assert_eq!(answer, "");
    stack.wait("the table to be empty", |stack| {
        stack.driver.handle.metrics().open_connections == 0
    });
}

#[test]
fn client_that_comes_before_the_driver_is_served_when_it_is_up() {
    let path = socket_path();
    let (device, handle) = Vsock::new(&VsockConfig {
        guest_cid: GUEST_CID,
        uds_path: Some(path.clone()),
    })
    .unwrap();
    let client = std::thread::spawn(move || talk(path, "CONNECT 1024\n"));
    std::thread::sleep(Duration::from_millis(20));
    let mut stack = Stack::on(Driver::around(device, handle, true));
    stack.listening.insert(1024);
    stack.wait("the client", |_| client.is_finished());
    assert!(client.join().unwrap().1.starts_with("OK "));
}

#[test]
fn guest_reaches_the_socket_of_the_port_unless_the_process_listens() {
    let (mut stack, path) = stack();
    assert_eq!(stack.connect(5000), None, "nobody listens");
    let mut port_path = path.into_os_string();
    port_path.push("_5000");
    let listener = UnixListener::bind(&port_path).unwrap();
    let key = stack.connect(5000).unwrap();
    let mut outside = bounded(listener.accept().unwrap().0);
    stack.send_all(key, b"outside");
    let mut data = [0; 7];
    outside.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"outside");
    outside.write_all(b"in").unwrap();
    assert_eq!(stack.read_exact(key, 2), b"in");

    let inside = stack.driver.handle.listen(5000).unwrap();
    let key = stack.connect(5000).unwrap();
    stack.send_all(key, b"inside");
    inside
        .accept_timeout(PATIENCE)
        .unwrap()
        .read_exact(&mut data[..6])
        .unwrap();
    assert_eq!(&data[..6], b"inside");
    std::fs::remove_file(&port_path).unwrap();
}

#[test]
fn many_clients_at_once_are_all_served() {
    let (mut stack, path) = stack();
    stack.listening.insert(1024);
    let threads: Vec<_> = (0..100)
        .map(|_| {
            let path = path.clone();
            std::thread::spawn(move || talk(path, "CONNECT 1024\n").1)
        })
        .collect();
    stack.wait("all clients", |_| {
        threads.iter().all(|thread| thread.is_finished())
    });
    for thread in threads {
        assert!(thread.join().unwrap().starts_with("OK "));
    }
}

#[test]
fn socket_is_removed_with_the_device() {
    let (stack, path) = stack();
    assert!(path.exists());
    drop(stack);
    assert!(!path.exists());
}
