//! The bytes that are sent: random, the same for every server, and cheap to make, so that the client costs the same
//! whomever it speaks to. A file is one block of random bytes, over and over.

use std::convert::Infallible;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use rand::{RngExt, SeedableRng};

/// Bytes of the block. No multiple of a chunk, so that no two chunks of a file are alike.
const BLOCK: usize = (32 << 20) + 4099;

/// The most bytes that are handed to a connection at once.
const FRAME: usize = 256 << 10;

/// The bytes of a file of any length.
#[derive(Clone, Debug)]
pub(crate) struct Content(Bytes);

impl Content {
    /// The same bytes for the same seed.
    pub(crate) fn new(seed: u64) -> Self {
        let mut block = vec![0; BLOCK];
        rand::rngs::StdRng::seed_from_u64(seed).fill(&mut block[..]);
        Self(block.into())
    }

    /// A range of the file as the body of a request.
    pub(crate) fn body(&self, range: Range<u64>) -> ContentBody {
        ContentBody { content: self.clone(), range }
    }

    /// A range of the file in one piece, which is copied only where the block ends.
    pub(crate) fn bytes(&self, range: Range<u64>) -> Bytes {
        let from = (range.start % BLOCK as u64) as usize;
        let len = (range.end - range.start) as usize;
        if from + len <= BLOCK {
            return self.0.slice(from..from + len);
        }
        let mut bytes = BytesMut::with_capacity(len);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.piece(range.start + bytes.len() as u64..range.end));
        }
        bytes.freeze()
    }

    /// The BLAKE3 hash of the first `len` bytes.
    pub(crate) fn hash(&self, len: u64) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        while at < len {
            let piece = self.piece(at..len);
            hasher.update(&piece);
            at += piece.len() as u64;
        }
        hasher.finalize()
    }

    /// The first bytes of a range, as many as there are in one piece.
    fn piece(&self, range: Range<u64>) -> Bytes {
        let from = (range.start % BLOCK as u64) as usize;
        let len = (range.end - range.start).min((BLOCK - from).min(FRAME) as u64) as usize;
        self.0.slice(from..from + len)
    }
}

/// A body of known length; nothing is copied for it.
#[derive(Debug)]
pub(crate) struct ContentBody {
    content: Content,
    range: Range<u64>,
}

impl Body for ContentBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.range.is_empty() {
            return Poll::Ready(None);
        }
        let piece = self.content.piece(self.range.clone());
        self.range.start += piece.len() as u64;
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.range.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.range.end - self.range.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;

    #[tokio::test]
    async fn ranges_join_to_the_file_whose_hash_is_told() {
        let content = Content::new(1);
        let len = BLOCK as u64 * 2 + 5;
        let mut hasher = blake3::Hasher::new();
        for range in [0..7, 7..BLOCK as u64 + 1, BLOCK as u64 + 1..len] {
            let (body, expected) = (content.body(range.clone()), range.end - range.start);
            assert_eq!(body.size_hint().exact(), Some(expected));
            let bytes = body.collect().await.unwrap().to_bytes();
            assert_eq!(bytes.len() as u64, expected);
            assert_eq!(content.bytes(range), bytes);
            hasher.update(&bytes);
        }
        assert_eq!(hasher.finalize(), content.hash(len));
        assert_ne!(content.hash(len), Content::new(2).hash(len));
    }
}
