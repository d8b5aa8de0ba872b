//! `rootfs-builder`: builds the guest image. An initramfs by default, whose `/init` is the static agent; or an EROFS
//! image for a block device. The same inputs give the same bytes.

#![forbid(unsafe_code)]

mod cpio;
mod erofs;
mod modules;
mod tree;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use modules::ModuleError;
use tree::Tree;

/// Builds the guest image around a static agent.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// The agent, linked statically
    #[arg(long, value_name = "FILE")]
    agent: PathBuf,
    /// Where to write the image
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Kind of image
    #[arg(long, value_enum, default_value_t = Format::Initramfs)]
    format: Format,
    /// Folder that holds lib/modules/RELEASE of a stock kernel, to add the drivers a guest needs
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
    /// Which RELEASE, if the folder has several
    #[arg(long, value_name = "RELEASE", requires = "modules")]
    kernel_release: Option<String>,
    /// Modules to add instead of the built-in list (names, separated by commas); their dependencies come along
    #[arg(long, value_name = "NAMES", requires = "modules", value_delimiter = ',')]
    module_list: Option<Vec<String>>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// newc cpio archive, uncompressed
    Initramfs,
    /// Read-only filesystem for a block device (needs mkfs.erofs)
    Erofs,
}

impl Format {
    /// Where the kernel looks for PID 1 (init/main.c): `/init` of an initramfs, `/sbin/init` first on a disk.
    fn init(self) -> &'static str {
        match self {
            Self::Initramfs => "init",
            Self::Erofs => "sbin/init",
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum BuildError {
    #[error("agent {path}: {source}")]
    Agent { path: PathBuf, source: io::Error },
    #[error("agent {path}: not a 64-bit ELF file")]
    NotElf { path: PathBuf },
    #[error("agent {path}: linked dynamically; build it with RUSTFLAGS='-C target-feature=+crt-static'")]
    NotStatic { path: PathBuf },
    #[error(transparent)]
    Modules(#[from] ModuleError),
    #[error(transparent)]
    Erofs(#[from] erofs::ErofsError),
    #[error("write {path}: {source}")]
    Write { path: PathBuf, source: io::Error },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match build(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rootfs-builder: {error}");
            ExitCode::FAILURE
        }
    }
}

fn build(arguments: &Arguments) -> Result<(), BuildError> {
    let agent = read_agent(&arguments.agent)?;
    let agent_size = agent.len() as u64;
    let mut tree = Tree::guest(agent, arguments.format.init());

    let mut module_size = 0;
    let mut module_count = 0;
    if let Some(folder) = &arguments.modules {
        let release = modules::release(folder, arguments.kernel_release.as_deref())?;
        let wanted: Vec<&str> = match &arguments.module_list {
            Some(names) => names.iter().map(String::as_str).collect(),
            None => modules::DEFAULT.to_vec(),
        };
        let plan = modules::resolve(folder, &release, &wanted)?;
        let bar = progress(plan.len() as u64, "modules");
        for module in &plan {
            let bytes = module.read()?;
            module_size += bytes.len() as u64;
            module_count += 1;
            tree.add_file(&module.target, 0o644, bytes);
            bar.inc(1);
        }
        tree.add_file(
            &modules::list_path(&release),
            0o644,
            modules::load_list(&plan).into_bytes(),
        );
        bar.finish_and_clear();
    }

    write(&tree, arguments)?;
    let written = |source| BuildError::Write {
        path: arguments.output.clone(),
        source,
    };
    let total = fs::metadata(&arguments.output).map_err(written)?.len();
    println!("agent    {}", HumanBytes(agent_size));
    if module_count > 0 {
        println!("modules  {} in {module_count} files", HumanBytes(module_size));
    }
    println!("image    {}  {}", HumanBytes(total), arguments.output.display());
    Ok(())
}

/// Writes beside the target and renames, so that a reader never sees half an image.
fn write(tree: &Tree, arguments: &Arguments) -> Result<(), BuildError> {
    let mut partial = arguments.output.clone().into_os_string();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let result = match arguments.format {
        Format::Initramfs => write_initramfs(tree, &partial),
        Format::Erofs => erofs::build(tree, &partial).map_err(BuildError::from),
    };
    let result = result.and_then(|()| {
        fs::rename(&partial, &arguments.output).map_err(|source| BuildError::Write {
            path: arguments.output.clone(),
            source,
        })
    });
    if result.is_err() {
        // The error below says more than a failure to remove what may not exist.
        let _ = fs::remove_file(&partial);
    }
    result
}

fn write_initramfs(tree: &Tree, path: &Path) -> Result<(), BuildError> {
    let failed = |source| BuildError::Write {
        path: path.to_owned(),
        source,
    };
    let bar = progress(tree.len() as u64, "initramfs");
    let file = fs::File::create(path).map_err(failed)?;
    let mut archive = cpio::Writer::new(io::BufWriter::new(file));
    for (path, node) in tree.entries() {
        archive.add(path, node).map_err(failed)?;
        bar.inc(1);
    }
    archive.finish().map_err(failed)?;
    bar.finish_and_clear();
    Ok(())
}

/// Reads the agent and refuses what would only fail later, as a guest that panics without an init.
fn read_agent(path: &Path) -> Result<Vec<u8>, BuildError> {
    const ELF64: &[u8] = b"\x7fELF\x02";
    const PT_INTERP: u32 = 3;

    let bytes = fs::read(path).map_err(|source| BuildError::Agent {
        path: path.to_owned(),
        source,
    })?;
    let not_elf = || BuildError::NotElf {
        path: path.to_owned(),
    };
    if !bytes.starts_with(ELF64) {
        return Err(not_elf());
    }
    // Elf64_Ehdr: e_phoff at 32, e_phentsize at 54, e_phnum at 56. Elf64_Phdr: p_type at 0.
    let number = |offset: usize, size: usize| -> Option<usize> {
        let field = bytes.get(offset..offset.checked_add(size)?)?;
        field.iter().rev().try_fold(0usize, |value, byte| {
            value.checked_mul(256)?.checked_add(usize::from(*byte))
        })
    };
    let (start, size, count) = number(32, 8)
        .zip(number(54, 2))
        .zip(number(56, 2))
        .map(|((a, b), c)| (a, b, c))
        .ok_or_else(not_elf)?;
    for index in 0..count {
        let kind = start
            .checked_add(index * size)
            .and_then(|at| number(at, 4))
            .ok_or_else(not_elf)?;
        if kind == PT_INTERP as usize {
            return Err(BuildError::NotStatic {
                path: path.to_owned(),
            });
        }
    }
    Ok(bytes)
}

fn progress(steps: u64, what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(steps).with_message(what);
    // The template is a constant; indicatif's default is good enough should it ever not parse.
    if let Ok(style) = ProgressStyle::with_template("{msg:>10} [{bar:32}] {pos}/{len}") {
        bar.set_style(style);
    }
    bar
}
