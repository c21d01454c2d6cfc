//! Reading from a socket in gulps: TLS asks for a record at a time, and every call into the system costs.
//!
//! Fewer and larger reads also let the sender's acknowledgements go out together. What was read and not asked for yet
//! waits in a buffer that exists only while there is something in it: a connection that says nothing has none. Owned by
//! its connection, and gone with it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

/// The most bytes that are read at once: four records.
const GULP: usize = 64 << 10;

/// A stream that is read in gulps, and written as it is.
#[derive(Debug)]
pub(crate) struct Gulps<S> {
    stream: S,
    buffer: BytesMut,
}

impl<S> Gulps<S> {
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, buffer: BytesMut::new() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gulps<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { stream, buffer } = &mut *self;
        if buffer.is_empty() {
            // The room is that of the last gulp, if there was no pause since.
            buffer.reserve(GULP);
            let read = poll_read_buf(Pin::new(stream), cx, buffer);
            if buffer.is_empty() {
                *buffer = BytesMut::new();
            }
            ready!(read)?;
        }
        let len = buffer.len().min(out.remaining());
        out.put_slice(&buffer[..len]);
        buffer.advance(len);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gulps<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    #[tokio::test]
    async fn what_is_read_is_what_was_sent_and_no_buffer_stays() {
        let (near, mut far) = duplex(1 << 20);
        let mut near = Gulps::new(near);
        let sent: Vec<u8> = (0..200_000u32).map(|i| (i % 251) as u8).collect();
        far.write_all(&sent).await.unwrap();
        let mut got = vec![0; 100];
        near.read_exact(&mut got).await.unwrap();
        assert_eq!(near.buffer.len(), GULP - 100, "more was read than was asked for");
        got.resize(sent.len(), 0);
        near.read_exact(&mut got[100..]).await.unwrap();
        assert_eq!(got, sent);

        let waits = tokio::time::timeout(std::time::Duration::from_millis(1), near.read_u8()).await;
        assert!(waits.is_err());
        assert_eq!(near.buffer.capacity(), 0, "a connection that waits has no buffer");
        near.write_all(b"answer").await.unwrap();
        let mut answer = [0; 6];
        far.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"answer");
        drop(far);
        assert_eq!(near.read(&mut got).await.unwrap(), 0, "the end is told");
    }
}
