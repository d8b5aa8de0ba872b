//! See `shim::fuzzing::bootstrap`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| shim::fuzzing::bootstrap(data));
