//! Packets of the guest, and host ends that talk back.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::guest::{Guest, Subject};
use super::script::Script;
use crate::config::VsockConfig;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::vsock::{AttachOptions, Direction, Vsock, VsockHandle, VsockListener};

const GUEST_CID: u32 = 3;
const HOST_CID: u64 = 2;
const RX: usize = 0;
const TX: usize = 1;
const PORT: u32 = 1024;
/// Streams kept.
const MAX_STREAMS: usize = 8;

/// The host's ends.
#[derive(Default)]
pub(super) struct Sockets {
    host: Option<(VsockHandle, VsockListener)>,
    streams: Vec<UnixStream>,
    /// Host port of the last attached descriptor.
    attached: u32,
}

impl Subject for Sockets {
    fn build(&mut self) -> Box<dyn VirtioDevice> {
        let config = VsockConfig {
            guest_cid: GUEST_CID,
            uds_path: None,
        };
        let (device, handle) = Vsock::new(&config).unwrap();
        let listener = handle.listen(PORT).unwrap();
        self.host = Some((handle, listener));
        Box::new(device)
    }

    fn started(&mut self, guest: &mut Guest) {
        (0..16).for_each(|_| guest.request(RX, &[], &[4096]));
        guest.kick(RX);
    }

    fn act(&mut self, _device: &mut dyn VirtioDevice, guest: &mut Guest, script: &mut Script) {
        match script.byte() % 4 {
            0 => self.host(script),
            1 => {
                guest.request(RX, &[], &[script.size(), script.size()]);
                guest.kick(RX);
            }
            _ => self.packet(guest, script),
        }
    }
}

impl Sockets {
    /// `struct virtio_vsock_hdr` (virtio 1.2, 5.10.6) and a payload.
    fn packet(&self, guest: &mut Guest, script: &mut Script) {
        let (op, ports, flags) = (script.byte(), script.byte(), script.byte());
        let payload = script.some(255);
        let credit = [script.size(), script.size()];
        let len = if flags & 0x80 == 0 {
            payload.len() as u32
        } else {
            script.u32()
        };
        let host_port = if ports & 0x80 == 0 { PORT } else { self.attached };
        let guest_port = u32::from(ports & 0x3) + 5000;
        let mut packet = Vec::new();
        for cid in [u64::from(GUEST_CID), HOST_CID] {
            packet.extend(cid.to_le_bytes());
        }
        // Who attaches names the guest's port.
        for field in [guest_port, host_port, len] {
            packet.extend(field.to_le_bytes());
        }
        for field in [1, u16::from(op % 9)] {
            packet.extend(u16::to_le_bytes(field));
        }
        for field in [u32::from(flags & 3), credit[0], credit[1]] {
            packet.extend(field.to_le_bytes());
        }
        if payload.is_empty() {
            guest.request(TX, &[(&packet, packet.len() as u32)], &[]);
        } else {
            let said = payload.len() as u32;
            guest.request(TX, &[(&packet, packet.len() as u32), (payload, said)], &[]);
        }
        guest.kick(TX);
    }

    fn host(&mut self, script: &mut Script) {
        let Some((handle, listener)) = &self.host else {
            return;
        };
        match script.byte() % 5 {
            0 => {
                if let Ok(stream) = listener.accept_timeout(Duration::ZERO) {
                    stream.set_nonblocking(true).unwrap();
                    self.streams.push(stream);
                }
            }
            1 => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                ours.set_nonblocking(true).unwrap();
                let direction = match script.byte() % 3 {
                    0 => Direction::Both,
                    1 => Direction::ToGuest,
                    _ => Direction::FromGuest,
                };
                let options = AttachOptions {
                    direction,
                    timeout: Duration::from_secs(1),
                };
                if let Ok(port) = handle.attach(theirs.into(), 5000, options) {
                    self.attached = port;
                    self.streams.push(ours);
                }
            }
            2 => {
                let _ = handle.close_attached(self.attached);
            }
            3 => {
                let bytes = script.some(255);
                if let Some(mut stream) = self.streams.last() {
                    let _ = stream.write(bytes);
                }
            }
            _ => {
                if let Some(mut stream) = self.streams.pop() {
                    let _ = stream.read(&mut [0; 4096]);
                    if script.byte() & 1 == 0 {
                        self.streams.insert(0, stream);
                    }
                }
            }
        }
        self.streams.truncate(MAX_STREAMS);
    }
}
