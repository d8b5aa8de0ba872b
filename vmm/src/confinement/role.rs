//! What a thread is for, and so what it may do. Shared with `build.rs`, which compiles a filter for each.

/// A thread's part in a machine. Its system calls are listed in `seccomp/policy.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `vcpu<n>`: KVM_RUN and what the guest's exits cause.
    Vcpu,
    /// `vmm-io`: the loop of virtqueues, timers and vsock connections.
    Io,
    /// `blk<n>-<id>`: a disk's queue, served synchronously.
    Block,
    /// `vmm-net-mq`: changes of a TAP's queues.
    Tap,
    /// `vmm-mem`: memory plugged and unplugged.
    Mem,
    /// `vmm-balloon`: memory given back.
    Balloon,
    /// `vmm-pmem`: files forced to the disk.
    Pmem,
    /// `vmm-pager`: pages of a snapshot brought in.
    Pager,
    /// `vmm-connector`: the sockets the guest's vsock connections lead to.
    Connector,
    /// `fs-<id>-<n>`: requests of a share.
    Fs,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Vcpu,
        Self::Io,
        Self::Block,
        Self::Tap,
        Self::Mem,
        Self::Balloon,
        Self::Pmem,
        Self::Pager,
        Self::Connector,
        Self::Fs,
    ];

    /// Its name in logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vcpu => "vcpu",
            Self::Io => "io",
            Self::Block => "block",
            Self::Tap => "tap",
            Self::Mem => "mem",
            Self::Balloon => "balloon",
            Self::Pmem => "pmem",
            Self::Pager => "pager",
            Self::Connector => "connector",
            Self::Fs => "fs",
        }
    }

    /// Whether a system call that is not on the list fails with EPERM, rather than ending the process. A file server's
    /// requests are the guest's: one that nobody thought of is to be refused, as the kernel refuses it to a process.
    pub const fn refuses(self) -> bool {
        matches!(self, Self::Fs)
    }
}
