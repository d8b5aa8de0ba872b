//! The device's region: which blocks are plugged, and what requests of the driver do to them.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::BLOCK_SIZE;
use super::blocks::Blocks;
use crate::memory::layout::WINDOW_ALIGN;
use crate::memory::seal;
use crate::memory::window::{Window, WindowError};

/// Blocks of a chunk, the unit that has a memslot.
const CHUNK_BLOCKS: u64 = WINDOW_ALIGN / BLOCK_SIZE;

/// Blocks unplugged at a time: 2 GiB. Freeing memory takes a while, and who resets the device waits for it.
const UNPLUG_BLOCKS: u64 = (2 << 30) / BLOCK_SIZE;
const _: () = assert!(BLOCK_SIZE == seal::BLOCK);

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
    /// The UNPLUG that is under way.
    unplugging: Option<Unplugging>,
}

/// A request to unplug blocks `first` to `end`, of which those before `next` are gone: it is taken from the queue again until
/// all are, so that nobody who stops the device waits for 128 GiB to be freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Unplugging {
    first: u64,
    end: u64,
    next: u64,
}

impl Unplugging {
    /// Whether what is left of it is plugged, when `runs` are.
    pub(super) fn is_possible(&self, runs: &[(u64, u64)]) -> bool {
        let Self { first, end, next } = *self;
        let holds =
            |run: &(u64, u64)| run.0 <= next && run.0.checked_add(run.1).is_some_and(|last| end <= last);
        first < next && next < end && runs.iter().any(holds)
    }
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
            unplugging: None,
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

    /// Pages devices used of blocks that are not plugged, each for a moment.
    pub(super) fn strays(&self) -> u64 {
        self.window.strays()
    }

    /// The UNPLUG that is under way, to be saved.
    pub(super) fn unplugging(&self) -> Option<Unplugging> {
        self.unplugging
    }

    /// Goes on with a saved UNPLUG, which must be [`possible`](Unplugging::is_possible) among the blocks.
    pub(super) fn go_on(&mut self, saved: Option<Unplugging>) {
        self.unplugging = saved;
    }

    /// Plugs `runs` into an empty region, for a restored device; their memory is not touched.
    ///
    /// # Errors
    /// The window refused; nothing is plugged then.
    pub(super) fn restore(&mut self, runs: &[(u64, u64)]) -> Result<(), WindowError> {
        for (first, count) in runs {
            if let Err(error) = self.show(*first..first + count) {
                while self.unplug_some()? {}
                return Err(error);
            }
            self.blocks.set(*first, *count, true);
        }
        Ok(())
    }

    /// Carries out a request of the driver; `None`: only a part of it, call again.
    pub(super) fn handle(&mut self, request: Request) -> Option<Response> {
        let begun = match request {
            Request::State(..) => None,
            // Whatever else changes blocks, the one that was under way is not any more.
            _ => self.unplugging.take(),
        };
        let (Request::Plug(address, count)
        | Request::Unplug(address, count)
        | Request::State(address, count)) = request
        else {
            return match self.unplug_some() {
                Ok(true) => None,
                Ok(false) => Some(Response::Ack),
                Err(error) => Some(busy(&error)),
            };
        };
        let Some(range) = self.range(address, count) else {
            return Some(Response::Error);
        };
        match request {
            Request::Plug(..) => Some(self.plug(range)),
            Request::Unplug(..) => self.unplug(&range, begun),
            Request::State(..) | Request::UnplugAll => Some(Response::State(self.state(&range))),
        }
    }

    fn state(&self, range: &Range<u64>) -> BlockState {
        let all = range.end - range.start;
        match self.blocks.plugged_in(range.start, all) {
            0 => BlockState::Unplugged,
            plugged if plugged == all => BlockState::Plugged,
            _ => BlockState::Mixed,
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
            Err(error) => busy(&error),
        }
    }

    /// Unplugs [`UNPLUG_BLOCKS`] of `range` at most, going on with `begun` if that is about the same; `None` while some are left.
    fn unplug(&mut self, range: &Range<u64>, begun: Option<Unplugging>) -> Option<Response> {
        let &Range { start: first, end } = range;
        let next = match begun {
            Some(begun) if (begun.first, begun.end) == (first, end) => begun.next,
            _ if self.blocks.plugged_in(first, end - first) < end - first => return Some(Response::Error),
            _ => first,
        };
        let step = next..end.min(next + UNPLUG_BLOCKS);
        let (next, refused) = match self.hide(step.clone()) {
            Ok(()) => (step.end, None),
            // The driver tries again, with the same request.
            Err(error) => (step.start, Some(busy(&error))),
        };
        if next == end {
            return Some(Response::Ack);
        }
        self.unplugging = (next > first).then_some(Unplugging { first, end, next });
        refused
    }

    /// Unplugs a part of what is plugged, [`UNPLUG_BLOCKS`] at most; false when nothing is left.
    fn unplug_some(&mut self) -> Result<bool, WindowError> {
        let Some((first, count)) = self.blocks.first_run() else {
            return Ok(false);
        };
        self.hide(first..first + count.min(UNPLUG_BLOCKS))?;
        Ok(true)
    }

    /// Opens the blocks of `range`, and gives their chunks memslots if they have none; all of it or nothing.
    fn show(&self, range: Range<u64>) -> Result<(), WindowError> {
        let mut shown = Vec::new();
        let result = self.show_chunks(&range, &mut shown).and_then(|()| {
            let (offset, len) = bytes(&range);
            self.window.open(offset, len)
        });
        if result.is_err() {
            shown.into_iter().for_each(|offset| self.hide_chunk(offset));
        }
        result
    }

    fn show_chunks(&self, range: &Range<u64>, shown: &mut Vec<u64>) -> Result<(), WindowError> {
        for chunk in chunks(range) {
            let offset = chunk * WINDOW_ALIGN;
            if !self.window.is_plugged(offset) {
                self.window.plug(offset, WINDOW_ALIGN)?;
                shown.push(offset);
            }
        }
        Ok(())
    }

    /// Unplugs the blocks of `range`: seals and frees their memory, and takes the memslots of chunks in which no block is left.
    fn hide(&mut self, range: Range<u64>) -> Result<(), WindowError> {
        let (offset, len) = bytes(&range);
        self.window.close(offset, len)?;
        self.blocks.set(range.start, range.end - range.start, false);
        for chunk in chunks(&range) {
            if self.blocks.plugged_in(chunk * CHUNK_BLOCKS, CHUNK_BLOCKS) == 0 {
                self.hide_chunk(chunk * WINDOW_ALIGN);
            }
        }
        Ok(())
    }

    fn hide_chunk(&self, offset: u64) {
        if let Err(error) = self.window.unplug(offset) {
            // It stays visible, with all its blocks sealed, and is found plugged the next time.
            guest_log!(WARN, %error, "mem: memslot not removed");
        }
    }
}

/// The host, or a region in too many pieces, does not let the driver have its way now.
fn busy(error: &WindowError) -> Response {
    guest_log!(WARN, %error, "mem: the driver has to try again");
    Response::Busy
}

/// The chunks that have blocks of `range`, which is not empty.
fn chunks(range: &Range<u64>) -> Range<u64> {
    range.start / CHUNK_BLOCKS..range.end.div_ceil(CHUNK_BLOCKS)
}

/// Offset and length of `range`.
fn bytes(range: &Range<u64>) -> (u64, u64) {
    (range.start * BLOCK_SIZE, (range.end - range.start) * BLOCK_SIZE)
}
