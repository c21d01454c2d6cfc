//! A body that is lent to another datacenter, and taken back if nothing of it was asked for.
//!
//! Lives inside the caller's request and ends with it; nothing has to be stopped.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::Stream;
use sluice_proto::calls::ByteStream;
use sluice_proto::problem::Refusal;

/// Whoever lent a body.
pub(crate) struct Lender(Arc<Mutex<Body>>);

struct Body {
    stream: Option<ByteStream>,
    is_touched: bool,
}

struct Lent(Arc<Mutex<Body>>);

/// The body to lend, and what gets it back.
pub(crate) fn lend(stream: ByteStream) -> (Lender, ByteStream) {
    let body = Arc::new(Mutex::new(Body { stream: Some(stream), is_touched: false }));
    (Lender(body.clone()), Box::pin(Lent(body)))
}

fn lock(body: &Mutex<Body>) -> MutexGuard<'_, Body> {
    // A stream that panicked is not taken back: it was touched.
    body.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lender {
    /// The body, if nobody has asked for any of it.
    pub(crate) fn take_back(self) -> Option<ByteStream> {
        let mut body = lock(&self.0);
        if body.is_touched { None } else { body.stream.take() }
    }
}

impl Stream for Lent {
    type Item = Result<Bytes, Refusal>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut body = lock(&self.0);
        body.is_touched = true;
        match &mut body.stream {
            Some(stream) => stream.as_mut().poll_next(cx),
            None => Poll::Ready(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::{FutureExt, StreamExt, stream};

    fn body() -> ByteStream {
        stream::iter([Ok(Bytes::from_static(b"one")), Ok(Bytes::from_static(b"two"))]).boxed()
    }

    #[test]
    fn a_body_comes_back_whole_or_not_at_all() {
        let (lender, lent) = lend(body());
        drop(lent);
        let back: Vec<_> = lender.take_back().unwrap().collect().now_or_never().unwrap();
        assert_eq!(back.len(), 2);
        let (lender, mut lent) = lend(body());
        assert_eq!(lent.next().now_or_never().flatten().unwrap().unwrap(), "one");
        assert!(lender.take_back().is_none());
    }
}
