//! See `dragonball::fuzzing::hvsock`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dragonball::fuzzing::hvsock(data));
