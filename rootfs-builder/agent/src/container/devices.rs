//! Which device nodes a container may open and make: a BPF program on its cgroup.
//!
//! Default capabilities contain CAP_MKNOD, and all containers of a pod share the guest's kernel: without this, a node
//! made by hand leads to the guest's own disk. cgroup v2 has no file for it, only `BPF_PROG_TYPE_CGROUP_DEVICE`
//! (Documentation/admin-guide/cgroup-v2.rst, "Device controller"). The program is some dozens of instructions that
//! compare three numbers; it is assembled here because libcgroups needs the C library libbpf for it.
//!
//! The rules are runc's: its list of what every container gets, then the specification's, each a line of version 1's
//! `devices.allow` or `devices.deny`.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

/// `BPF_DEVCG_ACC_*` of <linux/bpf.h>: making a node, reading and writing the device.
const MAKE: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MAKE | READ | WRITE;

/// `BPF_DEVCG_DEV_*` of <linux/bpf.h>.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Block = 1,
    Character = 2,
}

/// Devices, and what may be done with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rule {
    kind: Kind,
    /// Any if absent.
    major: Option<u32>,
    /// Any if absent.
    minor: Option<u32>,
    access: u32,
}

/// What every container may use, by runc's list (libcontainer/specconv, `AllowedDevices`): nodes of any number may be made,
/// these may be opened.
const ALWAYS: [(Option<u32>, Option<u32>); 8] = [
    (Some(1), Some(3)), // null
    (Some(1), Some(5)), // zero
    (Some(1), Some(7)), // full
    (Some(1), Some(8)), // random
    (Some(1), Some(9)), // urandom
    (Some(5), Some(0)), // tty
    (Some(5), Some(2)), // ptmx
    (Some(136), None),  // pts
];

/// A container's rules: a default, and exceptions from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceRules {
    allow: bool,
    exceptions: Vec<Rule>,
}

impl DeviceRules {
    /// What the specification's rules and `nodes` (devices the container gets, block if the flag is set) add to what
    /// every container has.
    pub fn new(rules: &[LinuxDeviceCgroup], nodes: &[(bool, u32, u32)]) -> Self {
        let mut all = Self {
            allow: false,
            exceptions: Vec::new(),
        };
        for kind in [Kind::Block, Kind::Character] {
            all.apply(
                true,
                Rule {
                    kind,
                    major: None,
                    minor: None,
                    access: MAKE,
                },
            );
        }
        for (major, minor) in ALWAYS {
            let kind = Kind::Character;
            all.apply(
                true,
                Rule {
                    kind,
                    major,
                    minor,
                    access: ALL,
                },
            );
        }
        rules.iter().for_each(|rule| all.add(rule));
        for &(block, major, minor) in nodes {
            let kind = if block { Kind::Block } else { Kind::Character };
            all.apply(
                true,
                Rule {
                    kind,
                    major: Some(major),
                    minor: Some(minor),
                    access: ALL,
                },
            );
        }
        all
    }

    /// Whether everything is allowed, as in a privileged container.
    pub fn allows_everything(&self) -> bool {
        self.allow && self.exceptions.is_empty()
    }

    fn add(&mut self, rule: &LinuxDeviceCgroup) {
        // "No `devices.deny` of all" in the specification does not take away what every container has: runc appends its
        // own list behind the specification's.
        let kinds: &[Kind] = match rule.typ().unwrap_or(LinuxDeviceType::A) {
            LinuxDeviceType::A => {
                if rule.allow() {
                    self.allow = true;
                    self.exceptions.clear();
                } else {
                    *self = Self::new(&[], &[]);
                }
                return;
            }
            LinuxDeviceType::B => &[Kind::Block],
            LinuxDeviceType::C | LinuxDeviceType::U => &[Kind::Character],
            // Nobody asks before a FIFO is opened.
            LinuxDeviceType::P => &[],
        };
        // A negative number is any.
        let number = |number: Option<i64>| number.and_then(|number| u32::try_from(number).ok());
        let letters = rule.access().as_deref().unwrap_or("rwm");
        let access = [('m', MAKE), ('r', READ), ('w', WRITE)]
            .into_iter()
            .filter(|(letter, _)| letters.contains(*letter))
            .fold(0, |access, (_, bit)| access | bit);
        for &kind in kinds {
            let (major, minor) = (number(rule.major()), number(rule.minor()));
            self.apply(
                rule.allow(),
                Rule {
                    kind,
                    major,
                    minor,
                    access,
                },
            );
        }
    }

    /// One line of `devices.allow` or `devices.deny`: it adds to the exceptions, or takes from the same one.
    fn apply(&mut self, allow: bool, rule: Rule) {
        let same = self
            .exceptions
            .iter_mut()
            .find(|known| (known.kind, known.major, known.minor) == (rule.kind, rule.major, rule.minor));
        match (same, allow == self.allow) {
            (Some(known), true) => known.access &= !rule.access,
            (Some(known), false) => known.access |= rule.access,
            (None, true) => {}
            (None, false) => self.exceptions.push(rule),
        }
        self.exceptions.retain(|rule| rule.access != 0);
    }

    /// Attaches the rules to the cgroup at `path`, for as long as it exists.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn enforce(&self, path: &Path) -> io::Result<()> {
        let cgroup = File::open(path)?;
        let program = load(&self.assemble())?;
        attach(&cgroup, &program)
    }

    /// The program: 1 lets the request pass, 0 is EPERM.
    ///
    /// r2 is what is asked for, r3 the kind of device, r4 and r5 its numbers.
    fn assemble(&self) -> Vec<Instruction> {
        let mut program = vec![
            Instruction::load_word(3, 1, 0),
            Instruction::copy(2, 3),
            Instruction::immediate(op::RIGHT_SHIFT, 2, 16),
            Instruction::immediate(op::AND, 3, 0xffff),
            Instruction::load_word(4, 1, 4),
            Instruction::load_word(5, 1, 8),
        ];
        for rule in &self.exceptions {
            program.extend(rule.assemble(self.allow));
        }
        program.extend(Instruction::answer(self.allow));
        program
    }
}

impl Rule {
    /// Answers against the default if the rule matches; else goes on behind itself.
    fn assemble(&self, default: bool) -> Vec<Instruction> {
        let mut tests = vec![Instruction::jump(op::JUMP_UNLESS_EQUAL, 3, self.kind as u32)];
        for (register, number) in [(4, self.major), (5, self.minor)] {
            if let Some(number) = number {
                tests.push(Instruction::jump(op::JUMP_UNLESS_EQUAL, register, number));
            }
        }
        // An allowance must cover all that is asked for; a refusal any of it.
        tests.push(Instruction::copy(1, 2));
        if default {
            tests.push(Instruction::immediate(op::AND, 1, self.access));
            tests.push(Instruction::jump(op::JUMP_IF_EQUAL, 1, 0));
        } else {
            tests.push(Instruction::immediate(op::AND, 1, ALL & !self.access));
            tests.push(Instruction::jump(op::JUMP_UNLESS_EQUAL, 1, 0));
        }
        let answer = Instruction::answer(!default);
        let length = tests.len() + answer.len();
        for (index, test) in tests.iter_mut().enumerate() {
            test.jump_over(length - index - 1);
        }
        tests.extend(answer);
        tests
    }
}

/// Opcodes of Documentation/bpf/standardization/instruction-set.rst.
mod op {
    pub const AND: u8 = 0x57;
    pub const COPY: u8 = 0xbf;
    pub const EXIT: u8 = 0x95;
    pub const JUMP_IF_EQUAL: u8 = 0x15;
    pub const JUMP_UNLESS_EQUAL: u8 = 0x55;
    pub const LOAD_WORD: u8 = 0x61;
    pub const RIGHT_SHIFT: u8 = 0x77;
    pub const SET: u8 = 0xb7;
}

/// `struct bpf_insn`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high half.
    registers: u8,
    offset: i16,
    immediate: i32,
}

impl Instruction {
    fn load_word(to: u8, from: u8, offset: i16) -> Self {
        Self {
            code: op::LOAD_WORD,
            registers: to | from << 4,
            offset,
            immediate: 0,
        }
    }

    fn copy(to: u8, from: u8) -> Self {
        Self {
            code: op::COPY,
            registers: to | from << 4,
            ..Self::default()
        }
    }

    fn immediate(code: u8, register: u8, value: u32) -> Self {
        Self {
            code,
            registers: register,
            immediate: value.cast_signed(),
            ..Self::default()
        }
    }

    /// A test that leads out of its rule; where to is filled in when the rule's length is known.
    fn jump(code: u8, register: u8, value: u32) -> Self {
        Self::immediate(code, register, value)
    }

    fn jump_over(&mut self, instructions: usize) {
        if matches!(self.code, op::JUMP_IF_EQUAL | op::JUMP_UNLESS_EQUAL) {
            // A rule has some eight instructions.
            self.offset = i16::try_from(instructions).unwrap_or(i16::MAX);
        }
    }

    fn answer(allow: bool) -> [Self; 2] {
        let exit = Self {
            code: op::EXIT,
            ..Self::default()
        };
        [Self::immediate(op::SET, 0, allow.into()), exit]
    }
}

/// Whether this kernel can do it (`CONFIG_CGROUP_BPF`). Where it cannot, containers go without CAP_MKNOD and without
/// device nodes on their filesystems.
pub fn supported() -> bool {
    static SUPPORTED: OnceLock<bool> = OnceLock::new();
    *SUPPORTED.get_or_init(|| match load(&Instruction::answer(true)) {
        Ok(_) => true,
        Err(error) => {
            tracing::warn!("no device control in this kernel, containers go without CAP_MKNOD: {error}");
            false
        }
    })
}

/// The kernel's verifier gives up with EAGAIN when a signal arrives, and the agent gets one for each child that ends.
const LOAD_TRIES: u32 = 100;

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// Programs of the cgroups below are run too, and all must agree: a container that manages its own cgroups can only
/// take more away.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// What `BPF_PROG_LOAD` reads of `union bpf_attr`.
#[derive(Default)]
#[repr(C)]
struct LoadAttributes {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// What `BPF_PROG_ATTACH` reads of `union bpf_attr`.
#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..LoadAttributes::default()
    };
    let mut tries = LOAD_TRIES;
    let descriptor = loop {
        match bpf(BPF_PROG_LOAD, &attributes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && tries > 0 => tries -= 1,
            loaded => break loaded?,
        }
    };
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn attach(cgroup: &File, program: &OwnedFd) -> io::Result<()> {
    let number = |descriptor| u32::try_from(descriptor).map_err(io::Error::other);
    let attributes = AttachAttributes {
        target: number(cgroup.as_raw_fd())?,
        program: number(program.as_raw_fd())?,
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &attributes).map(drop)
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes and what the pointers among them lead to; all of it outlives the call,
    // and the callers' structures are laid out as the command wants them.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attributes, size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    libc::c_int::try_from(result).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the program as the kernel does. Panics where its verifier would refuse it: jumps out of the program, back, or
    /// from a register that was not set.
    fn asks(rules: &DeviceRules, kind: Kind, access: u32, major: u32, minor: u32) -> bool {
        let program = rules.assemble();
        let context = [access << 16 | kind as u32, major, minor];
        let mut registers: [Option<u64>; 11] = [None; 11];
        let mut at = 0;
        loop {
            let Instruction {
                code,
                registers: names,
                offset,
                immediate,
            } = program[at];
            let (to, from) = (usize::from(names & 15), usize::from(names >> 4));
            at += 1;
            let value = i64::from(immediate) as u64;
            match code {
                op::LOAD_WORD => {
                    assert!(from == 1 && at <= 6, "r1 is the context only in the beginning");
                    registers[to] = Some(context[offset as usize / 4].into());
                }
                op::COPY => registers[to] = Some(registers[from].unwrap()),
                op::SET => registers[to] = Some(value),
                op::AND => registers[to] = Some(registers[to].unwrap() & value),
                op::RIGHT_SHIFT => registers[to] = Some(registers[to].unwrap() >> value),
                op::JUMP_IF_EQUAL | op::JUMP_UNLESS_EQUAL => {
                    assert!(offset > 0);
                    if (registers[to].unwrap() == value) == (code == op::JUMP_IF_EQUAL) {
                        at += offset as usize;
                    }
                }
                op::EXIT => return registers[0].unwrap() == 1,
                _ => panic!("opcode {code:#x}"),
            }
        }
    }

    fn rule(
        allow: bool,
        kind: LinuxDeviceType,
        numbers: [Option<i64>; 2],
        access: &str,
    ) -> LinuxDeviceCgroup {
        let mut rule = LinuxDeviceCgroup::default();
        rule.set_allow(allow)
            .set_typ(Some(kind))
            .set_major(numbers[0])
            .set_minor(numbers[1])
            .set_access(Some(access.to_owned()));
        rule
    }

    #[test]
    fn device_when_nothing_is_said_is_one_of_the_harmless_ones() {
        let deny_all = rule(false, LinuxDeviceType::A, [None; 2], "rwm");
        for rules in [DeviceRules::new(&[], &[]), DeviceRules::new(&[deny_all], &[])] {
            for (major, minor) in [
                (1, 3),
                (1, 5),
                (1, 7),
                (1, 8),
                (1, 9),
                (5, 0),
                (5, 2),
                (136, 0),
                (136, 77),
            ] {
                assert!(
                    asks(&rules, Kind::Character, READ | WRITE, major, minor),
                    "{major}:{minor}"
                );
                assert!(
                    !asks(&rules, Kind::Block, READ, major, minor),
                    "block {major}:{minor}"
                );
            }
            // A node may be made, but not opened: the guest's disk, its memory, its log.
            for (kind, major, minor) in [
                (Kind::Block, 254, 0),
                (Kind::Character, 1, 1),
                (Kind::Character, 1, 11),
            ] {
                assert!(asks(&rules, kind, MAKE, major, minor));
                for access in [READ, WRITE, READ | WRITE, MAKE | READ] {
                    assert!(
                        !asks(&rules, kind, access, major, minor),
                        "{major}:{minor} {access}"
                    );
                }
            }
        }
    }

    #[test]
    fn device_when_named_by_the_specification_is_as_it_says() {
        let rules = DeviceRules::new(
            &[
                rule(false, LinuxDeviceType::A, [None; 2], "rwm"),
                rule(true, LinuxDeviceType::B, [Some(8), Some(1)], "r"),
                rule(true, LinuxDeviceType::C, [Some(10), None], "rw"),
                rule(false, LinuxDeviceType::C, [Some(1), Some(9)], "w"),
            ],
            &[(true, 254, 16)],
        );

        assert!(asks(&rules, Kind::Block, READ, 8, 1));
        assert!(!asks(&rules, Kind::Block, READ | WRITE, 8, 1));
        assert!(!asks(&rules, Kind::Block, READ, 8, 2));
        assert!(asks(&rules, Kind::Character, READ | WRITE, 10, 200));
        assert!(asks(&rules, Kind::Character, READ, 1, 9) && !asks(&rules, Kind::Character, WRITE, 1, 9));
        assert!(asks(&rules, Kind::Block, READ | WRITE, 254, 16));
        assert!(!asks(&rules, Kind::Block, READ, 254, 0));
    }

    #[test]
    fn device_when_all_are_allowed_is_free_but_for_exceptions() {
        let all = rule(true, LinuxDeviceType::A, [None; 2], "rwm");
        let free = DeviceRules::new(std::slice::from_ref(&all), &[]);
        assert!(free.allows_everything());
        assert!(asks(&free, Kind::Block, ALL, 254, 0));

        let but_one = DeviceRules::new(
            &[all, rule(false, LinuxDeviceType::B, [Some(254), Some(0)], "w")],
            &[],
        );
        assert!(!but_one.allows_everything());
        assert!(asks(&but_one, Kind::Block, READ, 254, 0));
        assert!(!asks(&but_one, Kind::Block, READ | WRITE, 254, 0));
        assert!(asks(&but_one, Kind::Block, WRITE, 254, 1));
    }
}
