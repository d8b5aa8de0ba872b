//! One listening TCP socket for every port of a network namespace's loopback addresses: a BPF program of the type
//! `BPF_PROG_TYPE_SK_LOOKUP` (Documentation/bpf/prog_sk_lookup.rst; Linux 5.9).
//!
//! The kernel runs it where it looks for the socket that a new connection is for, and before it looks itself. A packet for
//! 127.0.0.0/8 or ::1 gets the socket of a map with one place; every other is passed on, so nothing but the namespace's own
//! loopback is touched: packets with such an address do not come from anywhere else (the kernel drops them as martians).
//! The connection keeps the port it was made to, which `getsockname(2)` tells. No netfilter is needed, no port is taken.
//!
//! By the address and not by the interface, whose index a program can only see from Linux 5.17 on.
//!
//! A socket that somebody else listens with on the loopback of that namespace gets no new connections meanwhile: a program of
//! this type cannot ask whether there is one (`bpf_sk_lookup_tcp` is for other types).
//!
//! The program hangs on a BPF link, which is a descriptor: when it is closed, by its owner or because the process died, the
//! namespace is as before. So there is nothing to write into the journal, and nothing to undo after a crash. Neither link nor
//! program keeps the namespace alive; the listening socket does.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A program that could not be put in place. What the kernel cannot do is the same as what it does not allow: an error.
#[derive(Debug, thiserror::Error)]
pub enum SkLookupError {
    /// There is no map to hold the socket.
    #[error("bpf(BPF_MAP_CREATE, sockmap): {0}")]
    Map(io::Error),
    /// The socket does not go into the map.
    #[error("bpf(BPF_MAP_UPDATE_ELEM): {0}")]
    Socket(io::Error),
    /// The kernel does not take the program.
    #[error("bpf(BPF_PROG_LOAD, sk_lookup): {0}")]
    Program(io::Error),
    /// The namespace does not take the program.
    #[error("bpf(BPF_LINK_CREATE): {0}")]
    Link(io::Error),
}

/// The program in a namespace, for as long as this lives.
#[derive(Debug)]
pub struct SkLookup {
    _link: OwnedFd,
}

impl SkLookup {
    /// Lets `listener`, a listening TCP socket of the namespace `netns`, have every new connection to a loopback address of
    /// it. One of the family `AF_INET` gets those of IPv4 only.
    ///
    /// # Errors
    /// The kernel cannot do it (before Linux 5.9, or without BPF) or does not allow it.
    pub fn attach(netns: BorrowedFd<'_>, listener: BorrowedFd<'_>) -> Result<Self, SkLookupError> {
        let map = create_map().map_err(SkLookupError::Map)?;
        put(&map, listener).map_err(SkLookupError::Socket)?;
        // It keeps the map; the link keeps the program.
        let program = load(&assemble(&map)).map_err(SkLookupError::Program)?;
        let link = link(netns, &program).map_err(SkLookupError::Link)?;
        Ok(Self { _link: link })
    }
}

/// Opcodes of Documentation/bpf/standardization/instruction-set.rst.
mod op {
    pub const ADD: u8 = 0x07;
    pub const AND: u8 = 0x57;
    pub const CALL: u8 = 0x85;
    pub const COPY: u8 = 0xbf;
    pub const EXIT: u8 = 0x95;
    pub const JUMP: u8 = 0x05;
    pub const JUMP_IF_EQUAL: u8 = 0x15;
    pub const JUMP_UNLESS_EQUAL: u8 = 0x55;
    pub const LOAD_WORD: u8 = 0x61;
    pub const SET: u8 = 0xb7;
    pub const SET_WIDE: u8 = 0x18;
    pub const STORE_WORD: u8 = 0x62;
}

/// Fields of `struct bpf_sk_lookup` (<linux/bpf.h>), by their offsets. Addresses are in network order.
mod field {
    pub const FAMILY: i16 = 8;
    pub const PROTOCOL: i16 = 12;
    pub const LOCAL_IP4: i16 = 40;
    pub const LOCAL_IP6: [i16; 4] = [44, 48, 52, 56];
}

/// Helpers by their numbers (`enum bpf_func_id`).
mod helper {
    pub const MAP_LOOKUP_ELEM: i32 = 1;
    pub const SK_RELEASE: i32 = 86;
    pub const SK_ASSIGN: i32 = 124;
}

/// Marks the second word of a `SET_WIDE` as a map's descriptor (`BPF_PSEUDO_MAP_FD`).
const MAP_DESCRIPTOR: u8 = 1;
/// The program's answer: look on, with the socket it has assigned if it has.
const SK_PASS: i32 = 1;
/// The frame pointer.
const FRAME: u8 = 10;

/// `struct bpf_insn`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// Destination in the low half, source in the high half.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Where a jump leads.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Label {
    /// The packet is for IPv6's loopback, or for none.
    Six,
    /// It gets the socket.
    Assign,
    /// Nothing is changed.
    Pass,
}

/// A program with jumps to places that come later.
#[derive(Default)]
struct Assembler {
    program: Vec<Instruction>,
    jumps: Vec<(usize, Label)>,
}

impl Assembler {
    fn add(&mut self, code: u8, to: u8, from: u8, offset: i16, immediate: i32) {
        self.program.push(Instruction {
            code,
            registers: to | from << 4,
            offset,
            immediate,
        });
    }

    fn set(&mut self, register: u8, value: i32) {
        self.add(op::SET, register, 0, 0, value);
    }

    fn copy(&mut self, to: u8, from: u8) {
        self.add(op::COPY, to, from, 0, 0);
    }

    fn load(&mut self, to: u8, context: u8, field: i16) {
        self.add(op::LOAD_WORD, to, context, field, 0);
    }

    fn call(&mut self, helper: i32) {
        self.add(op::CALL, 0, 0, 0, helper);
    }

    fn jump(&mut self, code: u8, register: u8, value: i32, label: Label) {
        self.jumps.push((self.program.len(), label));
        self.add(code, register, 0, 0, value);
    }

    /// Here is `label`: sets the distance in the jumps to it.
    fn label(&mut self, label: Label) {
        let here = self.program.len();
        for (at, _) in self.jumps.extract_if(.., |(_, to)| *to == label) {
            if let Some(jump) = self.program.get_mut(at) {
                // A program of some thirty instructions.
                jump.offset = i16::try_from(here - at - 1).unwrap_or(i16::MAX);
            }
        }
    }
}

/// The program that gives packets for loopback addresses the socket in `map`.
fn assemble(map: &OwnedFd) -> Vec<Instruction> {
    use Label::{Assign, Pass, Six};
    // Kept over calls: the context and the socket.
    let (context, socket) = (6, 7);
    let mut code = Assembler::default();
    code.copy(context, 1);
    code.load(2, context, field::PROTOCOL);
    code.jump(op::JUMP_UNLESS_EQUAL, 2, libc::IPPROTO_TCP, Pass);

    code.load(2, context, field::FAMILY);
    code.jump(op::JUMP_UNLESS_EQUAL, 2, libc::AF_INET, Six);
    code.load(2, context, field::LOCAL_IP4);
    code.add(op::AND, 2, 0, 0, i32::from_ne_bytes([0xff, 0, 0, 0]));
    code.jump(op::JUMP_UNLESS_EQUAL, 2, i32::from_ne_bytes([127, 0, 0, 0]), Pass);
    code.jump(op::JUMP, 0, 0, Assign);

    code.label(Six);
    code.jump(op::JUMP_UNLESS_EQUAL, 2, libc::AF_INET6, Pass);
    let loopback = [0, 0, 0, i32::from_ne_bytes([0, 0, 0, 1])];
    for (field, word) in field::LOCAL_IP6.into_iter().zip(loopback) {
        code.load(2, context, field);
        code.jump(op::JUMP_UNLESS_EQUAL, 2, word, Pass);
    }

    code.label(Assign);
    // The key, 0, on the stack.
    code.add(op::STORE_WORD, FRAME, 0, -4, 0);
    code.add(op::SET_WIDE, 1, MAP_DESCRIPTOR, 0, map.as_raw_fd());
    code.add(0, 0, 0, 0, 0);
    code.copy(2, FRAME);
    code.add(op::ADD, 2, 0, 0, -4);
    code.call(helper::MAP_LOOKUP_ELEM);
    // The listener has been closed.
    code.jump(op::JUMP_IF_EQUAL, 0, 0, Pass);
    code.copy(socket, 0);
    code.copy(1, context);
    code.copy(2, socket);
    code.set(3, 0);
    // Refused for a socket of the other family: then nothing is changed.
    code.call(helper::SK_ASSIGN);
    code.copy(1, socket);
    code.call(helper::SK_RELEASE);

    code.label(Pass);
    code.set(0, SK_PASS);
    code.add(op::EXIT, 0, 0, 0, 0);
    code.program
}

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
const BPF_SK_LOOKUP: u32 = 36;
/// The kernel's verifier gives up with EAGAIN when a signal arrives.
const LOAD_TRIES: u32 = 100;

/// What `BPF_MAP_CREATE` reads of `union bpf_attr`.
#[repr(C)]
struct MapAttributes {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// What `BPF_MAP_UPDATE_ELEM` reads of it.
#[repr(C)]
struct ElementAttributes {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// What `BPF_PROG_LOAD` reads of it.
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
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

/// What `BPF_LINK_CREATE` reads of it.
#[repr(C)]
struct LinkAttributes {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

fn create_map() -> io::Result<OwnedFd> {
    let attributes = MapAttributes {
        kind: BPF_MAP_TYPE_SOCKMAP,
        key_size: 4,
        value_size: 4,
        max_entries: 1,
        flags: 0,
    };
    bpf(BPF_MAP_CREATE, &attributes).map(owned)
}

fn put(map: &OwnedFd, socket: BorrowedFd<'_>) -> io::Result<()> {
    let (key, value) = (0_u32, number(socket)?);
    let attributes = ElementAttributes {
        map: number(map.as_fd())?,
        padding: 0,
        key: &raw const key as u64,
        value: &raw const value as u64,
        flags: 0,
    };
    bpf(BPF_MAP_UPDATE_ELEM, &attributes).map(drop)
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        kind: BPF_PROG_TYPE_SK_LOOKUP,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        name: *b"pod_localhost\0\0\0",
        expected_attach_type: BPF_SK_LOOKUP,
        ..LoadAttributes::default()
    };
    let mut tries = LOAD_TRIES;
    loop {
        match bpf(BPF_PROG_LOAD, &attributes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && tries > 0 => tries -= 1,
            loaded => return loaded.map(owned),
        }
    }
}

fn link(netns: BorrowedFd<'_>, program: &OwnedFd) -> io::Result<OwnedFd> {
    let attributes = LinkAttributes {
        program: number(program.as_fd())?,
        target: number(netns)?,
        attach_type: BPF_SK_LOOKUP,
        flags: 0,
    };
    bpf(BPF_LINK_CREATE, &attributes).map(owned)
}

fn number(descriptor: BorrowedFd<'_>) -> io::Result<u32> {
    u32::try_from(descriptor.as_raw_fd()).map_err(io::Error::other)
}

fn owned(descriptor: libc::c_int) -> OwnedFd {
    // SAFETY: the kernel just made this descriptor for us (close-on-exec), and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
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
