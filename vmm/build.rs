//! Compiles the threads' system call filters: `seccomp/policy.rs` becomes BPF, written to `OUT_DIR/filters.rs`.
//!
//! A mistake in the policy is a build error, and starting a thread costs one copy and one system call.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write;
use std::path::Path;
use std::{env, fs};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use policy::{Arg, Call};
use role::Role;

#[path = "seccomp/policy.rs"]
mod policy;
#[path = "src/confinement/role.rs"]
mod role;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    for source in ["build.rs", "seccomp/policy.rs", "src/confinement/role.rs"] {
        println!("cargo::rerun-if-changed={source}");
    }
    let mut text = String::new();
    writeln!(
        text,
        "/// In place of the process id.\nconst OWN_PID: u32 = {:#x};",
        policy::OWN_PID
    )?;
    writeln!(
        text,
        "const fn program(role: Role) -> &'static [libc::sock_filter] {{\n    match role {{"
    )?;
    for role in Role::ALL {
        let program = compile(role).map_err(|error| format!("filter of role {}: {error}", role.name()))?;
        writeln!(text, "        Role::{role:?} => const {{ &[")?;
        for seccompiler::sock_filter { code, jt, jf, k } in program {
            writeln!(text, "            i({code:#x}, {jt}, {jf}, {k:#x}),")?;
        }
        writeln!(text, "        ] }},")?;
    }
    writeln!(text, "    }}\n}}")?;
    fs::write(Path::new(&env::var("OUT_DIR")?).join("filters.rs"), text)?;
    Ok(())
}

fn compile(role: Role) -> Result<BpfProgram> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for Call { number, when, reason } in policy::calls(role) {
        if reason.is_empty() {
            return Err(format!("system call {number}: no reason").into());
        }
        // No rule at all means that the call may always be made, and must not meet another entry's conditions.
        let unconditional = when.is_empty();
        if rules
            .get(&number)
            .is_some_and(|others| others.is_empty() || unconditional)
        {
            if rules.get(&number).is_some_and(Vec::is_empty) && unconditional {
                continue;
            }
            return Err(format!("system call {number}: listed with and without conditions").into());
        }
        let rules = rules.entry(number).or_default();
        for conditions in when {
            let conditions = conditions.iter().map(condition).collect::<Result<_>>()?;
            rules.push(SeccompRule::new(conditions)?);
        }
    }
    let otherwise = match role.refuses() {
        true => SeccompAction::Errno(libc::EPERM as u32),
        false => SeccompAction::Trap,
    };
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let filter = SeccompFilter::new(rules, otherwise, SeccompAction::Allow, arch.as_str().try_into()?)?;
    Ok(filter.try_into()?)
}

fn condition(arg: &Arg) -> Result<SeccompCondition> {
    let len = match arg.wide {
        true => SeccompCmpArgLen::Qword,
        false => SeccompCmpArgLen::Dword,
    };
    let compared = match arg.mask {
        u32::MAX => SeccompCmpOp::Eq,
        mask => SeccompCmpOp::MaskedEq(mask.into()),
    };
    Ok(SeccompCondition::new(arg.index, len, compared, arg.value.into())?)
}
