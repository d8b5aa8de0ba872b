//! What devices count, for [`DeviceMetrics`](crate::vm::DeviceMetrics).

use std::sync::atomic::{AtomicU64, Ordering};

/// One counter or gauge, written by a worker and read by anyone.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Replaces a gauge.
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Makes the counters of a device: a struct with a [`Counter`] for each, and `all`, which reads them under the name that is
/// shown.
macro_rules! counters {
    ($(#[$about:meta])* $visible:vis struct $name:ident {
        $($(#[$what:meta])* $field:ident: $shown:literal,)*
    }) => {
        $(#[$about])*
        #[derive(Debug, Default)]
        $visible struct $name {
            $($(#[$what])* pub(super) $field: $crate::devices::virtio::counter::Counter,)*
        }

        impl $name {
            /// All counters by name.
            $visible fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$(($shown, self.$field.get()),)*]
            }
        }
    };
}

pub(crate) use counters;
