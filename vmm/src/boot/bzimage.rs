//! bzImage: finding and decompressing the ELF kernel inside (Linux Documentation/arch/x86/boot.rst).

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{BootError, KernelFault};

/// Largest kernel accepted, decompressed.
const MAX_KERNEL: u64 = 1 << 30;
const HEADER_MAGIC: [u8; 4] = *b"HdrS";
/// payload_offset and payload_length exist since protocol 2.08.
const MIN_VERSION: u16 = 0x0208;
/// An lz4 "legacy" block holds at most this much, decompressed.
const LZ4_BLOCK: usize = 8 << 20;

/// Where the compressed kernel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    offset: u64,
    length: u64,
}

impl Header {
    /// Reads the setup header; `None` when the file is not a bzImage at all.
    ///
    /// # Errors
    /// [`BootError::Truncated`] or [`BootError::Malformed`] when it is one that cannot be used.
    pub fn read(path: &Path, file: &File, size: u64) -> Result<Option<Self>, BootError> {
        let mut setup = [0; 0x250];
        if file.read_exact_at(&mut setup, 0).is_err() || setup[0x202..0x206] != HEADER_MAGIC {
            return Ok(None);
        }
        let version = u16::from_le_bytes([setup[0x206], setup[0x207]]);
        if version < MIN_VERSION {
            return Err(BootError::Malformed {
                path: path.to_owned(),
                problem: KernelFault::OldProtocol(version),
            });
        }
        let field = |at: usize| u32::from_le_bytes([setup[at], setup[at + 1], setup[at + 2], setup[at + 3]]);
        // A setup_sects of 0 means 4, for historical reasons.
        let sectors = if setup[0x1f1] == 0 {
            4
        } else {
            u64::from(setup[0x1f1])
        };
        let header = Self {
            offset: (sectors + 1) * 512 + u64::from(field(0x248)),
            length: u64::from(field(0x24c)),
        };
        let needed = header.offset + header.length;
        if needed > size {
            return Err(BootError::Truncated {
                path: path.to_owned(),
                what: "the compressed kernel",
                needed,
                size,
            });
        }
        Ok(Some(header))
    }

    /// Decompresses the kernel.
    ///
    /// # Errors
    /// [`BootError::Malformed`] when the compression is unknown, the data corrupt or the result too large.
    pub fn decompress(&self, path: &Path, file: &File) -> Result<Vec<u8>, BootError> {
        let mut payload = vec![0; usize::try_from(self.length).unwrap_or(0)];
        file.read_exact_at(&mut payload, self.offset)
            .map_err(|source| BootError::File {
                what: "kernel",
                path: path.to_owned(),
                source,
            })?;
        decompress(&payload).map_err(|error| BootError::Malformed {
            path: path.to_owned(),
            problem: KernelFault::Compressed(error),
        })
    }
}

fn decompress(payload: &[u8]) -> io::Result<Vec<u8>> {
    // Every format but gzip is followed by the size of the result, and gzip ends with it.
    let size = payload
        .last_chunk()
        .map_or(0, |size| u64::from(u32::from_le_bytes(*size)));
    if size == 0 || size > MAX_KERNEL {
        return Err(io::Error::other(format!("implausible size of {size} bytes")));
    }
    let kernel = match payload {
        [0x1f, 0x8b, ..] => read_all(flate2::read::GzDecoder::new(payload), size)?,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => read_all(lzma_rust2::XzReader::new(payload, false), size)?,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(payload).map_err(io::Error::other)?;
            read_all(decoder, size)?
        }
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => lz4_legacy(blocks, size)?,
        _ => {
            let start = payload.get(..6).unwrap_or(payload);
            return Err(io::Error::other(format!(
                "compression starting with {start:02x?} is none of gzip, xz, lz4 and zstd"
            )));
        }
    };
    if kernel.len() as u64 != size {
        return Err(io::Error::other(format!(
            "{} bytes instead of {size}",
            kernel.len()
        )));
    }
    Ok(kernel)
}

fn read_all(decoder: impl Read, size: u64) -> io::Result<Vec<u8>> {
    let mut kernel = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    decoder.take(size).read_to_end(&mut kernel)?;
    Ok(kernel)
}

/// The format `lz4 -l` writes: blocks preceded by their compressed size, here until `size` bytes are out.
fn lz4_legacy(mut blocks: &[u8], size: u64) -> io::Result<Vec<u8>> {
    let mut kernel = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    let mut block = vec![0; LZ4_BLOCK];
    while (kernel.len() as u64) < size {
        let truncated = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let (length, rest) = blocks.split_first_chunk().ok_or_else(truncated)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(io::Error::other)?;
        let (compressed, rest) = rest.split_at_checked(length).ok_or_else(truncated)?;
        let written = lz4_flex::block::decompress_into(compressed, &mut block).map_err(io::Error::other)?;
        kernel.extend_from_slice(block.get(..written).unwrap_or_default());
        blocks = rest;
    }
    Ok(kernel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decompress_when_the_format_is_unknown_names_the_bytes() {
        let error = decompress(b"BZh9xx\x10\0\0\0").unwrap_err().to_string();
        assert!(error.contains("42, 5a, 68"), "{error}");
    }

    #[test]
    fn decompress_when_the_size_is_implausible_refuses_before_allocating() {
        assert!(decompress(&[0x1f, 0x8b, 0xff, 0xff, 0xff, 0xff]).is_err());
        assert!(decompress(&[0x1f, 0x8b]).is_err());
    }

    #[test]
    fn decompress_when_gzip_gives_the_content() {
        use std::io::Write;
        let content = b"kernel".repeat(1000);
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&content).unwrap();
        assert_eq!(decompress(&encoder.finish().unwrap()).unwrap(), content);
    }

    #[test]
    fn decompress_when_lz4_legacy_gives_the_content() {
        let content = b"kernel".repeat(1000);
        let compressed = lz4_flex::block::compress(&content);
        let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
        payload.extend_from_slice(&(compressed.len() as u32).to_le_bytes());
        payload.extend_from_slice(&compressed);
        payload.extend_from_slice(&(content.len() as u32).to_le_bytes());
        assert_eq!(decompress(&payload).unwrap(), content);
        payload[4] = 0xff;
        payload[5] = 0xff;
        assert!(decompress(&payload).is_err());
    }
}
