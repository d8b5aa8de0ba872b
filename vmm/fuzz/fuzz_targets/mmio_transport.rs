//! See `dragonball::fuzzing::mmio_transport`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dragonball::fuzzing::mmio_transport(data));
