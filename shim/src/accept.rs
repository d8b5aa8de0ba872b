//! Connections to the shim's socket, told apart by their first frame: streams are served here, everything else by ttrpc's
//! server.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::Stream;
use runtime::containers::StreamHub;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

use crate::frames::Frames;
use crate::streaming_service::{self, StreamRequest};

/// A connection whose first bytes have been read already, and are read again.
#[derive(Debug)]
pub struct Replayed {
    /// To be read first, from the last one on.
    bytes: Vec<u8>,
    stream: UnixStream,
}

struct Accepting {
    listener: UnixListener,
    streams: Arc<StreamHub>,
    /// Connections whose first frame has not come yet.
    silent: JoinSet<Option<Replayed>>,
}

/// The connections that come in on `listener`, those for `streams` not among them. Dropping it closes the listener.
pub fn connections(
    listener: UnixListener,
    streams: Arc<StreamHub>,
) -> impl Stream<Item = io::Result<Replayed>> + Send {
    let accepting = Accepting {
        listener,
        streams,
        silent: JoinSet::new(),
    };
    futures::stream::unfold(accepting, |mut accepting| async {
        let connection = accepting.next().await;
        Some((connection, accepting))
    })
}

impl Accepting {
    async fn next(&mut self) -> io::Result<Replayed> {
        loop {
            tokio::select! {
                accepted = self.listener.accept() => {
                    let (stream, _) = accepted?;
                    self.silent.spawn(sort(stream, Arc::clone(&self.streams)));
                }
                Some(sorted) = self.silent.join_next() => {
                    if let Ok(Some(connection)) = sorted {
                        return Ok(connection);
                    }
                }
            }
        }
    }
}

/// Waits for the first frame of a connection, and for its end if it is a stream's.
async fn sort(stream: UnixStream, streams: Arc<StreamHub>) -> Option<Replayed> {
    let mut frames = Frames::of(stream);
    let first = match frames.next().await {
        Ok(Some(frame)) => frame,
        // Somebody has looked whether the socket is served.
        Ok(None) => return None,
        Err(error) => {
            tracing::debug!(%error, "connection without a first frame");
            return None;
        }
    };
    if let Some(request) = StreamRequest::of(&first) {
        let (stream, read) = frames.into_parts();
        // Not in the set of the silent: it would end with the listener, before the last output has been fetched.
        tokio::spawn(async move {
            let replayed = Replayed::new(read, stream);
            if let Err(error) = streaming_service::serve(replayed, request, streams).await {
                tracing::debug!(%error, "stream");
            }
        });
        return None;
    }
    let (stream, read) = frames.into_parts();
    let mut bytes = first.encode().ok()?;
    bytes.extend(read);
    Some(Replayed::new(bytes, stream))
}

impl Replayed {
    fn new(mut bytes: Vec<u8>, stream: UnixStream) -> Self {
        bytes.reverse();
        Self { bytes, stream }
    }
}

impl AsyncRead for Replayed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.bytes.is_empty() {
            return Pin::new(&mut self.stream).poll_read(context, buffer);
        }
        while buffer.remaining() > 0
            && let Some(byte) = self.bytes.pop()
        {
            buffer.put_slice(&[byte]);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Replayed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
