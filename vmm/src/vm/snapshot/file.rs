//! The state file: a header that says what follows, and the state in postcard.
//!
//! ```text
//! 0  "DBALSNAP"   8  version   12  CRC-32 of the state   16  length of the state   24  state
//! ```
//! All numbers are little-endian. The file is written under another name and renamed when it is complete.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::staged::Staged;
use super::{InvalidState, StateFileError};
use crate::devices::virtio::state::decode_all;

const MAGIC: [u8; 8] = *b"DBALSNAP";
/// Version of the format; a state of another version is refused. Count it up with every change of a saved type.
pub const VERSION: u32 = 5;
const HEADER_BYTES: usize = 24;
/// Largest state: what a file may make us allocate. Devices are bounded one by one.
const MAX_BYTES: u64 = 512 << 20;

/// Writes `state` to a file that is to be `path`, and waits until it is on disk.
///
/// # Errors
/// [`StateFileError`].
pub(super) fn stage(path: &Path, state: &impl Serialize) -> Result<Staged, StateFileError> {
    let io = |source| StateFileError::Io {
        path: path.to_owned(),
        source,
    };
    let body = postcard::to_stdvec(state).map_err(|error| StateFileError::Invalid {
        path: path.to_owned(),
        reason: InvalidState::Content(error.into()),
    })?;
    let staged = Staged::create(path).map_err(io)?;
    staged.file().write_all(&header(&body)).map_err(io)?;
    staged.file().write_all(&body).map_err(io)?;
    staged.sync().map_err(io)?;
    Ok(staged)
}

/// The header of a file with the state `body`.
pub fn header(body: &[u8]) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    let fields = MAGIC
        .into_iter()
        .chain(VERSION.to_le_bytes())
        .chain(crc32fast::hash(body).to_le_bytes())
        .chain((body.len() as u64).to_le_bytes());
    for (to, from) in header.iter_mut().zip(fields) {
        *to = from;
    }
    header
}

/// Reads the state at `path`.
///
/// # Errors
/// [`StateFileError`], which says whether the file is none of ours, of another version, cut off or damaged.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, StateFileError> {
    let io = |source| StateFileError::Io {
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(io)?;
    file.take(MAX_BYTES + HEADER_BYTES as u64)
        .read_to_end(&mut bytes)
        .map_err(io)?;
    parse(&bytes).map_err(|reason| StateFileError::Invalid {
        path: path.to_owned(),
        reason,
    })
}

/// Reads a state from the bytes of its file. None of them are trusted.
///
/// # Errors
/// What is wrong.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, InvalidState> {
    let Some((header, body)) = bytes.split_at_checked(HEADER_BYTES) else {
        return Err(InvalidState::NoState);
    };
    let word = |at: usize| -> u32 {
        let bytes = header.get(at..at + 4).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    };
    if !header.starts_with(&MAGIC) {
        return Err(InvalidState::NoState);
    }
    let found = word(8);
    if found != VERSION {
        return Err(InvalidState::Version {
            found,
            supported: VERSION,
        });
    }
    let (found, expected) = (body.len() as u64, u64::from(word(16)) | u64::from(word(20)) << 32);
    if found != expected {
        return Err(InvalidState::Length { found, expected });
    }
    let (found, expected) = (crc32fast::hash(body), word(12));
    if found != expected {
        return Err(InvalidState::Checksum { found, expected });
    }
    decode_all(body).map_err(InvalidState::Content)
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::tempdir::TempDir;

    use super::*;

    #[test]
    fn parse_when_cut_or_flipped_anywhere_is_refused() {
        let dir = TempDir::new_with_prefix("/tmp/dragonball-state").unwrap();
        let path = dir.as_path().join("state");
        let state: Vec<u32> = (0..50).map(|n| n * 77_777).collect();
        stage(&path, &state).unwrap().commit().unwrap();
        assert_eq!(read::<Vec<u32>>(&path).unwrap(), state);
        let bytes = std::fs::read(&path).unwrap();
        for len in 0..bytes.len() {
            assert!(parse::<Vec<u32>>(&bytes[..len]).is_err(), "{len}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(parse::<Vec<u32>>(&damaged).is_err(), "bit {bit}");
        }
        // Of the version before, as that one wrote it.
        let mut older = bytes.clone();
        older[8] = 4;
        std::fs::write(&path, &older).unwrap();
        assert!(matches!(
            read::<Vec<u32>>(&path),
            Err(StateFileError::Invalid {
                reason: InvalidState::Version {
                    found: 4,
                    supported: VERSION
                },
                ..
            })
        ));
        assert!(parse::<Vec<u32>>(&[&bytes[..], &[0]].concat()).is_err());
    }
}
