//! See `dragonball::fuzzing::mem`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dragonball::fuzzing::mem(data));
