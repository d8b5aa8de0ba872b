use super::Rng;
use crate::config::RngConfig;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::test_ring::{
    BUFFERS, Buf, INDIRECT, NEXT, TestGuest, WRITE, flood, survive_malformed_chains,
};
use crate::guest_log::recorder::assert_limited;

fn rng() -> Rng {
    Rng::new(&RngConfig { id: "rng0".into() }).unwrap()
}

#[test]
fn request_is_filled_with_different_bytes_each_time() {
    let guest = TestGuest::new();
    let mut rng = rng();
    let mut rings = guest.activate(&mut rng, 16, true);
    let used = rings[0].round_trip(&[Buf::Write(BUFFERS, 64), Buf::Write(BUFFERS + 4096, 32)]);
    assert_eq!(used.len, 96);
    guest.wait_interrupt();
    let (first, second) = (guest.read(BUFFERS, 64), guest.read(BUFFERS + 4096, 32));
    assert_ne!(first[..32], second[..]);
    assert!(first.iter().any(|&byte| byte != 0));
    assert_eq!(guest.read(BUFFERS + 64, 64), [0; 64], "wrote beyond the buffer");
    rng.reset();
}

#[test]
fn request_when_huge_is_capped() {
    let guest = TestGuest::new();
    let mut rng = rng();
    let mut rings = guest.activate(&mut rng, 16, false);
    let used = rings[0].round_trip(&[Buf::Write(BUFFERS, 1 << 20)]);
    assert_eq!(used.len, 64 << 10);
    assert_eq!(guest.read(BUFFERS + (64 << 10), 4096), [0; 4096]);
    rng.reset();
}

#[test]
fn request_when_read_only_gets_nothing() {
    let guest = TestGuest::new();
    let mut rng = rng();
    let mut rings = guest.activate(&mut rng, 16, false);
    assert_eq!(rings[0].round_trip(&[Buf::Read(BUFFERS, 64)]).len, 0);
    assert_eq!(guest.read(BUFFERS, 64), [0; 64]);
    rng.reset();
}

#[test]
fn request_when_indirect_is_filled() {
    let guest = TestGuest::new();
    let mut rng = rng();
    let mut rings = guest.activate(&mut rng, 16, true);
    let ring = &mut rings[0];
    ring.descriptor_at(BUFFERS, 0, BUFFERS + 0x1000, 8, WRITE | NEXT, 1);
    ring.descriptor_at(BUFFERS, 1, BUFFERS + 0x2000, 8, WRITE, 0);
    ring.descriptor(3, BUFFERS, 32, INDIRECT, 0);
    ring.offer(3);
    ring.kick();
    let used = ring.wait_used();
    assert_eq!((used.head, used.len), (3, 16));
    rng.reset();
}

#[test]
fn many_requests_are_all_filled() {
    let guest = TestGuest::new();
    let mut rng = rng();
    let mut rings = guest.activate(&mut rng, 64, true);
    for _ in 0..60 {
        rings[0].submit(&[Buf::Write(BUFFERS, 16)]);
    }
    rings[0].kick();
    for _ in 0..60 {
        assert_eq!(rings[0].wait_used().len, 16);
    }
    rng.reset();
}

#[test]
fn malformed_chains_are_returned() {
    let guest = TestGuest::new();
    let mut rng = rng();
    let mut rings = guest.activate(&mut rng, 16, false);
    survive_malformed_chains(&mut rings[0]);
    assert_eq!(rings[0].round_trip(&[Buf::Write(BUFFERS, 16)]).len, 16);
    rng.reset();
}

#[test]
fn head_when_outside_the_table_is_skipped() {
    let guest = TestGuest::new();
    let mut rng = rng();
    let mut rings = guest.activate(&mut rng, 16, false);
    rings[0].offer(16);
    rings[0].offer(0xffff);
    assert_eq!(rings[0].round_trip(&[Buf::Write(BUFFERS, 16)]).len, 16);
    rng.reset();
}

#[test]
fn chains_when_they_flood_the_log_are_told_of_a_few_times() {
    let guest = TestGuest::new();
    let mut rng = rng();
    let mut rings = guest.activate(&mut rng, 16, true);
    assert_limited(
        &["rng: chain dropped", "virtio: cannot return a chain"],
        300,
        || {
            flood(&mut rings[0], 300);
        },
    );
    // A ring that is broken again and again.
    assert_limited(&["virtio: the driver broke a ring"], 25, || {
        for _ in 0..50 {
            rng.reset();
            rings = guest.activate(&mut rng, 16, true);
            rings[0].set_avail_index(5000);
            rings[0].kick();
            guest.io.drain().unwrap();
        }
    });
    rng.reset();
}
