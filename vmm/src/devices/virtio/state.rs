//! What devices share for save and restore: positions of queues, and the encoding of what a device knows.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Largest state of one device, in bytes: what a file may make us allocate.
pub const MAX_STATE_BYTES: usize = 64 << 20;

/// Where the device stands in a queue; addresses and size are the transport's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuePosition {
    /// Index of the queue in the device.
    pub index: u16,
    /// Entry of the avail ring the device takes next, modulo 2¹⁶.
    pub next_avail: u16,
    /// Entry of the used ring the device fills next, modulo 2¹⁶.
    pub next_used: u16,
}

/// A device's state cannot be saved or restored. What is in the way is an enum of the device's own.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The device is in a state that has no form outside this process.
    #[error("{device}: cannot be saved: {source}")]
    Unsupported {
        /// Device id from the configuration.
        device: String,
        /// What stands in the way, and what to do.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The bytes are not a state of this device.
    #[error("{device}: saved state is invalid: {source}")]
    Invalid {
        /// Device id from the configuration.
        device: String,
        /// What is wrong with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl StateError {
    /// `device` cannot be saved because of `source`.
    pub fn unsupported(device: &str, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Unsupported {
            device: device.to_owned(),
            source: Box::new(source),
        }
    }

    /// What was saved is no state of `device` because of `source`.
    pub fn invalid(device: &str, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self::Invalid {
            device: device.to_owned(),
            source: Box::new(source),
        }
    }
}

/// A state is not what postcard makes of one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodingError {
    /// It cannot be written, or is cut off or damaged.
    #[error(transparent)]
    Postcard(#[from] postcard::Error),
    /// More than anybody reads.
    #[error("{0} bytes of state, at most {MAX_STATE_BYTES}")]
    TooLarge(usize),
    /// There is something after it.
    #[error("{0} bytes too many")]
    Leftover(usize),
}

/// Encodes `state` of `device` (its id, for the error).
///
/// # Errors
/// [`StateError::Unsupported`] when it is larger than [`MAX_STATE_BYTES`].
pub fn encode(device: &str, state: &impl Serialize) -> Result<Vec<u8>, StateError> {
    let bytes = postcard::to_stdvec(state).map_err(EncodingError::from);
    let bounded = bytes.and_then(|bytes| match bytes.len() {
        0..=MAX_STATE_BYTES => Ok(bytes),
        len => Err(EncodingError::TooLarge(len)),
    });
    bounded.map_err(|error| StateError::unsupported(device, error))
}

/// Decodes what [`encode`] gave; all of `bytes` must belong to it.
///
/// # Errors
/// [`StateError::Invalid`].
pub fn decode<T: DeserializeOwned>(device: &str, bytes: &[u8]) -> Result<T, StateError> {
    decode_all(bytes).map_err(|error| StateError::invalid(device, error))
}

/// What postcard made of a value, and nothing else after it.
///
/// # Errors
/// [`EncodingError`].
pub fn decode_all<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, EncodingError> {
    match postcard::take_from_bytes(bytes)? {
        (state, []) => Ok(state),
        (_, rest) => Err(EncodingError::Leftover(rest.len())),
    }
}

/// For devices that know nothing beyond configuration and queues.
///
/// # Errors
/// [`StateError::Invalid`] when there is a state all the same.
pub fn expect_none(device: &str, bytes: &[u8]) -> Result<(), StateError> {
    decode::<()>(device, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_when_bytes_are_left_over_or_missing_is_refused() {
        let bytes = encode("d", &(7u32, "x".to_owned())).unwrap();
        assert_eq!(decode::<(u32, String)>("d", &bytes).unwrap(), (7, "x".to_owned()));
        let longer = [&bytes[..], &[0]].concat();
        assert!(decode::<(u32, String)>("d", &longer).is_err());
        assert!(decode::<(u32, String)>("d", &bytes[..bytes.len() - 1]).is_err());
        assert!(expect_none("d", &[]).is_ok());
        assert!(expect_none("d", &[0]).is_err());
    }
}
