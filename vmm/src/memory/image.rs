//! Guest memory in a file.
//!
//! The file has the regions of the layout one after the other and is sparse: pages never touched, or full of zeros, are
//! holes. A machine can read it ([`read`]), map it privately ([`map_private`]), or have it brought in by a pager
//! ([`super::pager`]). Each [`CHUNK`] has a checksum: [`read`] compares it, [`verify`] does for a file that is to be mapped.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crc32fast::Hasher;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemory as _};

use super::GuestMemory;
use super::layout::{MemoryLayout, RegionKind};
use super::page_set::PageSet;
use super::seal;

const PAGE: usize = 4096;
/// Bytes of the file that have one checksum; regions are multiples of it.
pub const CHUNK: u64 = 1 << 20;
/// Flags of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_PAGE: u64 = 1 << 61;
/// Pages looked up at a time.
const PAGEMAP_ENTRIES: usize = 4096;

/// A range of the file that has data: offset and length in bytes, multiples of the page size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// What a file has, and how to tell that it still has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// Where there is data.
    pub extents: Vec<Extent>,
    /// CRC-32 of the data in each [`CHUNK`] that has any, in order.
    checksums: Vec<u32>,
}

/// What a saved state says of the memory file cannot be so.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ContentsError {
    /// An extent that is empty, out of order, no whole pages or beyond the memory.
    #[error("memory: {len:#x} bytes at offset {offset:#x} of {size:#x} bytes")]
    Extent {
        /// Byte offset in the file.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Bytes of the whole memory.
        size: u64,
    },
    /// Not one for each chunk.
    #[error("memory: {count} checksums of {chunks} chunks")]
    Checksums {
        /// Checksums.
        count: u64,
        /// Chunks with data.
        chunks: u64,
    },
}

impl Contents {
    /// Bytes of data.
    pub fn bytes(&self) -> u64 {
        self.extents.iter().map(|extent| extent.len).sum()
    }

    /// Checks contents that come from a file: in order, in pages, inside the `size` bytes of memory, a checksum for each
    /// chunk.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self, size: u64) -> Result<(), ContentsError> {
        let (mut end, mut chunks, mut last) = (0, 0, None);
        for extent in &self.extents {
            let next = extent.offset.checked_add(extent.len).filter(|next| *next <= size);
            let whole = extent.offset.is_multiple_of(PAGE as u64) && extent.len.is_multiple_of(PAGE as u64);
            match next {
                Some(next) if extent.offset >= end && whole && extent.len > 0 => end = next,
                _ => {
                    return Err(ContentsError::Extent {
                        offset: extent.offset,
                        len: extent.len,
                        size,
                    });
                }
            }
            let (from, to) = (extent.offset / CHUNK, (end - 1) / CHUNK);
            chunks += to - from + u64::from(last != Some(from));
            last = Some(to);
        }
        match self.checksums.len() as u64 {
            count if count == chunks => Ok(()),
            count => Err(ContentsError::Checksums { count, chunks }),
        }
    }

    /// The extents cut at the borders of chunks.
    fn pieces(&self) -> Vec<Extent> {
        let mut pieces = Vec::with_capacity(self.extents.len() + self.checksums.len());
        for Extent { mut offset, len } in self.extents.iter().copied() {
            let end = offset + len;
            while offset < end {
                let next = end.min((offset / CHUNK + 1) * CHUNK);
                pieces.push(Extent {
                    offset,
                    len: next - offset,
                });
                offset = next;
            }
        }
        pieces
    }

    /// Calls `load` for the pieces of each chunk, to read them and to hash what was read, and compares the checksums. `load`
    /// says no to a piece whose chunk is of no interest.
    fn each_chunk(
        &self,
        mut load: impl FnMut(Extent, &mut Hasher) -> io::Result<bool>,
    ) -> Result<(), ReadError> {
        let pieces = self.pieces();
        let chunks = pieces.chunk_by(|a, b| a.offset / CHUNK == b.offset / CHUNK);
        'chunks: for (chunk, expected) in chunks.zip(&self.checksums) {
            let mut hasher = Hasher::new();
            for piece in chunk {
                if !load(*piece, &mut hasher)? {
                    continue 'chunks;
                }
            }
            let found = hasher.finalize();
            if found != *expected {
                let first = chunk.first().map_or(0, |piece| piece.offset);
                return Err(ReadError::Damaged {
                    offset: first / CHUNK * CHUNK,
                    found,
                    expected: *expected,
                });
            }
        }
        Ok(())
    }
}

/// A memory file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The host refused.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It has another content than was written.
    #[error(
        "the {CHUNK} bytes at offset {offset:#x} have checksum {found:#010x}, should be {expected:#010x}: damaged"
    )]
    Damaged {
        /// Offset of the chunk in the file.
        offset: u64,
        /// Checksum of what is there.
        found: u32,
        /// Checksum of what was written.
        expected: u32,
    },
    /// It has data where nothing was written.
    #[error("data at offset {offset:#x}, where nothing was written: damaged")]
    Stray {
        /// Offset in the file.
        offset: u64,
    },
}

/// A region and its place in the file.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Address in this process.
    pub host: *mut u8,
    /// Bytes.
    pub len: usize,
    /// Offset in the file.
    pub offset: u64,
    /// What it is.
    pub kind: RegionKind,
}

/// Where the regions of `layout` are in this process and in the file.
///
/// # Errors
/// `memory` was not allocated for `layout`.
pub fn places(memory: &GuestMemory, layout: &MemoryLayout) -> io::Result<Vec<Place>> {
    let mut offset = 0;
    let mut places = Vec::new();
    for region in layout.regions() {
        let host = memory
            .get_host_address(GuestAddress(region.start))
            .map_err(|e| io::Error::other(e.to_string()))?;
        let len = usize::try_from(region.size).map_err(io::Error::other)?;
        places.push(Place {
            host,
            len,
            offset,
            kind: region.kind,
        });
        offset += region.size;
    }
    Ok(places)
}

/// Size of the file of `layout`, in bytes.
pub fn file_size(layout: &MemoryLayout) -> u64 {
    layout.regions().iter().map(|region| region.size).sum()
}

/// Which pages of a save are written. Of the window of virtio-pmem it is always those that are the machine's own, zero or
/// not: what is below them is a device's file, which may be another one by then.
#[derive(Debug, Clone, Copy)]
pub enum Pages<'f> {
    /// All that are not zero.
    All,
    /// Those that differ.
    Changed {
        /// From this file.
        base: &'f File,
        /// The pages that can differ, if that is known ([`super::write_log`]): the others are not looked at, except in the
        /// window of virtio-pmem.
        among: Option<&'f PageSet>,
    },
}

/// What a save wrote.
#[derive(Debug)]
pub struct Written {
    /// What the file has.
    pub contents: Contents,
    /// Pages whose content was looked at.
    pub pages_read: u64,
}

/// Writes the memory to the empty file `out` and says what is in it. `backing` is the file RAM is a private mapping of or
/// is brought in from, if there is one. No vCPU and no device may write meanwhile.
///
/// # Errors
/// The file cannot be written, or /proc/self/pagemap not be read.
pub fn write(
    memory: &GuestMemory,
    layout: &MemoryLayout,
    backing: Option<&File>,
    pages: Pages,
    out: &File,
) -> io::Result<Written> {
    out.set_len(file_size(layout))?;
    let mut writer = Writer {
        out,
        pages,
        base: vec![0; PAGE],
        run: None,
        chunk: None,
        written: Written {
            contents: Contents::default(),
            pages_read: 0,
        },
    };
    let pagemap = File::open("/proc/self/pagemap")?;
    for place in places(memory, layout)? {
        // Blocks the guest has not plugged: there is nothing in them, whatever is below.
        let sealed = seal::sealed_in(place.host as usize, place.len);
        let is_sealed = |page: usize| {
            let at = place.host as usize + page * PAGE;
            let behind = sealed.partition_point(|range| range.end <= at);
            sealed.get(behind).is_some_and(|range| range.contains(&at))
        };
        if let Pages::Changed {
            among: Some(among), ..
        } = pages
            && place.kind != RegionKind::Pmem
        {
            let first = place.offset / PAGE as u64;
            for page in among.within(first..first + (place.len / PAGE) as u64) {
                if is_sealed((page - first) as usize) {
                    continue;
                }
                // SAFETY: as below.
                let bytes = unsafe {
                    std::slice::from_raw_parts(place.host.add((page - first) as usize * PAGE), PAGE)
                };
                writer.page(page * PAGE as u64, bytes, place.kind)?;
            }
            continue;
        }
        let mut entries = vec![0u8; PAGEMAP_ENTRIES * 8];
        let total = place.len / PAGE;
        let mut page = 0;
        while page < total {
            let count = PAGEMAP_ENTRIES.min(total - page);
            let wanted = entries.get_mut(..count * 8).unwrap_or_default();
            pagemap.read_exact_at(wanted, (place.host as u64 / PAGE as u64 + page as u64) * 8)?;
            for (index, entry) in wanted.as_chunks::<8>().0.iter().enumerate() {
                if is_sealed(page + index) {
                    continue;
                }
                let offset = place.offset + ((page + index) * PAGE) as u64;
                if holds_data(u64::from_le_bytes(*entry), place.kind, backing, offset, pages)? {
                    // SAFETY: the page is inside the region's mapping, and nobody writes it (the caller's promise).
                    let bytes =
                        unsafe { std::slice::from_raw_parts(place.host.add((page + index) * PAGE), PAGE) };
                    writer.page(offset, bytes, place.kind)?;
                }
            }
            page += count;
        }
    }
    writer.finish()
}

/// Whether a page may have content that the file must have.
fn holds_data(
    entry: u64,
    kind: RegionKind,
    backing: Option<&File>,
    offset: u64,
    pages: Pages,
) -> io::Result<bool> {
    if kind == RegionKind::Pmem {
        // Pages of the device's file come back with the device; private copies of them do not.
        return Ok(entry & (PRESENT | SWAPPED) != 0 && entry & FILE_PAGE == 0);
    }
    if entry & (PRESENT | SWAPPED) != 0 {
        return Ok(true);
    }
    if backing.map_or(Ok(false), |file| in_extent(file, offset))? {
        return Ok(true);
    }
    match pages {
        Pages::All => Ok(false),
        // A page that was given back since the base was written is zero now, and not there.
        Pages::Changed { base, .. } => in_extent(base, offset),
    }
}

/// Whether there is data at `offset` of a sparse file.
fn in_extent(file: &File, offset: u64) -> io::Result<bool> {
    Ok(next_data(file, offset)? == Some(offset))
}

/// Where the next data of a sparse file is, at `offset` or behind it.
fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    let offset = i64::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: lseek takes no memory; nobody uses the position of this descriptor.
    let next = unsafe { libc::lseek64(file.as_raw_fd(), offset, libc::SEEK_DATA) };
    if let Ok(next) = u64::try_from(next) {
        return Ok(Some(next));
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENXIO) {
        return Ok(None);
    }
    Err(error)
}

/// Joins pages into runs and writes each run with one call.
struct Writer<'f> {
    out: &'f File,
    pages: Pages<'f>,
    base: Vec<u8>,
    /// Offset and first byte of the run in hand, whose pages follow each other in memory and in one chunk of the file.
    run: Option<(u64, *const u8, usize)>,
    /// The chunk in hand and the checksum of what was written of it.
    chunk: Option<(u64, Hasher)>,
    written: Written,
}

impl Writer<'_> {
    fn page(&mut self, offset: u64, bytes: &[u8], kind: RegionKind) -> io::Result<()> {
        self.written.pages_read += 1;
        let wanted = match self.pages {
            _ if kind == RegionKind::Pmem => true,
            Pages::All => bytes.as_chunks::<8>().0.iter().any(|word| *word != [0; 8]),
            Pages::Changed { base, .. } => {
                base.read_exact_at(&mut self.base, offset)?;
                bytes != self.base
            }
        };
        if !wanted {
            return Ok(());
        }
        match &mut self.run {
            Some((start, first, len))
                if *start + *len as u64 == offset
                    && first.wrapping_add(*len) == bytes.as_ptr()
                    && !offset.is_multiple_of(CHUNK) =>
            {
                *len += bytes.len();
            }
            _ => {
                self.flush()?;
                self.run = Some((offset, bytes.as_ptr(), bytes.len()));
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let Some((offset, first, len)) = self.run.take() else {
            return Ok(());
        };
        // SAFETY: the run consists of pages given to `page`, contiguous in one mapping that outlives the writer.
        let bytes = unsafe { std::slice::from_raw_parts(first, len) };
        self.out.write_all_at(bytes, offset)?;
        match &mut self.chunk {
            Some((chunk, hasher)) if *chunk == offset / CHUNK => hasher.update(bytes),
            _ => {
                self.finish_chunk();
                let mut hasher = Hasher::new();
                hasher.update(bytes);
                self.chunk = Some((offset / CHUNK, hasher));
            }
        }
        let extents = &mut self.written.contents.extents;
        match extents.last_mut() {
            Some(last) if last.offset + last.len == offset => last.len += len as u64,
            _ => extents.push(Extent {
                offset,
                len: len as u64,
            }),
        }
        Ok(())
    }

    fn finish_chunk(&mut self) {
        if let Some((_, hasher)) = self.chunk.take() {
            self.written.contents.checksums.push(hasher.finalize());
        }
    }

    fn finish(mut self) -> io::Result<Written> {
        self.flush()?;
        self.finish_chunk();
        Ok(self.written)
    }
}

/// Reads the `contents` of `file` into the regions for which `wanted` says so, and compares their checksums.
///
/// # Errors
/// [`ReadError`]; a part is in memory then.
pub fn read(
    memory: &GuestMemory,
    layout: &MemoryLayout,
    file: &File,
    contents: &Contents,
    wanted: impl Fn(RegionKind) -> bool,
) -> Result<(), ReadError> {
    let places = places(memory, layout)?;
    contents.each_chunk(|piece, hasher| {
        let inside = |place: &&Place| piece.offset.wrapping_sub(place.offset) < place.len as u64;
        let place = places.iter().find(inside).ok_or(io::ErrorKind::InvalidData)?;
        if !wanted(place.kind) {
            return Ok(false);
        }
        let start = (piece.offset - place.offset) as usize;
        let len = (piece.len as usize).min(place.len - start);
        // SAFETY: the range is inside the region's mapping; no vCPU and no device runs yet.
        let bytes = unsafe { std::slice::from_raw_parts_mut(place.host.add(start), len) };
        file.read_exact_at(bytes, piece.offset)?;
        hasher.update(bytes);
        Ok(true)
    })
}

/// Reads the `contents` of `file` and compares their checksums. For a file that is mapped as it is (`whole`), also that there
/// is nothing else in it.
///
/// # Errors
/// [`ReadError`].
pub fn verify(file: &File, contents: &Contents, whole: bool) -> Result<(), ReadError> {
    let mut buffer = vec![0; CHUNK as usize];
    contents.each_chunk(|piece, hasher| {
        let bytes = buffer.get_mut(..piece.len as usize).unwrap_or_default();
        file.read_exact_at(bytes, piece.offset)?;
        hasher.update(bytes);
        Ok(true)
    })?;
    if !whole {
        return Ok(());
    }
    let end = Extent {
        offset: file.metadata()?.len(),
        len: 0,
    };
    let mut offset = 0;
    for extent in contents.extents.iter().chain([&end]) {
        while let Some(data) = next_data(file, offset)?.filter(|data| *data < extent.offset) {
            // A file system without holes has zeros there.
            let len = (extent.offset - data).min(CHUNK);
            let bytes = buffer.get_mut(..len as usize).unwrap_or_default();
            file.read_exact_at(bytes, data)?;
            if let Some(at) = bytes.iter().position(|byte| *byte != 0) {
                return Err(ReadError::Stray {
                    offset: data + at as u64,
                });
            }
            offset = data + len;
        }
        offset = extent.offset + extent.len;
    }
    Ok(())
}

/// Makes RAM and the window of virtio-mem private mappings of `file`: pages come from the host's page cache when they are
/// touched, and become this machine's own when it writes them. `memory` was allocated and not touched.
///
/// # Errors
/// The kernel refused the mapping.
pub fn map_private(memory: &GuestMemory, layout: &MemoryLayout, file: &File) -> io::Result<()> {
    for place in places(memory, layout)?
        .into_iter()
        .filter(|place| place.kind != RegionKind::Pmem)
    {
        let offset = i64::try_from(place.offset).map_err(io::Error::other)?;
        // SAFETY: replaces exactly the region's own mapping, which stays the region's (it unmaps the range when it is
        // dropped), before anything refers to its content.
        let mapped = unsafe {
            libc::mmap64(
                place.host.cast(),
                place.len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        super::keep_out_of_dumps(mapped as usize, place.len);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;
    use vmm_sys_util::tempfile::TempFile;

    use super::*;
    use crate::memory::allocate;

    fn filled() -> (GuestMemory, MemoryLayout) {
        let layout = MemoryLayout::with_windows(64 << 20, 128 << 20, 0);
        let memory = allocate(&layout).unwrap();
        memory.write_slice(&[1; 5000], GuestAddress(0x10_0000)).unwrap();
        // Touched, and zero again.
        memory.write_slice(&[0; 4096], GuestAddress(0x20_0000)).unwrap();
        memory
            .write_slice(&[3; 10], GuestAddress(0x1_0000_0000 + 4090))
            .unwrap();
        (memory, layout)
    }

    fn all(kind: RegionKind) -> bool {
        kind != RegionKind::Pmem
    }

    #[test]
    fn read_when_written_gives_the_same_memory_and_the_file_is_sparse() {
        let (memory, layout) = filled();
        let file = TempFile::new().unwrap();
        let contents = write(&memory, &layout, None, Pages::All, file.as_file())
            .unwrap()
            .contents;
        assert_eq!(contents.bytes(), 4 * 4096);
        assert_eq!(file.as_file().metadata().unwrap().len(), file_size(&layout));
        contents.check(file_size(&layout)).unwrap();
        verify(file.as_file(), &contents, true).unwrap();

        let other = allocate(&layout).unwrap();
        read(&other, &layout, file.as_file(), &contents, all).unwrap();
        let mut bytes = [0; 5001];
        other.read_slice(&mut bytes, GuestAddress(0x10_0000)).unwrap();
        assert!(bytes[..5000].iter().all(|b| *b == 1) && bytes[5000] == 0);
        let byte: u8 = other.read_obj(GuestAddress(0x1_0000_0000 + 4099)).unwrap();
        assert_eq!(byte, 3);
    }

    #[test]
    fn write_when_mapped_privately_has_what_was_changed_and_what_was_not() {
        let (memory, layout) = filled();
        let base = TempFile::new().unwrap();
        write(&memory, &layout, None, Pages::All, base.as_file()).unwrap();
        let clone = allocate(&layout).unwrap();
        map_private(&clone, &layout, base.as_file()).unwrap();
        clone.write_obj(9u8, GuestAddress(0x30_0000)).unwrap();
        clone.write_slice(&[0; 4096], GuestAddress(0x10_0000)).unwrap();

        let full = TempFile::new().unwrap();
        let backing = Some(base.as_file());
        let contents = write(&clone, &layout, backing, Pages::All, full.as_file())
            .unwrap()
            .contents;
        assert_eq!(contents.bytes(), 4 * 4096);

        let diff = TempFile::new().unwrap();
        let changed = Pages::Changed {
            base: base.as_file(),
            among: None,
        };
        let contents = write(&clone, &layout, backing, changed, diff.as_file())
            .unwrap()
            .contents;
        verify(diff.as_file(), &contents, false).unwrap();
        let extents = contents.extents;
        let offsets: Vec<_> = extents.iter().map(|e| (e.offset, e.len)).collect();
        assert_eq!(offsets, [(0x10_0000, 4096), (0x30_0000, 4096)]);
    }

    #[test]
    fn write_when_blocks_are_sealed_leaves_them_out_whatever_is_below() {
        let (memory, layout) = filled();
        let window = layout.window(RegionKind::Hotplug).unwrap();
        let block = GuestAddress(window.start + seal::BLOCK);
        memory.write_obj(5u8, block).unwrap();
        let base = TempFile::new().unwrap();
        write(&memory, &layout, None, Pages::All, base.as_file()).unwrap();
        let clone = std::sync::Arc::new(allocate(&layout).unwrap());
        map_private(&clone, &layout, base.as_file()).unwrap();
        let host = clone.get_host_address(GuestAddress(window.start)).unwrap() as usize;
        let seal = seal::Seal::new(&clone, host, window.size as usize).unwrap();
        // The first block is plugged, the second has been, and its page is in the file.
        seal.open(0, 2 * seal::BLOCK).unwrap();
        assert_eq!(clone.read_obj::<u8>(block).unwrap(), 5);
        seal.close(seal::BLOCK, seal::BLOCK).unwrap();

        let at = file_size(&layout) - window.size;
        let among = {
            let mut pages = PageSet::new(file_size(&layout) / PAGE as u64);
            pages.insert(at / PAGE as u64..file_size(&layout) / PAGE as u64);
            pages
        };
        let changed = Pages::Changed {
            base: base.as_file(),
            among: Some(&among),
        };
        for (pages, expected) in [(Pages::All, 4), (changed, 0)] {
            let file = TempFile::new().unwrap();
            let backing = Some(base.as_file());
            let written = write(&clone, &layout, backing, pages, file.as_file()).unwrap();
            let total: u64 = written.contents.extents.iter().map(|e| e.len).sum();
            assert_eq!(total, expected * 4096);
        }
        assert_eq!(seal.strays(), 0);
    }

    #[test]
    fn write_when_pages_of_pmem_are_private_has_them_even_if_they_are_zero() {
        let layout = MemoryLayout::with_windows(64 << 20, 0, 128 << 20);
        let memory = allocate(&layout).unwrap();
        let image = TempFile::new().unwrap();
        image.as_file().write_all_at(&[5; 4 * PAGE], 0).unwrap();
        let place = places(&memory, &layout).unwrap()[1];
        assert_eq!(place.kind, RegionKind::Pmem);
        // SAFETY: a part of the window, which nobody uses.
        let mapped = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
            let file = image.as_file().as_raw_fd();
            libc::mmap64(place.host.cast(), 4 * PAGE, protection, flags, file, 0)
        };
        assert_ne!(mapped, libc::MAP_FAILED);
        let window = layout.window(RegionKind::Pmem).unwrap().start;
        let byte: u8 = memory.read_obj(GuestAddress(window)).unwrap();
        assert_eq!(byte, 5);
        memory
            .write_slice(&[0; PAGE], GuestAddress(window + 2 * PAGE as u64))
            .unwrap();
        let expected = [Extent {
            offset: place.offset + 2 * PAGE as u64,
            len: PAGE as u64,
        }];
        let base = TempFile::new().unwrap();
        let full = write(&memory, &layout, None, Pages::All, base.as_file()).unwrap();
        assert_eq!(full.contents.extents, expected);
        let pages = Pages::Changed {
            base: base.as_file(),
            among: None,
        };
        let difference = TempFile::new().unwrap();
        let difference = write(&memory, &layout, None, pages, difference.as_file()).unwrap();
        assert_eq!(difference.contents.extents, expected);
    }

    #[test]
    fn contents_when_out_of_order_or_range_are_refused() {
        let extent = |offset, len| Extent { offset, len };
        let contents = |extents: Vec<Extent>, checksums| Contents {
            extents,
            checksums: vec![0; checksums],
        };
        let good = contents(vec![extent(0, 4096), extent(8192, 4096)], 1);
        good.check(12288).unwrap();
        for bad in [
            vec![extent(0, 4095)],
            vec![extent(1, 4096)],
            vec![extent(0, 0)],
            vec![extent(8192, 8192)],
            vec![extent(u64::MAX - 4095, 8192)],
            vec![extent(4096, 4096), extent(0, 4096)],
            vec![extent(0, 8192), extent(4096, 4096)],
        ] {
            assert!(contents(bad.clone(), 1).check(12288).is_err(), "{bad:?}");
        }
        // The first ends and the second begins in the same chunk.
        let several = vec![extent(4096, 3 * CHUNK - 8192), extent(3 * CHUNK - 4096, 8192)];
        for checksums in 0..8 {
            let checked = contents(several.clone(), checksums).check(4 * CHUNK);
            assert_eq!(checked.is_ok(), checksums == 4, "{checksums}: {checked:?}");
        }
        assert_eq!(contents(several, 4).pieces().len(), 5);
    }

    #[test]
    fn file_when_any_page_is_damaged_is_found_by_reading_and_verifying() {
        let layout = MemoryLayout::ram(64 << 20);
        let memory = allocate(&layout).unwrap();
        // A run over the border of two chunks, and one by itself.
        memory
            .write_slice(&[7; 8 * PAGE], GuestAddress(8 * CHUNK - 4 * PAGE as u64))
            .unwrap();
        memory.write_slice(&[9; PAGE], GuestAddress(20 * CHUNK)).unwrap();
        let file = TempFile::new().unwrap();
        let file = file.as_file();
        let contents = write(&memory, &layout, None, Pages::All, file).unwrap().contents;
        assert_eq!((contents.extents.len(), contents.checksums.len()), (2, 3));
        let other = allocate(&layout).unwrap();
        for (at, chunk) in [(8 * CHUNK - 1, 7), (8 * CHUNK, 8), (20 * CHUNK + 4095, 20)] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 4], at).unwrap();
            for result in [
                verify(file, &contents, true),
                read(&other, &layout, file, &contents, all),
            ] {
                assert!(
                    matches!(result, Err(ReadError::Damaged { offset, .. }) if offset == chunk * CHUNK),
                    "{result:?}"
                );
            }
            file.write_all_at(&byte, at).unwrap();
        }
        verify(file, &contents, true).unwrap();
        // Where nothing was written, only who maps the file would see it.
        file.write_all_at(&[1], 40 * CHUNK + 77).unwrap();
        verify(file, &contents, false).unwrap();
        read(&other, &layout, file, &contents, all).unwrap();
        assert!(matches!(
            verify(file, &contents, true),
            Err(ReadError::Stray { offset }) if offset == 40 * CHUNK + 77
        ));
        file.write_all_at(&[0], 40 * CHUNK + 77).unwrap();
        verify(file, &contents, true).unwrap();
        file.write_all_at(&[1], 64 * CHUNK - 1).unwrap();
        assert!(matches!(
            verify(file, &contents, true),
            Err(ReadError::Stray { .. })
        ));
    }
}
