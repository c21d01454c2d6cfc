//! Bodies of requests on their way out.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::Frame;
use sluice_proto::calls::ByteStream;
use sluice_proto::gate::Gate;
use sluice_proto::problem::{Problem, Refusal};

/// Why a body broke off, for whoever hears that its request failed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cause(Arc<Mutex<Option<Refusal>>>);

impl Cause {
    pub(crate) fn take(&self) -> Option<Refusal> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn set(&self, refusal: Refusal) -> Refusal {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(refusal.clone());
        refusal
    }
}

/// The body of a request.
pub(crate) enum Outgoing {
    /// Pieces that are there, in order.
    Whole(std::collections::VecDeque<Bytes>),
    /// Bytes that are asked for once the other side wants them.
    Flow {
        gate: Arc<Gate>,
        stream: ByteStream,
        /// Bytes that were declared and have not come.
        left: u64,
        /// The piece with which all has come.
        last: Option<Bytes>,
        cause: Cause,
    },
}

impl http_body::Body for Outgoing {
    type Data = Bytes;
    type Error = Refusal;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Refusal>>> {
        match &mut *self {
            Self::Whole(pieces) => Poll::Ready(pieces.pop_front().map(|piece| Ok(Frame::data(piece)))),
            Self::Flow { gate, stream, left, last, cause } => {
                ready!(gate.poll(cx));
                loop {
                    let piece = ready!(stream.as_mut().poll_next(cx)).transpose();
                    let piece = match piece {
                        Ok(piece) => piece,
                        Err(refusal) => return Poll::Ready(Some(Err(cause.set(refusal)))),
                    };
                    // HTTP would cut off what is too much, and break off without a word where something lacks.
                    let Some(piece) = piece else {
                        let detail = format!("the body ended {left} bytes early");
                        let ended = match last.take() {
                            Some(last) => Ok(Frame::data(last)),
                            None if *left == 0 => return Poll::Ready(None),
                            None => Err(cause.set(Refusal::new(Problem::Truncated, detail))),
                        };
                        return Poll::Ready(Some(ended));
                    };
                    let Some(rest) = left.checked_sub(piece.len() as u64) else {
                        let detail = "the body is longer than declared";
                        return Poll::Ready(Some(Err(cause.set(Refusal::new(Problem::ChunkLength, detail)))));
                    };
                    *left = rest;
                    if rest > 0 {
                        return Poll::Ready(Some(Ok(Frame::data(piece))));
                    }
                    // Nobody asks after it: it is sent when it is known that nothing follows.
                    if !piece.is_empty() {
                        *last = Some(piece);
                    }
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(pieces) => pieces.is_empty(),
            Self::Flow { left, last, .. } => *left == 0 && last.is_none(),
        }
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::SizeHint::with_exact(match self {
            Self::Whole(pieces) => pieces.iter().map(|piece| piece.len() as u64).sum(),
            Self::Flow { left, last, .. } => *left + last.as_ref().map_or(0, |last| last.len() as u64),
        })
    }
}
