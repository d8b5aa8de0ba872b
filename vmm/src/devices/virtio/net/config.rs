//! The knobs of a network interface.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Net;
use crate::devices::virtio::config::{Complete, KnobError, Knobs, OpenError, Opened};
use crate::rate_limiter::RateLimiterConfig;

/// A network interface over a TAP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Device id.
    pub id: String,
    /// The host side.
    pub tap: TapConfig,
    /// Hardware address of the guest's interface; `None`: a locally administered one made from the device id, the TAP's
    /// name and its namespace, the same each time.
    pub mac: Option<[u8; 6]>,
    /// MTU the guest is told, 68 or more bytes; `None`: it takes 1500. The TAP's own MTU is its owner's affair.
    pub mtu: Option<u16>,
    /// Pairs of receive and transmit queues, 1..=[`MAX_QUEUE_PAIRS`].
    pub queue_pairs: u8,
    /// Entries of each receive and transmit queue: a power of two, 32..=1024. (Linux stops transmitting while a frame of
    /// 19 descriptors would not fit.)
    pub queue_size: u16,
    /// Limit on what the guest receives; excess waits in the TAP, which drops when its own queue is full.
    #[serde(default)]
    pub rx_rate_limiter: RateLimiterConfig,
    /// Limit on what the guest sends; excess waits in the ring.
    #[serde(default)]
    pub tx_rate_limiter: RateLimiterConfig,
}

/// Most queue pairs of a network interface.
pub const MAX_QUEUE_PAIRS: u8 = 8;

/// A TAP: an existing one is attached to and stays when the machine ends (if it is persistent); otherwise one is made,
/// which is gone with the machine. It is set up, given addresses and a bridge by whoever owns it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TapConfig {
    /// Interface name, 1 to 15 bytes.
    pub name: String,
    /// Network namespace it is in, e.g. `/run/netns/pod`; `None`: the caller's.
    #[serde(default)]
    pub netns: Option<PathBuf>,
}

impl NetConfig {
    /// An interface called `id` over the TAP `tap` of the caller's namespace: one queue pair of 256 entries, no limits.
    pub fn new(id: &str, tap: &str) -> Self {
        Self {
            id: id.to_owned(),
            tap: TapConfig {
                name: tap.to_owned(),
                netns: None,
            },
            mac: None,
            mtu: None,
            queue_pairs: 1,
            queue_size: 256,
            rx_rate_limiter: RateLimiterConfig::default(),
            tx_rate_limiter: RateLimiterConfig::default(),
        }
    }
}

impl Knobs for NetConfig {
    fn id(&self) -> &str {
        &self.id
    }

    fn validate(&self) -> Result<(), KnobError> {
        let error = |knob, value: &dyn std::fmt::Debug, need: String| {
            Err(KnobError::new(&self.id, knob, value, need))
        };
        let name = &self.tap.name;
        // What the kernel's dev_valid_name refuses, and %, which it takes for a pattern.
        let bad = |c: char| !c.is_ascii_graphic() || matches!(c, '/' | ':' | '%');
        if name.is_empty() || name.len() > 15 || name.contains(bad) || name == "." || name == ".." {
            let need = "an interface name (1 to 15 characters, no / : %)".to_owned();
            return error("tap.name", name, need);
        }
        if let Some(mac) = self.mac
            && (mac[0] & 1 != 0 || mac == [0; 6])
        {
            let value = format_args!("{mac:02x?}");
            return error("mac", &value, "the address of one interface".to_owned());
        }
        if let Some(mtu) = self.mtu
            && mtu < 68
        {
            return error("mtu", &mtu, "68 or more".to_owned());
        }
        if self.queue_pairs == 0 || self.queue_pairs > MAX_QUEUE_PAIRS {
            return error(
                "queue_pairs",
                &self.queue_pairs,
                format!("1 to {MAX_QUEUE_PAIRS}"),
            );
        }
        if !self.queue_size.is_power_of_two() || !(32..=1024).contains(&self.queue_size) {
            let need = "a power of two from 32 to 1024".to_owned();
            return error("queue_size", &self.queue_size, need);
        }
        KnobError::check_limiter(&self.id, "rx_rate_limiter", &self.rx_rate_limiter)?;
        KnobError::check_limiter(&self.id, "tx_rate_limiter", &self.tx_rate_limiter)
    }

    fn open(&self) -> Result<Box<dyn Opened>, OpenError> {
        Ok(Complete::opened(Net::new(self)?))
    }

    fn adopt(&self, fds: Vec<OwnedFd>) -> Result<Box<dyn Opened>, OpenError> {
        Ok(Complete::opened(Net::with_fds(self, fds)?))
    }
}
