//! Every target over pseudo-random inputs and its corpus, so that none rots.

use std::path::Path;

use super::TARGETS;

/// Inputs per target.
const INPUTS: u64 = 200;

/// A sequence of numbers that is the same each time (xorshift64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn input(&mut self) -> Vec<u8> {
        let len = self.next() % 400;
        let mut input: Vec<u8> = (0..len).map(|_| (self.next() >> 24) as u8).collect();
        // All features and all queues, most of the time.
        if let Some(first) = input.first_mut()
            && !self.next().is_multiple_of(4)
        {
            *first &= !1;
        }
        input
    }
}

fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz"))
}

macro_rules! targets {
    ($($name:ident),* $(,)?) => {
        $(mod $name {
            #[test]
            fn target_when_given_random_inputs_and_its_corpus_survives() {
                super::survive(stringify!($name), crate::fuzzing::$name);
            }
        })*

        #[test]
        fn targets_when_listed_agree_with_the_fuzz_crate() {
            let names = [$(stringify!($name)),*];
            let manifest = std::fs::read_to_string(folder().join("Cargo.toml")).unwrap();
            let listed: Vec<_> = TARGETS.iter().map(|(name, _)| *name).collect();
            assert_eq!(listed, names);
            assert_eq!(manifest.matches("[[bin]]").count(), names.len());
            for name in names {
                assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
                let source = std::fs::read_to_string(folder().join(format!("fuzz_targets/{name}.rs"))).unwrap();
                assert!(source.contains(&format!("dragonball::fuzzing::{name}(data)")), "{name}");
            }
        }
    };
}

targets!(
    balloon,
    block,
    device_state,
    fs,
    hvsock,
    machine_state,
    mem,
    mmio_transport,
    net,
    vsock
);

fn survive(name: &str, target: fn(&[u8])) {
    target(&[]);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..INPUTS {
        target(&random.input());
    }
    let mut seeds = 0;
    for entry in std::fs::read_dir(folder().join("seeds").join(name)).unwrap() {
        target(&std::fs::read(entry.unwrap().path()).unwrap());
        seeds += 1;
    }
    assert!(seeds > 0, "{name} has no corpus");
}
