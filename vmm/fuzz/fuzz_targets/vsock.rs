//! See `dragonball::fuzzing::vsock`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dragonball::fuzzing::vsock(data));
