//! The ranges of a DISCARD or WRITE_ZEROES, gone through a piece at a time.

use super::disk::Disk;
use super::step::{Step, Transfer};
use crate::devices::virtio::queue::chain::Iovecs;

/// Part of the disk, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// The driver does not want the space kept.
    pub(super) unmap: bool,
}

/// Ranges to go through.
#[derive(Debug)]
pub(super) struct Ranges {
    list: Vec<Range>,
    /// The one in hand.
    first: usize,
    /// Bytes of it that the step in hand is about.
    covered: u64,
}

impl Ranges {
    /// None, in the memory of `list`.
    pub(super) fn new(mut list: Vec<Range>) -> Self {
        list.clear();
        Self {
            list,
            first: 0,
            covered: 0,
        }
    }

    /// One more.
    pub(super) fn push(&mut self, range: Range) {
        if range.len > 0 {
            self.list.push(range);
        }
    }

    /// The next step: gives a part of a range back if it is to `discard`, or makes it zero.
    pub(super) fn next_step(&mut self, discard: bool) -> Option<Step> {
        let Range { offset, len, unmap } = *self.list.get(self.first)?;
        let step = match discard {
            true => Step::discard(offset, len),
            false => Step::write_zeroes(offset, len, unmap),
        };
        if let Step::Allocate { len, .. } = step {
            self.covered = len;
        }
        Some(step)
    }

    /// Instead of the step in hand: writes zeroes to a part of the range. The rest is not asked to be unmapped again.
    pub(super) fn write_part(&mut self, disk: &Disk, segments: Iovecs) -> Option<Transfer> {
        let range = self.list.get_mut(self.first)?;
        range.unmap = false;
        let transfer = Transfer::zeroes(disk, range.offset, range.len, segments);
        self.covered = transfer.left();
        Some(transfer)
    }

    /// The step in hand is done.
    pub(super) fn advance(&mut self) {
        let covered = std::mem::take(&mut self.covered);
        let Some(range) = self.list.get_mut(self.first) else {
            return;
        };
        range.offset += covered;
        range.len -= covered.min(range.len);
        if range.len == 0 {
            self.first += 1;
        }
    }

    /// Forgets what is left.
    pub(super) fn clear(&mut self) {
        self.list.clear();
        self.first = 0;
    }

    /// The memory of the list.
    pub(super) fn into_list(self) -> Vec<Range> {
        self.list
    }
}
