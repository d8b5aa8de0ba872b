//! See `dragonball::fuzzing::machine_state`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| dragonball::fuzzing::machine_state(data));
