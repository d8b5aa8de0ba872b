//! `io.katacontainers.config.*` annotations of a pod.
//!
//! Hypervisor annotations need their name in `enable_annotations`. Everything that is not applied is said in a warning.

use std::collections::HashMap;
use std::str::FromStr;

use super::{ConfigError, ConfigFile, UnknownWord};

const PREFIX: &str = "io.katacontainers.config.";

/// Applies the annotations to `file`; the result has still to be validated. Returns the warnings.
///
/// # Errors
/// [`ConfigError::Value`] for an allowed annotation whose value has the wrong type.
pub fn apply(
    file: &mut ConfigFile,
    annotations: &HashMap<String, String>,
) -> Result<Vec<String>, ConfigError> {
    let mut warnings = Vec::new();
    let mut names: Vec<_> = annotations
        .iter()
        .filter(|(name, _)| name.starts_with(PREFIX))
        .collect();
    names.sort();
    for (name, value) in names {
        let suffix = &name[PREFIX.len()..];
        let applied = match suffix.split_once('.') {
            Some(("hypervisor", key))
                if !allowed(&file.config.hypervisor.dragonball.enable_annotations, key) =>
            {
                warnings.push(format!("annotation {name} is not in enable_annotations: ignored"));
                continue;
            }
            Some(("hypervisor", key)) => hypervisor(file, name, key, value)?,
            Some(("agent", key)) => agent(file, name, key, value)?,
            Some(("runtime", key)) => runtime(file, name, key, value)?,
            _ => false,
        };
        if !applied {
            warnings.push(format!("annotation {name} has no effect in this runtime"));
        }
    }
    Ok(warnings)
}

/// Entries are names, or patterns with `.*` as in Kata's shipped files; no other regular expression is understood.
fn allowed(enabled: &[String], key: &str) -> bool {
    enabled.iter().any(|entry| match entry.split_once(".*") {
        None => entry == key,
        Some((head, tail)) => {
            key.len() >= head.len() + tail.len() && key.starts_with(head) && key.ends_with(tail)
        }
    })
}

fn hypervisor(file: &mut ConfigFile, name: &str, key: &str, value: &str) -> Result<bool, ConfigError> {
    let config = &mut file.config.hypervisor.dragonball;
    let target = match key {
        "kernel" => {
            config.kernel = value.into();
            key
        }
        // The pod's choice replaces the file's, whichever of the two that was.
        "image" => {
            (config.image, config.initrd) = (Some(value.into()), None);
            key
        }
        "initrd" => {
            (config.initrd, config.image) = (Some(value.into()), None);
            key
        }
        "kernel_params" => {
            if !config.kernel_params.is_empty() {
                config.kernel_params.push(' ');
            }
            config.kernel_params.push_str(value);
            key
        }
        "default_vcpus" => set(&mut config.default_vcpus, name, value, key)?,
        "default_max_vcpus" => set(&mut config.default_maxvcpus, name, value, "default_maxvcpus")?,
        "default_memory" => set(&mut config.default_memory, name, value, key)?,
        "shared_fs" => set_word(&mut config.shared_fs, name, value, key)?,
        "virtio_fs_cache" => set_word(&mut config.virtio_fs_cache, name, value, key)?,
        "enable_debug" => set(&mut config.enable_debug, name, value, key)?,
        "network_queues" => set(&mut config.network_queues, name, value, key)?,
        "rx_rate_limiter_max_rate" => set(&mut config.rx_rate_limiter_max_rate, name, value, key)?,
        "tx_rate_limiter_max_rate" => set(&mut config.tx_rate_limiter_max_rate, name, value, key)?,
        _ => return Ok(false),
    };
    file.origins
        .annotated(name, &format!("hypervisor.dragonball.{target}"));
    Ok(true)
}

fn agent(file: &mut ConfigFile, name: &str, key: &str, value: &str) -> Result<bool, ConfigError> {
    let config = &mut file.config.agent.kata;
    match key {
        // Kata separates modules with `;`.
        "kernel_modules" => {
            config.kernel_modules = value
                .split(';')
                .map(str::trim)
                .filter(|m| !m.is_empty())
                .map(Into::into)
                .collect();
        }
        "container_pipe_size" => {
            set(&mut config.container_pipe_size, name, value, key)?;
        }
        _ => return Ok(false),
    }
    file.origins.annotated(name, &format!("agent.kata.{key}"));
    Ok(true)
}

fn runtime(file: &mut ConfigFile, name: &str, key: &str, value: &str) -> Result<bool, ConfigError> {
    match key {
        "internetworking_model" => {
            set_word(&mut file.config.runtime.internetworking_model, name, value, key)?;
        }
        "disable_new_netns" => {
            set(&mut file.config.runtime.disable_new_netns, name, value, key)?;
        }
        "disable_guest_seccomp" => {
            // A pod may ask for more confinement, not for less.
            let mut disable = true;
            set(&mut disable, name, value, key)?;
            if disable && !file.config.runtime.disable_guest_seccomp {
                return Ok(false);
            }
            file.config.runtime.disable_guest_seccomp = disable;
        }
        "create_container_timeout" => {
            set(
                &mut file.config.agent.kata.create_container_timeout,
                name,
                value,
                key,
            )?;
        }
        _ => return Ok(false),
    }
    file.origins.annotated(name, &format!("runtime.{key}"));
    Ok(true)
}

/// As [`set`], for a key whose values are words.
fn set_word<'a, T: FromStr<Err = UnknownWord>>(
    field: &mut T,
    name: &str,
    value: &str,
    key: &'a str,
) -> Result<&'a str, ConfigError> {
    *field = value.parse().map_err(|error: UnknownWord| ConfigError::Value {
        origin: format!("annotation {name}"),
        key: error.key.to_owned(),
        value: format!("{value:?}"),
        allowed: error.allowed,
    })?;
    Ok(key)
}

fn set<'a, T: FromStr>(field: &mut T, name: &str, value: &str, key: &'a str) -> Result<&'a str, ConfigError> {
    *field = value.parse().map_err(|_| ConfigError::Value {
        origin: format!("annotation {name}"),
        key: key.to_owned(),
        value: format!("{value:?}"),
        allowed: format!("must be a value of type {}", std::any::type_name::<T>()),
    })?;
    Ok(key)
}
