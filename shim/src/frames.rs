//! ttrpc's frames: ten bytes of header, then a message.
//!
//! A connection is a sequence of frames in both directions; a request opens a stream of them by its odd id. With flags a side
//! says that it sends nothing more on a stream (`REMOTE_CLOSED`), or that a frame has no message at all (`NO_DATA`), not
//! even an empty one. See containerd/ttrpc, PROTOCOL.md.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// Bytes of a header: length, stream id (both big endian), kind, flags.
const HEADER: usize = 10;
/// Longest message that ttrpc allows.
pub const MAX_MESSAGE: usize = 4 << 20;

/// The sender sends nothing more on this stream.
pub const REMOTE_CLOSED: u8 = 1;
/// The sender of a request sends data, too.
pub const REMOTE_OPEN: u8 = 2;
/// There is no message.
pub const NO_DATA: u8 = 4;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Opens a stream; the message is a `ttrpc.Request`.
    Request,
    /// Ends a stream; the message is a `ttrpc.Response`.
    Response,
    /// A message of a stream.
    Data,
    /// Of a later version of the protocol: to be ignored.
    Other(u8),
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// Its stream.
    pub stream: u32,
    /// See [`REMOTE_CLOSED`], [`REMOTE_OPEN`], [`NO_DATA`].
    pub flags: u8,
    /// The message, encoded.
    pub message: Vec<u8>,
}

impl Frame {
    /// As it is sent.
    ///
    /// # Errors
    /// `InvalidInput` for a message that is too long.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let length = u32::try_from(self.message.len())
            .ok()
            .filter(|_| self.message.len() <= MAX_MESSAGE)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let mut bytes = Vec::with_capacity(HEADER + self.message.len());
        bytes.extend(length.to_be_bytes());
        bytes.extend(self.stream.to_be_bytes());
        bytes.extend([self.kind.into(), self.flags]);
        bytes.extend(&self.message);
        Ok(bytes)
    }

    /// Whether the sender sends nothing more on this stream.
    pub fn is_last(&self) -> bool {
        self.flags & REMOTE_CLOSED != 0
    }

    /// Whether there is a message.
    pub fn has_message(&self) -> bool {
        self.flags & NO_DATA == 0
    }
}

impl From<u8> for Kind {
    fn from(kind: u8) -> Self {
        match kind {
            1 => Self::Request,
            2 => Self::Response,
            3 => Self::Data,
            other => Self::Other(other),
        }
    }
}

impl From<Kind> for u8 {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Request => 1,
            Kind::Response => 2,
            Kind::Data => 3,
            Kind::Other(other) => other,
        }
    }
}

/// Reads frames.
#[derive(Debug)]
pub struct Frames<R> {
    reader: R,
    /// Read, and not yet handed out.
    bytes: Vec<u8>,
}

impl<R: AsyncRead + Unpin> Frames<R> {
    /// Of `reader`, from its next byte on.
    pub fn of(reader: R) -> Self {
        Self {
            reader,
            bytes: Vec::new(),
        }
    }

    /// The next frame; `None` when the sender has closed the connection after the last one. A call that is given up loses
    /// nothing.
    ///
    /// # Errors
    /// Of reading; `UnexpectedEof` in the middle of a frame, `InvalidData` for one that is too long.
    pub async fn next(&mut self) -> io::Result<Option<Frame>> {
        loop {
            if let Some(frame) = self.take()? {
                return Ok(Some(frame));
            }
            if self.reader.read_buf(&mut self.bytes).await? == 0 {
                return if self.bytes.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        }
    }

    /// The reader, and what has been read after the last frame.
    pub fn into_parts(self) -> (R, Vec<u8>) {
        (self.reader, self.bytes)
    }

    fn take(&mut self) -> io::Result<Option<Frame>> {
        let Some((header, rest)) = self.bytes.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let [a, b, c, d, e, f, g, h, kind, flags] = *header;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > MAX_MESSAGE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a ttrpc message of {length} bytes, {MAX_MESSAGE} are allowed"),
            ));
        }
        let Some(message) = rest.get(..length).map(<[u8]>::to_vec) else {
            return Ok(None);
        };
        self.bytes.drain(..HEADER + length);
        Ok(Some(Frame {
            kind: Kind::from(kind),
            stream: u32::from_be_bytes([e, f, g, h]),
            flags,
            message,
        }))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    fn frame(stream: u32, message: &[u8]) -> Frame {
        Frame {
            kind: Kind::Data,
            stream,
            flags: REMOTE_CLOSED,
            message: message.to_vec(),
        }
    }

    #[tokio::test]
    async fn frames_when_they_come_byte_by_byte_are_whole() {
        let (mut writer, reader) = tokio::io::duplex(1);
        let sent = [frame(1, b"words"), frame(3, b""), frame(u32::MAX, &[0; 5000])];
        let bytes: Vec<u8> = sent.iter().flat_map(|frame| frame.encode().unwrap()).collect();
        let writing = tokio::spawn(async move { writer.write_all(&bytes).await });

        let mut frames = Frames::of(reader);
        for expected in sent {
            assert_eq!(frames.next().await.unwrap().unwrap(), expected);
        }
        assert_eq!(frames.next().await.unwrap(), None);
        writing.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn frame_when_torn_or_too_long_is_an_error() {
        let bytes = frame(1, b"words").encode().unwrap();
        let mut torn = Frames::of(&bytes[..12]);
        assert_eq!(
            torn.next().await.unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );

        let mut long = Frames::of(&[0, 0x40, 0, 1, 0, 0, 0, 1, 3, 0][..]);
        assert_eq!(long.next().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert!(frame(1, &vec![0; MAX_MESSAGE + 1]).encode().is_err());
    }

    #[tokio::test]
    async fn bytes_when_read_beyond_a_frame_are_given_back() {
        let mut bytes = frame(1, b"a").encode().unwrap();
        bytes.extend(b"next");
        let mut frames = Frames::of(&bytes[..]);
        frames.next().await.unwrap().unwrap();
        let (rest, read) = frames.into_parts();
        assert_eq!([&read, rest].concat(), b"next");
    }
}
