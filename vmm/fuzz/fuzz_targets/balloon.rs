//! See `dragonball::fuzzing::balloon`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dragonball::fuzzing::balloon(data));
