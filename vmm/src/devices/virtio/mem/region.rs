//! The device's region: which blocks are plugged, and what requests of the driver do to them.

use std::ops::Range;
use std::sync::Arc;

use super::BLOCK_SIZE;
use super::blocks::Blocks;
use crate::memory::layout::WINDOW_ALIGN;
use crate::memory::window::{Window, WindowError};

/// Blocks of a chunk, the unit that has a memslot.
const CHUNK_BLOCKS: u64 = WINDOW_ALIGN / BLOCK_SIZE;

/// A request of the driver (virtio 1.2, 5.15.6): guest physical address and number of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// VIRTIO_MEM_REQ_PLUG.
    Plug(u64, u16),
    /// VIRTIO_MEM_REQ_UNPLUG.
    Unplug(u64, u16),
    /// VIRTIO_MEM_REQ_UNPLUG_ALL.
    UnplugAll,
    /// VIRTIO_MEM_REQ_STATE.
    State(u64, u16),
}

/// What the driver is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Response {
    /// Done.
    Ack,
    /// Done: the state of the blocks.
    State(BlockState),
    /// Not now, and not while the requested size is what it is.
    Nack,
    /// Not now; try again.
    Busy,
    /// The request breaks the rules.
    Error,
}

/// State of a range of blocks, as in the response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BlockState {
    /// All are plugged.
    Plugged = 0,
    /// None is.
    Unplugged = 1,
    /// Some are.
    Mixed = 2,
}

/// The region with everything the configuration space says about it.
#[derive(Debug)]
pub(super) struct Region {
    window: Arc<Window>,
    blocks: Blocks,
    /// Bytes the guest should have plugged; a multiple of the block size, at most `limit`.
    requested: u64,
    /// Most bytes that may be requested.
    limit: u64,
}

impl Region {
    /// The region in `window`, empty, of which at most `limit` bytes may be requested.
    pub(super) fn new(window: Arc<Window>, limit: u64) -> Self {
        let size = window.region().size;
        Self {
            window,
            blocks: Blocks::new(size / BLOCK_SIZE),
            requested: 0,
            limit: limit.min(size) / BLOCK_SIZE * BLOCK_SIZE,
        }
    }

    /// Guest physical address.
    pub(super) fn start(&self) -> u64 {
        self.window.region().start
    }

    /// Length in bytes. All of it is usable at any time: what the driver can plug is bounded by the requested size.
    pub(super) fn size(&self) -> u64 {
        self.blocks.len() * BLOCK_SIZE
    }

    /// Most bytes that may be requested.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Plugged bytes.
    pub(super) fn plugged(&self) -> u64 {
        self.blocks.plugged() * BLOCK_SIZE
    }

    /// Bytes the guest should have plugged.
    pub(super) fn requested(&self) -> u64 {
        self.requested
    }

    /// Asks the guest for another size; the configuration interrupt is the caller's.
    pub(super) fn request(&mut self, bytes: u64) {
        self.requested = bytes.min(self.limit) / BLOCK_SIZE * BLOCK_SIZE;
    }

    /// Plugged blocks as runs: first block and count.
    pub(super) fn runs(&self) -> Vec<(u64, u64)> {
        self.blocks.runs()
    }

    /// Plugs `runs` into an empty region, for a restored device; their memory is not touched.
    ///
    /// # Errors
    /// The window refused; nothing is plugged then.
    pub(super) fn restore(&mut self, runs: &[(u64, u64)]) -> Result<(), WindowError> {
        for (first, count) in runs {
            if let Err(error) = self.show(*first..first + count) {
                self.unplug_all();
                return Err(error);
            }
            self.blocks.set(*first, *count, true);
        }
        Ok(())
    }

    /// Carries out a request of the driver.
    pub(super) fn handle(&mut self, request: Request) -> Response {
        match request {
            Request::Plug(address, count) => self
                .range(address, count)
                .map_or(Response::Error, |r| self.plug(r)),
            Request::Unplug(address, count) => self
                .range(address, count)
                .map_or(Response::Error, |r| self.unplug(r)),
            Request::UnplugAll => {
                self.unplug_all();
                Response::Ack
            }
            Request::State(address, count) => {
                let Some(range) = self.range(address, count) else {
                    return Response::Error;
                };
                let all = range.end - range.start;
                Response::State(match self.blocks.plugged_in(range.start, all) {
                    0 => BlockState::Unplugged,
                    plugged if plugged == all => BlockState::Plugged,
                    _ => BlockState::Mixed,
                })
            }
        }
    }

    /// The blocks of a request, if they exist.
    fn range(&self, address: u64, count: u16) -> Option<Range<u64>> {
        let offset = address.checked_sub(self.start())?;
        let first = offset / BLOCK_SIZE;
        let end = first.checked_add(u64::from(count))?;
        (offset.is_multiple_of(BLOCK_SIZE) && count > 0 && end <= self.blocks.len()).then_some(first..end)
    }

    fn plug(&mut self, range: Range<u64>) -> Response {
        let count = range.end - range.start;
        if self.blocks.plugged_in(range.start, count) > 0 {
            return Response::Error;
        }
        if self.plugged() + count * BLOCK_SIZE > self.requested {
            return Response::Nack;
        }
        match self.show(range.clone()) {
            Ok(()) => {
                self.blocks.set(range.start, count, true);
                Response::Ack
            }
            Err(error) => {
                guest_log!(WARN, %error, "mem: cannot plug memory, the driver tries again");
                Response::Busy
            }
        }
    }

    fn unplug(&mut self, range: Range<u64>) -> Response {
        let count = range.end - range.start;
        if self.blocks.plugged_in(range.start, count) < count {
            return Response::Error;
        }
        self.blocks.set(range.start, count, false);
        self.hide(range);
        Response::Ack
    }

    fn unplug_all(&mut self) {
        for (first, count) in self.blocks.runs() {
            self.blocks.set(first, count, false);
            self.hide(first..first + count);
        }
    }

    /// Gives the chunks of `range` memslots if they have none; all of them or none.
    fn show(&self, range: Range<u64>) -> Result<(), WindowError> {
        let mut shown = Vec::new();
        for chunk in chunks(&range) {
            let offset = chunk * WINDOW_ALIGN;
            if self.window.is_plugged(offset) {
                continue;
            }
            if let Err(error) = self.window.plug(offset, WINDOW_ALIGN) {
                shown.into_iter().for_each(|offset| self.hide_chunk(offset));
                return Err(error);
            }
            shown.push(offset);
        }
        Ok(())
    }

    /// Takes the memslots of chunks in which no block is left, and frees the memory of `range`.
    fn hide(&self, range: Range<u64>) {
        for chunk in chunks(&range) {
            if self.blocks.plugged_in(chunk * CHUNK_BLOCKS, CHUNK_BLOCKS) == 0 {
                self.hide_chunk(chunk * WINDOW_ALIGN);
            }
        }
        let (offset, len) = (range.start * BLOCK_SIZE, (range.end - range.start) * BLOCK_SIZE);
        if let Err(error) = self.window.discard(offset, len) {
            // The guest gave it up; it stays resident until it is plugged and unplugged again.
            guest_log!(WARN, %error, "mem: unplugged memory is not freed");
        }
    }

    fn hide_chunk(&self, offset: u64) {
        if let Err(error) = self.window.unplug(offset) {
            // It stays visible, which costs nothing, and is found plugged the next time.
            guest_log!(WARN, %error, "mem: memslot not removed");
        }
    }
}

/// The chunks that have blocks of `range`, which is not empty.
fn chunks(range: &Range<u64>) -> Range<u64> {
    range.start / CHUNK_BLOCKS..range.end.div_ceil(CHUNK_BLOCKS)
}
