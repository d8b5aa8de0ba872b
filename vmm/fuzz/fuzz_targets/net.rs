//! See `dragonball::fuzzing::net`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dragonball::fuzzing::net(data));
