use std::fs;
use std::time::Duration;

use super::client::*;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::test_ring::{BUFFERS, Buf, INDIRECT, survive_malformed_chains};

#[test]
fn malformed_chains_are_returned() {
    let mut c = Client::new();
    for queue in [HIPRIO, REQUESTS] {
        survive_malformed_chains(&mut c.rings[queue]);
    }
    assert!(c.getattr(ROOT).is_ok());
}

#[test]
fn requests_when_cut_short_are_returned() {
    let mut c = Client::new();
    let whole = c.message(
        CREATE,
        ROOT,
        &[fields![0u32, 0u32, 0u32, 0u32], name("short")].concat(),
    );
    for len in 1..whole.len() as u32 {
        c.guest.write(REQUEST, &whole);
        c.rings[REQUESTS].round_trip(&[Buf::Read(REQUEST, len), Buf::Write(ANSWER, 160)]);
    }
    assert!(!c.share().join("short").exists());
    assert!(c.getattr(ROOT).is_ok());
}

#[test]
fn lengths_when_lying_are_survived() {
    let mut c = Client::new();
    for len in [0, 1, 39, 40, 41, 4096, 1 << 20, (1 << 20) + 4096, u32::MAX] {
        for opcode in 1..50 {
            let mut message = c.message(opcode, ROOT, &name("x"));
            message[..4].copy_from_slice(&len.to_le_bytes());
            c.guest.write(REQUEST, &message);
            let read = Buf::Read(REQUEST, message.len() as u32);
            c.rings[REQUESTS].round_trip(&[read, Buf::Write(ANSWER, 4096)]);
        }
    }
    assert!(c.getattr(ROOT).is_ok());
}

#[test]
fn answers_when_there_is_no_room_are_survived() {
    let mut c = Client::new();
    for room in [0, 1, 15, 16, 17] {
        let message = c.message(GETATTR, ROOT, &fields![0u32, 0u32, 0u64]);
        c.guest.write(REQUEST, &message);
        let mut chain = vec![Buf::Read(REQUEST, message.len() as u32)];
        if room > 0 {
            chain.push(Buf::Write(ANSWER, room));
        }
        assert!(c.rings[REQUESTS].round_trip(&chain).len <= room);
    }
    assert_eq!(
        c.call(
            READ,
            ROOT,
            &fields![0u64, 0u64, u32::MAX, 0u32, 0u64, 0u32, 0u32],
            16
        ),
        Err(libc::EBADF)
    );
    let handle = u64_at(&c.call(OPENDIR, ROOT, &fields![0u32, 0u32], 16).unwrap(), 0);
    let huge = fields![handle, 0u64, u32::MAX, 0u32, 0u64, 0u32, 0u32];
    assert_eq!(c.call(READDIRPLUS, ROOT, &huge, 64), Err(libc::ENOMEM));
    let far = fields![handle, u64::MAX, 4096u32, 0u32, 0u64, 0u32, 0u32];
    assert!(c.call(READDIRPLUS, ROOT, &far, 4096).is_err());
    let indirect = &mut c.rings[REQUESTS];
    indirect.descriptor(0, BUFFERS, 16 * 65535, INDIRECT, 0);
    indirect.offer(0);
    indirect.kick();
    indirect.wait_used();
    assert!(c.getattr(ROOT).is_ok());
}

/// Requests of every kind with random contents, aimed at nodes and handles that exist.
#[test]
fn random_requests_do_no_harm() {
    let mut c = Client::with(Default::default(), 3);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let names = ["a", "b", "..", "sub", "link", "a/b", ""];
    c.mkdir(ROOT, "sub", 0o755).unwrap();
    c.symlink(ROOT, "link", "../outside/secret").unwrap();
    for _ in 0..6000 {
        let opcode = 1 + random(52) as u32;
        let mut body = Vec::new();
        for _ in 0..random(14) {
            let small = random(12);
            let value = if random(6) == 0 { random(u64::MAX) } else { small };
            body.extend(fields![value as u32]);
        }
        body.extend(name(names[random(names.len() as u64) as usize]));
        body.extend(name(names[random(names.len() as u64) as usize]));
        // DESTROY and INTERRUPT have no answer; the rest may refuse to give one.
        let message = c.message(opcode, 1 + random(8), &body);
        c.guest.write(REQUEST, &message);
        let chain = [
            Buf::Read(REQUEST, message.len() as u32),
            Buf::Write(ANSWER, random(8192) as u32 + 1),
        ];
        let used = c.rings[REQUESTS].round_trip(&chain);
        assert!(used.len <= 8192);
    }
    assert!(c.getattr(ROOT).is_ok());
    let mut outside: Vec<_> = fs::read_dir(c.outside())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    outside.sort();
    assert_eq!(outside, ["secret"]);
    assert_eq!(fs::read(c.outside().join("secret")).unwrap(), b"secret");
    assert_eq!(fs::read_dir(c.base()).unwrap().count(), 2);
}

#[test]
fn avail_index_when_it_jumps_stops_the_queue_until_reset() {
    let mut c = Client::new();
    c.rings[REQUESTS].set_avail_index(5000);
    c.rings[REQUESTS].kick();
    std::thread::sleep(Duration::from_millis(20));
    c.fs.reset();
    c.rings = c.guest.activate(&mut c.fs, 64, false);
    assert!(c.init().is_ok());
}

#[test]
fn reset_joins_the_workers_and_forgets_the_guest() {
    let mut c = Client::new();
    let sub = c.mkdir(ROOT, "sub", 0o755).unwrap();
    c.fs.reset();
    c.fs.reset();
    let message = c.message(LOOKUP, ROOT, &name("sub"));
    c.guest.write(REQUEST, &message);
    c.guest.write(ANSWER, &[0xee; 144]);
    c.rings[REQUESTS].submit(&[Buf::Read(REQUEST, message.len() as u32), Buf::Write(ANSWER, 144)]);
    c.rings[REQUESTS].kick();
    std::thread::sleep(Duration::from_millis(50));
    assert!(c.rings[REQUESTS].try_used().is_none());
    assert_eq!(c.guest.read(ANSWER, 144), [0xee; 144]);
    c.rings = c.guest.activate(&mut c.fs, 64, true);
    assert_eq!(c.getattr(sub.node).unwrap_err(), libc::ENOENT);
    assert!(c.lookup(ROOT, "sub").is_ok());
}
