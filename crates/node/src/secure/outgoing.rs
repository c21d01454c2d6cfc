//! What was sealed and is to be sent.
//!
//! Most of it goes at once. So it is sealed into a buffer that the thread lends: one that is warm in its cache, needs
//! not be made and zeroed for each write, and costs a connection nothing. What a slow client leaves is copied out of it.

use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::AsyncWrite;

/// The largest buffer that a thread keeps to lend.
const LENT: usize = 128 << 10;

thread_local! {
    /// What this thread lends; empty while it is lent, and before the first time.
    static LENDER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Sealed bytes in the order in which they were sealed.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    /// All of it initialised; the part that waits, and room before and behind it.
    buffer: Vec<u8>,
    waiting: Range<usize>,
}

impl Outgoing {
    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Room for so many bytes behind what waits; they count when they are [added](Self::add).
    pub(super) fn room(&mut self, len: usize) -> &mut [u8] {
        if self.buffer.is_empty() {
            self.buffer = LENDER.take();
        }
        let end = self.waiting.end + len;
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        &mut self.buffer[self.waiting.end..end]
    }

    /// Counts the first `len` bytes of the room that was given.
    pub(super) fn add(&mut self, len: usize) {
        self.waiting.end += len;
    }

    /// Sends what waits. Whatever comes of it, afterwards this holds what waits still, and no more.
    pub(super) fn poll_send<IO: AsyncWrite>(
        &mut self,
        cx: &mut Context<'_>,
        io: Pin<&mut IO>,
    ) -> Poll<io::Result<()>> {
        let sent = self.poll_send_all(cx, io);
        self.give_back();
        sent
    }

    fn poll_send_all<IO: AsyncWrite>(
        &mut self,
        cx: &mut Context<'_>,
        mut io: Pin<&mut IO>,
    ) -> Poll<io::Result<()>> {
        while !self.waiting.is_empty() {
            let len = ready!(io.as_mut().poll_write(cx, &self.buffer[self.waiting.clone()]))?;
            if len == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.waiting.start += len;
        }
        Poll::Ready(Ok(()))
    }

    /// Lends the buffer to others, unless it is one's own: as long as what waited in it.
    fn give_back(&mut self) {
        if self.waiting.is_empty() || self.buffer.len() > self.waiting.end {
            let rest = self.buffer[self.waiting.clone()].to_vec();
            let buffer = std::mem::replace(&mut self.buffer, rest);
            self.waiting = 0..self.buffer.len();
            let other = LENDER.take();
            let larger = if buffer.len() > other.len() && buffer.len() <= LENT { buffer } else { other };
            LENDER.set(larger);
        }
    }

    /// Bytes of memory that are its own.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.buffer.capacity()
    }
}
