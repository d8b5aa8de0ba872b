//! The guest's socket layer: enough of Linux's to hold the device to the protocol. Runs in the test's thread, whenever a
//! test waits for something.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use super::driver::{Driver, GUEST_CID, Packet};
use crate::devices::virtio::vsock::packet::{
    HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND, TYPE_STREAM,
};

/// Longest wait for anything.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
/// Largest payload, Linux's VIRTIO_VSOCK_MAX_PKT_BUF_SIZE.
pub(super) const MAX_PACKET: usize = 64 * 1024;

/// Guest port, host port.
pub(super) type Key = (u32, u32);

/// A socket of the guest.
#[derive(Debug, Default)]
pub(super) struct Socket {
    pub(super) connected: bool,
    /// Forgotten: an RST came or was sent.
    pub(super) closed: bool,
    /// SHUTDOWN flags the host sent.
    pub(super) peer_shutdown: u32,
    /// Received and not read yet.
    pub(super) received: VecDeque<u8>,
    pub(super) buf_alloc: u32,
    receive_count: u32,
    forward_count: u32,
    told: u32,
    pub(super) peer_buf_alloc: u32,
    pub(super) peer_forward_count: u32,
    pub(super) sent_count: u32,
}

impl Socket {
    fn new() -> Self {
        Self {
            buf_alloc: 256 * 1024,
            ..Self::default()
        }
    }

    /// Bytes the host lets us send.
    pub(super) fn credit(&self) -> u32 {
        self.peer_buf_alloc - self.sent_count.wrapping_sub(self.peer_forward_count)
    }
}

/// The guest.
pub(super) struct Stack {
    pub(super) driver: Driver,
    pub(super) sockets: BTreeMap<Key, Socket>,
    pub(super) listening: BTreeSet<u32>,
    /// Sockets the host opened, not accepted yet.
    pub(super) backlog: VecDeque<Key>,
    /// Headers received so far, but for RW.
    pub(super) log: Vec<Header>,
    next_port: u32,
}

impl Stack {
    pub(super) fn new() -> Self {
        Self::on(Driver::new())
    }

    pub(super) fn on(driver: Driver) -> Self {
        Self {
            driver,
            sockets: BTreeMap::new(),
            listening: BTreeSet::new(),
            backlog: VecDeque::new(),
            log: Vec::new(),
            next_port: 50_000,
        }
    }

    /// Everything the guest's kernel does by itself: takes all packets there are.
    pub(super) fn poll(&mut self) -> bool {
        let mut any = false;
        while let Some(packet) = self.driver.try_receive() {
            any = true;
            self.on_packet(packet);
        }
        any
    }

    /// Polls until `condition`.
    pub(super) fn wait(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let any = self.poll();
            if condition(self) {
                return;
            }
            assert!(Instant::now() < deadline, "waited in vain for {what}");
            if !any {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    /// Polls for `time`.
    pub(super) fn run_for(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            if !self.poll() {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }

    fn on_packet(&mut self, Packet { header, payload }: Packet) {
        assert_eq!(header.type_, TYPE_STREAM);
        let key = (header.dst_port, header.src_port);
        let op = Op::from_wire(header.op).unwrap();
        if op != Op::Rw {
            self.log.push(header);
        }
        if op == Op::Request {
            let known = self.sockets.get(&key).is_some_and(|socket| !socket.closed);
            assert!(!known, "a REQUEST for a live connection");
            if !self.listening.contains(&key.0) {
                self.reset(key);
                return;
            }
            let mut socket = Socket::new();
            socket.connected = true;
            socket.peer_buf_alloc = header.buf_alloc;
            socket.peer_forward_count = header.fwd_cnt;
            self.sockets.insert(key, socket);
            self.backlog.push_back(key);
            self.control(key, Op::Response, 0);
            return;
        }
        let Some(socket) = self.sockets.get_mut(&key).filter(|socket| !socket.closed) else {
            if op != Op::Rst {
                self.reset(key);
            }
            return;
        };
        socket.peer_buf_alloc = header.buf_alloc;
        socket.peer_forward_count = header.fwd_cnt;
        match op {
            Op::Response => socket.connected = true,
            Op::Rw => {
                assert!(socket.connected, "data before the connection");
                assert_eq!(socket.peer_shutdown & SHUTDOWN_SEND, 0, "data after SHUTDOWN");
                socket.receive_count = socket.receive_count.wrapping_add(header.len);
                let in_buffer = socket.receive_count.wrapping_sub(socket.forward_count);
                assert!(
                    in_buffer <= socket.buf_alloc,
                    "the device ignores our credit: {in_buffer}"
                );
                socket.received.extend(&payload);
            }
            Op::Shutdown => {
                socket.peer_shutdown |= header.flags;
                if socket.peer_shutdown == SHUTDOWN_BOTH {
                    socket.closed = true;
                    self.reset(key);
                }
            }
            Op::Rst => socket.closed = true,
            Op::CreditUpdate => {}
            Op::CreditRequest => self.control(key, Op::CreditUpdate, 0),
            Op::Request => unreachable!(),
        }
    }

    /// A header for a packet of the connection `key`.
    pub(super) fn header(&mut self, key: Key, op: Op, flags: u32, len: u32) -> Header {
        let (mut buf_alloc, mut fwd_cnt) = (0, 0);
        if let Some(socket) = self.sockets.get_mut(&key) {
            socket.told = socket.forward_count;
            (buf_alloc, fwd_cnt) = (socket.buf_alloc, socket.forward_count);
        }
        Header {
            src_cid: u64::from(GUEST_CID),
            dst_cid: HOST_CID,
            src_port: key.0,
            dst_port: key.1,
            len,
            type_: TYPE_STREAM,
            op: op as u16,
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }

    pub(super) fn control(&mut self, key: Key, op: Op, flags: u32) {
        let header = self.header(key, op, flags, 0);
        self.driver.send(header, &[]);
    }

    fn reset(&mut self, key: Key) {
        self.control(key, Op::Rst, 0);
    }

    /// Starts a connection to a host port.
    pub(super) fn connect_start(&mut self, port: u32) -> Key {
        self.next_port += 1;
        let key = (self.next_port, port);
        self.sockets.insert(key, Socket::new());
        self.control(key, Op::Request, 0);
        key
    }

    /// Connects to a host port; false if refused.
    pub(super) fn connect(&mut self, port: u32) -> Option<Key> {
        let key = self.connect_start(port);
        self.wait("an answer to a REQUEST", |stack| {
            let socket = &stack.sockets[&key];
            socket.connected || socket.closed
        });
        self.sockets[&key].connected.then_some(key)
    }

    /// Waits for a connection of the host.
    pub(super) fn accept(&mut self) -> Key {
        self.wait("a connection of the host", |stack| !stack.backlog.is_empty());
        self.backlog.pop_front().unwrap()
    }

    /// Sends what credit allows of `data`; returns how much.
    pub(super) fn send_some(&mut self, key: Key, data: &[u8]) -> usize {
        let count = data
            .len()
            .min(self.sockets[&key].credit() as usize)
            .min(MAX_PACKET);
        if count > 0 {
            let header = self.header(key, Op::Rw, 0, count as u32);
            self.driver.send(header, &data[..count]);
            let socket = self.sockets.get_mut(&key).unwrap();
            socket.sent_count = socket.sent_count.wrapping_add(count as u32);
        }
        count
    }

    /// Sends `data` without looking at credit.
    pub(super) fn send_raw_data(&mut self, key: Key, data: &[u8]) {
        let header = self.header(key, Op::Rw, 0, data.len() as u32);
        self.driver.send(header, data);
    }

    /// Sends all of `data`, as fast as the host lets us.
    pub(super) fn send_all(&mut self, key: Key, data: &[u8]) {
        let mut sent = 0;
        self.wait("credit of the host", |stack| {
            sent += stack.send_some(key, &data[sent..]);
            sent == data.len()
        });
    }

    /// Reads what is there, and tells the host when much has been read.
    pub(super) fn read(&mut self, key: Key) -> Vec<u8> {
        let socket = self.sockets.get_mut(&key).unwrap();
        let data: Vec<u8> = socket.received.drain(..).collect();
        socket.forward_count = socket.forward_count.wrapping_add(data.len() as u32);
        if !socket.closed && socket.forward_count.wrapping_sub(socket.told) >= socket.buf_alloc / 2 {
            self.control(key, Op::CreditUpdate, 0);
        }
        data
    }

    /// Reads exactly `count` bytes.
    pub(super) fn read_exact(&mut self, key: Key, count: usize) -> Vec<u8> {
        let mut data = Vec::with_capacity(count);
        self.wait("data of the host", |stack| {
            data.extend(stack.read(key));
            data.len() >= count
        });
        assert_eq!(data.len(), count);
        data
    }

    /// Waits until the connection is forgotten.
    pub(super) fn wait_closed(&mut self, key: Key) {
        self.wait("the end of a connection", |stack| stack.sockets[&key].closed);
    }

    /// close(2): SHUTDOWN both ways, and waits for the RST.
    pub(super) fn close(&mut self, key: Key) {
        self.control(key, Op::Shutdown, SHUTDOWN_BOTH);
        self.wait_closed(key);
    }
}

/// Bytes that differ from place to place.
pub(super) fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state = state
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        bytes.extend_from_slice(&(state >> 7).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Runs `host` on another thread while the guest polls, and returns its result.
pub(super) fn alongside<T: Send + 'static>(
    stack: &mut Stack,
    host: impl FnOnce() -> T + Send + 'static,
) -> T {
    let thread = std::thread::spawn(host);
    stack.wait("the host's thread", |_| thread.is_finished());
    thread.join().unwrap()
}
