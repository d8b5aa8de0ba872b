//! Values of the configuration that are words: each key has an enum, so that nothing beyond this module compares strings.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A word that its key does not know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} = {value:?}: {allowed}")]
pub struct UnknownWord {
    /// Full key.
    pub key: &'static str,
    /// What was given.
    pub value: String,
    /// What is allowed.
    pub allowed: String,
}

/// Declares the enum of a key: its variants with their spelling and, after `|`, spellings that are read as well.
macro_rules! words {
    ($($(#[$doc:meta])* $name:ident = $key:literal {
        $($(#[$variant_doc:meta])* $variant:ident = $word:literal $(| $other:literal)*,)*
    })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl $name {
            /// As the file has it.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }

        impl FromStr for $name {
            type Err = UnknownWord;

            fn from_str(text: &str) -> Result<Self, UnknownWord> {
                match text {
                    $($word $(| $other)* => Ok(Self::$variant),)*
                    _ => Err(UnknownWord {
                        key: $key,
                        value: text.to_owned(),
                        allowed: format!("must be one of {}", [$($word, $($other,)*)*].join(", ")),
                    }),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
    )*};
}

words! {
    /// How container files reach the guest.
    SharedFs = "hypervisor.dragonball.shared_fs" {
        /// virtio-fs, served by threads of the shim.
        InlineVirtioFs = "inline-virtio-fs" | "virtio-fs",
    }

    /// Guest caching of shared files.
    VirtioFsCache = "hypervisor.dragonball.virtio_fs_cache" {
        /// Every look goes to the host.
        Never = "never",
        /// For a moment.
        Auto = "auto",
        /// Until the guest changes them itself.
        Always = "always",
    }

    /// What the guest's processors look like.
    CpuTemplate = "hypervisor.dragonball.cpu_template" {
        /// As the host's.
        None = "none",
        /// SSE4.2 and POPCNT.
        V2 = "x86-64-v2",
        /// AVX2, BMI, FMA, MOVBE.
        V3 = "x86-64-v3",
        /// AVX-512.
        V4 = "x86-64-v4",
    }

    /// Filesystem of a guest image.
    RootfsType = "hypervisor.dragonball.rootfs_type" {
        /// ext4
        Ext4 = "ext4",
        /// XFS
        Xfs = "xfs",
        /// EROFS
        Erofs = "erofs",
    }

    /// What connects the links of a pod's network namespace with its guest.
    #[derive(Default)]
    InternetworkingModel = "runtime.internetworking_model" {
        /// A TAP beside each link, and a filter on both.
        #[default]
        TcFilter = "tcfilter",
        /// A macvtap on top of each link.
        MacVtap = "macvtap",
        /// A TAP beside each link, connected by somebody else.
        None = "none",
    }

    /// What runs containers; Kata knows others.
    RuntimeName = "runtime.name" {
        /// In a VM, through the guest's agent.
        VirtContainer = "virt_container",
    }

    /// The VMM; Kata knows others.
    HypervisorName = "runtime.hypervisor_name" {
        /// `dragonball`, in this process.
        Dragonball = "dragonball",
    }

    /// The guest's agent.
    AgentName = "runtime.agent_name" {
        /// Kata's protocol.
        Kata = "kata",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn word_when_spelled_otherwise_is_written_in_one_way() {
        for (text, value, written) in [
            ("inline-virtio-fs", SharedFs::InlineVirtioFs, "inline-virtio-fs"),
            ("virtio-fs", SharedFs::InlineVirtioFs, "inline-virtio-fs"),
        ] {
            assert_eq!(text.parse(), Ok(value));
            assert_eq!(value.to_string(), written);
        }
        assert_eq!("always".parse(), Ok(VirtioFsCache::Always));
    }

    #[test]
    fn word_when_unknown_is_named_with_its_key() {
        let error = "sometimes".parse::<VirtioFsCache>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "hypervisor.dragonball.virtio_fs_cache = \"sometimes\": must be one of never, auto, always"
        );
    }
}
