//! Whether a save is as it was written.

use std::path::Path;

use super::restore::{self, Layers};
use super::state::MachineState;
use super::{RestoreError, STATE, file};

/// Reads all of the save in `dir`, and of the full save below if it is a difference, and compares the checksums that were
/// taken when it was written. A restore in [`MemoryMode::Eager`](super::MemoryMode::Eager) does this anyway; the other modes
/// look at nothing a guest does not touch, so check before a save is handed out to be mapped.
///
/// # Errors
/// [`RestoreError::File`], [`RestoreError::Invalid`] or [`RestoreError::Memory`]: what is damaged, and where.
pub fn verify(dir: &Path) -> Result<(), RestoreError> {
    let state: MachineState = file::read(&dir.join(STATE))?;
    restore::check(&state)?;
    Layers::open(dir, &state, &restore::layout(&state))?.verify()
}
