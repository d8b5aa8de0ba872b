//! Finding, reading and merging configuration files.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::de::DeTable;

use super::inert::{Verdict, judge};
use super::{ConfigError, TomlConfig};
use crate::types::RuntimeOptions;

/// Names a file to use when containerd names none.
const ENVIRONMENT: &str = "KATA_CONF_FILE";

/// Where configurations are installed, first match wins.
const SEARCH: [&str; 5] = [
    "/etc/kata-containers/runtime-rs/configuration.toml",
    "/etc/kata-containers/configuration.toml",
    "/usr/share/defaults/kata-containers/runtime-rs/configuration.toml",
    "/usr/share/defaults/kata-containers/configuration.toml",
    "/opt/kata/share/defaults/kata-containers/configuration.toml",
];

/// Where a value came from: a file, the request, an annotation, or nothing (a built-in default).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A configuration file or drop-in.
    File(PathBuf),
    /// `config_body` of the create request.
    Request,
    /// An annotation of the pod, by its full name.
    Annotation(String),
    /// The limits of the pod's containers.
    Limits,
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "configuration {}", path.display()),
            Self::Request => f.write_str("configuration of the create request"),
            Self::Annotation(name) => write!(f, "annotation {name}"),
            Self::Limits => f.write_str("limits of the pod"),
        }
    }
}

/// Who set which key; later layers win.
#[derive(Debug, Clone, Default)]
pub struct Origins {
    layers: Vec<(Origin, toml::Table)>,
}

impl Origins {
    /// Who set the dotted `key` last, for error messages.
    pub fn of(&self, key: &str) -> String {
        self.layers
            .iter()
            .rev()
            .find(|(_, table)| lookup(table, key).is_some())
            .map_or_else(
                || "built-in configuration".to_owned(),
                |(origin, _)| origin.to_string(),
            )
    }

    /// Notes that the annotation `name` has set the dotted `key`.
    pub fn annotated(&mut self, name: &str, key: &str) {
        self.set_by(Origin::Annotation(name.to_owned()), key);
    }

    /// Notes that `origin` has set the dotted `key`.
    pub fn set_by(&mut self, origin: Origin, key: &str) {
        let mut value = toml::Value::Boolean(true);
        for part in key.rsplit('.') {
            value = toml::Value::Table(toml::Table::from_iter([(part.to_owned(), value)]));
        }
        if let toml::Value::Table(table) = value {
            self.layers.push((origin, table));
        }
    }
}

fn lookup<'a>(table: &'a toml::Table, key: &str) -> Option<&'a toml::Value> {
    match key.split_once('.') {
        None => table.get(key),
        Some((first, rest)) => lookup(table.get(first)?.as_table()?, rest),
    }
}

/// A configuration with its origins and the warnings that came up while reading it.
#[derive(Debug, Clone, Default)]
pub struct ConfigFile {
    /// The merged values.
    pub config: TomlConfig,
    /// Who set what.
    pub origins: Origins,
    /// One line per key without effect; also logged.
    pub warnings: Vec<String>,
}

/// Reads and checks the configuration for `options`; warnings go to the log.
///
/// # Errors
/// A [`ConfigError`] naming file, key and value.
pub fn load(options: &RuntimeOptions) -> Result<ConfigFile, ConfigError> {
    let file = read(options)?;
    file.config.validate(&file.origins)?;
    Ok(file)
}

/// As [`load`] without checking the values: a pod's annotations and limits still change them.
///
/// # Errors
/// A [`ConfigError`] naming file, key and value.
pub fn read(options: &RuntimeOptions) -> Result<ConfigFile, ConfigError> {
    let environment = std::env::var_os(ENVIRONMENT)
        .filter(|path| !path.is_empty())
        .map(PathBuf::from);
    let file = load_with(options, environment.as_deref(), &SEARCH.map(Path::new))?;
    for warning in &file.warnings {
        tracing::warn!("{warning}");
    }
    Ok(file)
}

/// As [`load`], with the environment and the search list given, and neither logging nor checking.
///
/// # Errors
/// A [`ConfigError`] naming file, key and value.
pub fn load_with(
    options: &RuntimeOptions,
    environment: Option<&Path>,
    search: &[&Path],
) -> Result<ConfigFile, ConfigError> {
    let mut file = ConfigFile::default();
    if !options.config_body.is_empty() {
        let text = str::from_utf8(&options.config_body).map_err(|error| ConfigError::Parse {
            origin: Origin::Request.to_string(),
            line: 1,
            message: error.to_string(),
        })?;
        file.add(Origin::Request, text)?;
    } else if let Some(path) = choose(options, environment, search)? {
        for path in std::iter::once(path.clone()).chain(drop_ins(&path)?) {
            let text = fs::read_to_string(&path).map_err(|source| ConfigError::Read {
                path: path.clone(),
                source,
            })?;
            file.add(Origin::File(path), &text)?;
        }
    } else {
        tracing::info!(searched = ?search, "no configuration file: built-in defaults");
    }
    file.merge()?;
    Ok(file)
}

fn choose(
    options: &RuntimeOptions,
    environment: Option<&Path>,
    search: &[&Path],
) -> Result<Option<PathBuf>, ConfigError> {
    let named = Some(options.config_path.as_str())
        .filter(|path| !path.is_empty())
        .map(Path::new)
        .or(environment);
    match named {
        Some(path) if path.is_file() => Ok(Some(path.to_owned())),
        Some(path) => Err(ConfigError::Missing {
            path: path.to_owned(),
        }),
        None => Ok(search
            .iter()
            .find(|path| path.is_file())
            .map(|path| path.to_path_buf())),
    }
}

/// `config.d/*.toml` beside `path`, in alphabetical order.
fn drop_ins(path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let folder = path.with_file_name("config.d");
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(ConfigError::Read { path: folder, source }),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry
            .map_err(|source| ConfigError::Read {
                path: folder.clone(),
                source,
            })?
            .path();
        if path.extension().is_some_and(|extension| extension == "toml") && path.is_file() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

impl ConfigFile {
    /// Reads one layer on its own, so that a mistake is reported with its file.
    fn add(&mut self, origin: Origin, text: &str) -> Result<(), ConfigError> {
        let parse_error = |error: &toml::de::Error| ConfigError::Parse {
            origin: origin.to_string(),
            line: error.span().map_or(1, |span| {
                text.get(..span.start).unwrap_or("").matches('\n').count() + 1
            }),
            message: error.message().replace('\n', " "),
        };
        // Parsed once: as the typed values, for what is wrong with them and where, and as a table to merge.
        let parsed = DeTable::parse(text).map_err(|error| parse_error(&error))?;
        let mut ignored = Vec::new();
        let typed = toml::Deserializer::from(parsed.clone());
        let _: TomlConfig = serde_ignored::deserialize(typed, |path| ignored.push(path.to_string()))
            .map_err(|error| parse_error(&error))?;
        let table = toml::Table::deserialize(toml::Deserializer::from(parsed))
            .map_err(|error| parse_error(&error))?;
        for key in ignored {
            let value = lookup(&table, &key).map(ToString::to_string).unwrap_or_default();
            match judge(&key, &value) {
                Verdict::Harmless => {}
                Verdict::NoEffect => {
                    self.warnings
                        .push(format!("{origin}: {key} = {value} has no effect in this runtime"));
                }
                Verdict::Unknown => self.warnings.push(format!("{origin}: unknown key {key}")),
            }
        }
        self.origins.layers.push((origin, table));
        Ok(())
    }

    fn merge(&mut self) -> Result<(), ConfigError> {
        let mut merged = toml::Table::new();
        for (_, layer) in &self.origins.layers {
            merge_table(&mut merged, layer);
        }
        // Each layer has been deserialized on its own, so the types fit; only a later layer that turns a table into
        // a value can still fail.
        self.config = TomlConfig::deserialize(merged).map_err(|error| ConfigError::Parse {
            origin: "merged configuration".into(),
            line: 1,
            message: error.message().replace('\n', " "),
        })?;
        let hypervisor = &self.config.hypervisor.dragonball;
        if hypervisor.factory.enable_template {
            self.warn_unused(
                "hypervisor.dragonball.factory.enable_template",
                "VM templates are not provided",
            );
        }
        if self.config.agent.kata.mem_agent.get("mem_agent_enable") == Some(&toml::Value::Boolean(true)) {
            self.warn_unused(
                "agent.kata.mem_agent.mem_agent_enable",
                "the memory agent is not provided",
            );
        }
        for arg in self.config.hypervisor.dragonball.virtio_fs_extra_args.clone() {
            let used = arg.starts_with("--thread-pool-size=") || arg == "-o" || arg == "announce_submounts";
            if !used {
                self.warn_unused(
                    "hypervisor.dragonball.virtio_fs_extra_args",
                    &format!("{arg:?} has no effect"),
                );
            }
        }
        Ok(())
    }

    fn warn_unused(&mut self, key: &str, reason: &str) {
        self.warnings
            .push(format!("{}: {key}: {reason}", self.origins.of(key)));
    }
}

fn merge_table(base: &mut toml::Table, layer: &toml::Table) {
    for (key, value) in layer {
        match (base.get_mut(key), value) {
            (Some(toml::Value::Table(base)), toml::Value::Table(layer)) => merge_table(base, layer),
            _ => {
                base.insert(key.clone(), value.clone());
            }
        }
    }
}
