//! Guest physical memory.

/// All guest RAM, shared by the vCPU threads (through KVM) and the device workers.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
