use std::fs;
use std::time::Duration;

use super::client::*;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::test_ring::{
    BUFFERS, Buf, INDIRECT, MEMORY_SIZE, NEXT, WRITE as WRITABLE, survive_malformed_chains,
};
use crate::guest_log::recorder::assert_limited;

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

/// Peak of the process' resident memory in KiB since [`reset_peak`].
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.unwrap().trim().trim_end_matches(" kB").parse().unwrap()
}

fn reset_peak() -> u64 {
    fs::write("/proc/self/clear_refs", "5").unwrap();
    peak()
}

/// Offers `message` in a chain that claims almost 4 GiB behind it: one indirect table, all of memory over and over.
fn call_with_gigabytes(c: &mut Client, message: &[u8]) -> i32 {
    const TABLE: u64 = BUFFERS + 0x10_0000;
    const PARTS: u16 = 255;
    c.guest.write(REQUEST, message);
    let ring = &mut c.rings[REQUESTS];
    ring.descriptor_at(TABLE, 0, REQUEST, message.len() as u32, NEXT, 1);
    for part in 1..=PARTS {
        ring.descriptor_at(TABLE, part, 0, MEMORY_SIZE as u32, NEXT, part + 1);
    }
    ring.descriptor_at(TABLE, PARTS + 1, ANSWER, 4096, WRITABLE, 0);
    ring.descriptor(0, TABLE, 16 * u32::from(PARTS + 2), INDIRECT, 0);
    ring.offer(0);
    ring.kick();
    assert_eq!(ring.wait_used().len, 16);
    u32_at(&c.guest.read(ANSWER, 16), 4) as i32
}

#[test]
fn requests_of_gigabytes_are_refused_without_memory_for_them() {
    let mut c = Client::new();
    let before = reset_peak();
    let huge = 250 * MEMORY_SIZE as u32;
    for opcode in 1..60 {
        if matches!(opcode, FORGET | INTERRUPT | BATCH_FORGET | WRITE) {
            continue;
        }
        let mut message = c.message(opcode, ROOT, &[]);
        message[..4].copy_from_slice(&huge.to_le_bytes());
        assert_eq!(
            call_with_gigabytes(&mut c, &message),
            -libc::EINVAL,
            "opcode {opcode}"
        );
    }
    // `struct fuse_ioctl_in`: fh, flags, cmd, arg, in_size, out_size.
    let message = c.message(IOCTL, ROOT, &fields![0u64, 0u32, 0u32, 0u64, huge, huge]);
    assert_eq!(call_with_gigabytes(&mut c, &message), -libc::ENOTTY);
    let grown = peak().saturating_sub(before);
    assert!(grown < 1 << 20, "{grown} KiB more");
    assert!(c.getattr(ROOT).is_ok());
}

#[test]
fn data_when_more_than_agreed_is_cut() {
    let mut c = Client::new();
    let (file, handle) = c.create(ROOT, "file", libc::O_RDWR, 0o644).unwrap();
    // `struct fuse_write_in`, then memory over and over.
    let huge = 250 * MEMORY_SIZE as u32;
    let mut message = c.message(
        WRITE,
        file.node,
        &fields![handle, 0u64, huge, 0u32, 0u64, 0u32, 0u32],
    );
    message[..4].copy_from_slice(&(huge + 80).to_le_bytes());
    c.guest.write(REQUEST, &message);
    const TABLE: u64 = BUFFERS + 0x10_0000;
    let ring = &mut c.rings[REQUESTS];
    ring.descriptor_at(TABLE, 0, REQUEST, 80, NEXT, 1);
    for part in 1..=250 {
        ring.descriptor_at(TABLE, part, 0, MEMORY_SIZE as u32, NEXT, part + 1);
    }
    ring.descriptor_at(TABLE, 251, ANSWER, 24, WRITABLE, 0);
    ring.descriptor(0, TABLE, 16 * 252, INDIRECT, 0);
    ring.offer(0);
    ring.kick();
    assert_eq!(ring.wait_used().len, 24);
    assert_eq!(u32_at(&c.guest.read(ANSWER, 24), 16), 1 << 20);
    assert_eq!(fs::metadata(c.share().join("file")).unwrap().len(), 1 << 20);
}

#[test]
fn operations_when_unknown_are_refused() {
    let mut c = Client::new();
    for opcode in (48..50)
        .chain(53..70)
        .chain([0, 7, 19, 37, 40, 41, 4096, 1 << 20, u32::MAX])
    {
        assert_eq!(
            c.call(opcode, ROOT, &[0; 64], 64),
            Err(libc::ENOSYS),
            "opcode {opcode}"
        );
    }
    assert_eq!(c.call(IOCTL, ROOT, &[0; 64], 64), Err(libc::ENOTTY));
}

#[test]
fn init_when_not_of_our_protocol_is_refused_or_told() {
    let mut c = Client::new();
    let mut init = |major: u32, minor: u32| c.call(INIT, 0, &fields![major, minor, 0u32, 0u32], 64);
    assert_eq!(init(6, 40), Err(libc::EPROTO));
    assert_eq!(init(7, 22), Err(libc::EPROTO));
    assert_eq!(u32_at(&init(8, 0).unwrap(), 0), 7);
    let answer = init(7, 31).unwrap();
    assert_eq!((u32_at(&answer, 0), u32_at(&answer, 4)), (7, 33));
    // max_write.
    assert_eq!(u32_at(&answer, 20), 1 << 20);
}

#[test]
fn names_when_they_have_no_end_or_flood_the_log_cost_few_lines() {
    let mut c = Client::new();
    let endless = vec![b'x'; 60_000];
    assert_limited(&["fs: malformed request"], 300, || {
        for round in 0..300 {
            let opcode = [LOOKUP, UNLINK, RMDIR, REMOVEXATTR][round % 4];
            assert_eq!(c.call(opcode, ROOT, &endless, 128), Err(libc::EINVAL));
        }
    });
    assert_limited(&["fs: chain dropped"], 300, || {
        crate::devices::virtio::test_ring::flood(&mut c.rings[HIPRIO], 300);
    });
    // What made fuse-backend-rs write lines of its own.
    for _ in 0..100 {
        c.init().unwrap();
        assert!(
            c.call(
                READDIRPLUS,
                ROOT,
                &fields![9u64, 0u64, 4096u32, 0u32, 0u64, 0u32, 0u32],
                4096
            )
            .is_err()
        );
    }
    assert_limited(&[], 0, || {});
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
