//! What all queues of a disk share.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::disk::Disk;
use super::throttle::Throttle;
use crate::devices::virtio::counter::Counter;

/// Bytes of the serial the guest reads.
pub(super) const SERIAL_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// What requests work on.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) id: String,
    pub(super) disk: Disk,
    pub(super) serial: [u8; SERIAL_BYTES],
    pub(super) counters: Counters,
    pub(super) throttle: Option<Throttle>,
    writeback: AtomicBool,
    /// Held by who reads the image's size until the disk has it.
    pub(super) measuring: Mutex<()>,
}

impl Target {
    pub(super) fn new(id: String, disk: Disk, serial: &str, throttle: Option<Throttle>) -> Self {
        let mut bytes = [0; SERIAL_BYTES];
        for (to, from) in bytes.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Self {
            id,
            disk,
            serial: bytes,
            counters: Counters::default(),
            throttle,
            writeback: AtomicBool::new(true),
            measuring: Mutex::default(),
        }
    }

    /// Whether writes may complete before they are durable (5.2.6.2).
    pub(super) fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Acquire)
    }

    pub(super) fn set_writeback(&self, on: bool) {
        self.writeback.store(on, Ordering::Release);
    }
}

/// Requests of one type.
#[derive(Debug, Default)]
struct Kind {
    requests: Counter,
    bytes: Counter,
}

/// Answered requests.
#[derive(Debug, Default)]
pub(super) struct Counters {
    read: Kind,
    write: Kind,
    flush: Kind,
    discard: Kind,
    zeroes: Kind,
    errors: Counter,
}

impl Counters {
    /// Counts a request of type `kind` over `bytes`; one that failed counts as an error only.
    pub(super) fn add(&self, kind: u32, bytes: u64, ok: bool) {
        if !ok {
            self.errors.inc();
            return;
        }
        let kind = match kind {
            VIRTIO_BLK_T_IN => &self.read,
            VIRTIO_BLK_T_OUT => &self.write,
            VIRTIO_BLK_T_FLUSH => &self.flush,
            VIRTIO_BLK_T_DISCARD => &self.discard,
            VIRTIO_BLK_T_WRITE_ZEROES => &self.zeroes,
            _ => return,
        };
        kind.requests.inc();
        kind.bytes.add(bytes);
    }

    pub(super) fn snapshot(&self) -> Vec<(&'static str, u64)> {
        let requests = |kind: &Kind| kind.requests.get();
        let bytes = |kind: &Kind| kind.bytes.get();
        vec![
            ("read_requests", requests(&self.read)),
            ("read_bytes", bytes(&self.read)),
            ("write_requests", requests(&self.write)),
            ("write_bytes", bytes(&self.write)),
            ("flush_requests", requests(&self.flush)),
            ("discard_requests", requests(&self.discard)),
            ("discard_bytes", bytes(&self.discard)),
            ("write_zeroes_requests", requests(&self.zeroes)),
            ("write_zeroes_bytes", bytes(&self.zeroes)),
            ("errors", self.errors.get()),
        ]
    }
}
