//! See `dragonball::fuzzing::device_state`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dragonball::fuzzing::device_state(data));
