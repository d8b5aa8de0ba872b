//! See `dragonball::fuzzing::block`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dragonball::fuzzing::block(data));
