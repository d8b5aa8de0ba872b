//! See `runtime::fuzzing::agent_stats`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| runtime::fuzzing::agent_stats(data));
