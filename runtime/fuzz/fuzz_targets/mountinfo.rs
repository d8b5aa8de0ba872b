//! See `runtime::fuzzing::mountinfo`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| runtime::fuzzing::mountinfo(data));
