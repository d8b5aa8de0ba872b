//! See `dragonball::fuzzing::fs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dragonball::fuzzing::fs(data));
