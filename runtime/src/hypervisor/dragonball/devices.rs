//! The runtime's devices, as the VMM wants them.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use dragonball::Vm;
use dragonball::config as vmm;
use dragonball::config::{RateLimiterConfig, TokenBucketConfig};
use dragonball::devices::virtio::net::NetHandle;

use super::errors::hotplug_error;
use crate::config::VirtioFsCache;
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::{BlockDevice, DeviceType, NetworkDevice, ShareFsDevice};

/// Time from an empty bucket to a full one: what a limited interface may send at once is a tenth of a second's worth.
const REFILL_MS: u64 = 100;

/// The network interfaces of a VM, by device id: what is needed to change them later.
#[derive(Debug, Default)]
pub(super) struct Interfaces(Mutex<HashMap<String, NetHandle>>);

impl Interfaces {
    /// Gives `vm` an interface.
    pub(super) fn add(&self, vm: &Vm, device: &NetworkDevice) -> Result<()> {
        let queues = device.queues.take();
        if queues.is_empty() {
            let message = format!("network device {}: its TAP has been used up", device.id);
            return Err(Error::new(ErrorKind::FailedPrecondition, message));
        }
        let (_, handle) = vm.add_net(net(device, &queues)?, queues).map_err(hotplug_error)?;
        self.handles().insert(device.id.clone(), handle);
        Ok(())
    }

    /// Puts the limits of `device` in force.
    pub(super) fn limit(&self, device: &NetworkDevice) -> Result<()> {
        let handle = self.handles().get(&device.id).cloned().ok_or_else(|| {
            let message = format!("network device {}: the VM has no such device", device.id);
            Error::new(ErrorKind::NotFound, message)
        })?;
        let limits = device.limits;
        handle
            .set_rate_limits(limiter(limits.rx), limiter(limits.tx))
            .map_err(|error| Error::new(ErrorKind::InvalidArgument, error.to_string()))
    }

    /// The device `id`, of whichever type, has left the VM.
    pub(super) fn removed(&self, id: &str) {
        self.handles().remove(id);
    }

    fn handles(&self) -> MutexGuard<'_, HashMap<String, NetHandle>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A device as part of a VM's configuration; `None` for an interface, which is added with its open descriptors.
pub(super) fn device(device: &DeviceType) -> Option<vmm::DeviceConfig> {
    match device {
        DeviceType::Block(device) => Some(block(device)),
        DeviceType::ShareFs(device) => Some(share(device)),
        DeviceType::Network(_) => None,
    }
}

pub(super) fn block(device: &BlockDevice) -> vmm::DeviceConfig {
    vmm::DeviceConfig::Block(vmm::BlockConfig {
        read_only: device.read_only,
        ..vmm::BlockConfig::new(&device.id, &device.path)
    })
}

fn share(device: &ShareFsDevice) -> vmm::DeviceConfig {
    vmm::DeviceConfig::Fs(vmm::FsConfig {
        cache: match device.cache {
            VirtioFsCache::Never => vmm::FsCache::Never,
            VirtioFsCache::Auto => vmm::FsCache::Auto,
            VirtioFsCache::Always => vmm::FsCache::Always,
        },
        threads: device.threads,
        ..vmm::FsConfig::new(
            device.id.clone(),
            device.tag.clone(),
            vmm::FsRoot::Directory(vmm::SharedDir::writable(&device.shared_dir)),
        )
    })
}

fn net(device: &NetworkDevice, queues: &[OwnedFd]) -> Result<vmm::NetConfig> {
    let queue_pairs = u8::try_from(queues.len()).map_err(|_| {
        let message = format!(
            "network device {}: {} queues are too many",
            device.id,
            queues.len()
        );
        Error::new(ErrorKind::InvalidArgument, message)
    })?;
    Ok(vmm::NetConfig {
        mac: Some(device.mac),
        queue_pairs,
        rx_rate_limiter: limiter(device.limits.rx),
        tx_rate_limiter: limiter(device.limits.tx),
        ..vmm::NetConfig::new(&device.id, &device.tap)
    })
}

/// The limiter for `bits` a second; 0 for none.
fn limiter(bits: u64) -> RateLimiterConfig {
    let bucket = TokenBucketConfig {
        size: (bits / 8 / (1000 / REFILL_MS)).max(1),
        one_time_burst: 0,
        refill_time_ms: REFILL_MS,
    };
    RateLimiterConfig {
        bandwidth: (bits > 0).then_some(bucket),
        ops: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limiter_when_asked_for_bits_a_second_counts_bytes() {
        let bytes_a_second = |bits| {
            let bucket = limiter(bits).bandwidth.unwrap();
            u128::from(bucket.size) * 1000 / u128::from(bucket.refill_time_ms)
        };

        assert_eq!(limiter(0), RateLimiterConfig::default());
        assert_eq!(bytes_a_second(10_000_000), 1_250_000);
        assert_eq!(bytes_a_second(u64::MAX), u128::from(u64::MAX / 80) * 10);
        // What is too little for a byte in a tenth of a second is rounded up: no limit means another thing.
        assert_eq!(bytes_a_second(1), 10);
        for bits in [1, 7, 79, 1000, u64::MAX] {
            limiter(bits).validate().unwrap();
        }
    }
}
