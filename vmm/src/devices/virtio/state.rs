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

/// A device's state cannot be saved or restored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The device is in a state that has no form outside this process.
    #[error("{device}: cannot be saved: {reason}")]
    Unsupported {
        /// Device id from the configuration.
        device: String,
        /// What stands in the way, and what to do.
        reason: String,
    },
    /// The bytes are not a state of this device.
    #[error("{device}: saved state is invalid: {reason}")]
    Invalid {
        /// Device id from the configuration.
        device: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Encodes `state` of `device` (its id, for the error).
///
/// # Errors
/// [`StateError::Unsupported`] when it is larger than [`MAX_STATE_BYTES`].
pub fn encode(device: &str, state: &impl Serialize) -> Result<Vec<u8>, StateError> {
    let unsupported = |reason: String| StateError::Unsupported {
        device: device.to_owned(),
        reason,
    };
    let bytes = postcard::to_stdvec(state).map_err(|e| unsupported(e.to_string()))?;
    if bytes.len() > MAX_STATE_BYTES {
        return Err(unsupported(format!("{} bytes of state", bytes.len())));
    }
    Ok(bytes)
}

/// Decodes what [`encode`] gave; all of `bytes` must belong to it.
///
/// # Errors
/// [`StateError::Invalid`].
pub fn decode<T: DeserializeOwned>(device: &str, bytes: &[u8]) -> Result<T, StateError> {
    let invalid = |reason: String| StateError::Invalid {
        device: device.to_owned(),
        reason,
    };
    match postcard::take_from_bytes(bytes) {
        Ok((state, [])) => Ok(state),
        Ok((_, rest)) => Err(invalid(format!("{} bytes too many", rest.len()))),
        Err(error) => Err(invalid(error.to_string())),
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
