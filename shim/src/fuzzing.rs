//! Entry functions of the fuzz targets in `runtime/fuzz` that read containerd's messages. Not part of the API.
//!
//! See `runtime::fuzzing`, which has those of the runtime.

// Of tests and fuzzing.
#![allow(clippy::expect_used)]

use containerd_shim_protos::bootstrap_api::BootstrapParams;
use protobuf::Message;
use protobuf::well_known_types::any::Any;

use crate::{bootstrap, options, pod};

/// Any bytes on stdin of `start`, whoever they name, and as the options of a create request.
pub fn bootstrap(data: &[u8]) {
    let sent = BootstrapParams::parse_from_bytes(data).unwrap_or_default();
    let params = bootstrap::params(data, &sent.namespace, &sent.instance_id);
    if let Some(params) = &params {
        bootstrap::wants_debug(params);
        assert!(
            bootstrap::params(data, "another", &sent.instance_id).is_none() || sent.namespace == "another"
        );
    }
    for params in [params.as_ref(), None] {
        if let Some(found) = bootstrap::runtime_options(data, params) {
            let any = Any::parse_from_bytes(&found).expect("a message that was written here");
            assert!(options::is_options(&any));
            // Wrong ones are the user's to hear of.
            let _ = options::decode(Some(&any));
        }
    }
    if let Ok(any) = Any::parse_from_bytes(data) {
        let _ = options::decode(Some(&any));
        let _ = pod::decode(Some(&any));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    #[test]
    fn bootstrap_when_given_its_corpus_and_what_is_like_it_survives() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../runtime/fuzz/seeds/bootstrap");
        let mut seeds = 0;
        for entry in fs::read_dir(folder).unwrap() {
            let seed = fs::read(entry.unwrap().path()).unwrap();
            super::bootstrap(&seed);
            for at in 0..seed.len() {
                let (before, rest) = seed.split_at(at);
                let (byte, after) = rest.split_first().unwrap();
                super::bootstrap(before);
                super::bootstrap(&[before, after].concat());
                super::bootstrap(&[before, &[byte.wrapping_add(1)], after].concat());
                super::bootstrap(&[before, &[0xff], after].concat());
            }
            seeds += 1;
        }
        assert!(seeds > 0, "no corpus in {folder}");
    }
}
