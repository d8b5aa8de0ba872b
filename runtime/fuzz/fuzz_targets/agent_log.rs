//! See `runtime::fuzzing::agent_log`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| runtime::fuzzing::agent_log(data));
