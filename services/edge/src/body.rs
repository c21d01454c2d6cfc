//! The body of a request, and what becomes of it when nobody wants it.
//!
//! Whoever refuses a request drops its body. On HTTP/1.1 the client may still be writing, and would never see the
//! answer if the connection were closed under it (RFC 9112, section 9.6): so a body that is dropped early is drained
//! by a task of the datacenter's [`Shutdown`], a bounded while. On HTTP/2 the stream would be reset after the answer,
//! which is right (RFC 9113, section 8.1), but clients there are (curl among them) that then forget the answer.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header;
use http::request::Parts;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use sluice_node::shutdown::Shutdown;
use tokio::time::{Instant, timeout_at};

use crate::App;
use crate::accept::Activity;

/// How long clients wait for 100 before they send their body all the same: curl 1 s, as does our own.
const EXPECT_PATIENCE: Duration = Duration::from_millis(900);

/// What is drained of a body after an early refusal.
#[derive(Clone, Copy, Debug)]
pub struct DrainLimits {
    /// Bytes at most.
    pub bytes: u64,
    /// Time at most.
    pub time: Duration,
}

impl Default for DrainLimits {
    /// The longest run there is, and 3 s: a client that writes first has then written it, or is slow enough to see
    /// the answer meanwhile.
    fn default() -> Self {
        Self { bytes: (8 << 20) + (64 << 10), time: Duration::from_secs(3) }
    }
}

/// The body of a request.
pub(crate) struct RequestBody {
    incoming: Option<Incoming>,
    /// From when on bytes come: at once, unless the client waits for 100, and then when it is asked for them, which
    /// sends that, or its patience ends.
    comes_from: Instant,
    asked: bool,
    limits: DrainLimits,
    tasks: Shutdown,
    activity: Arc<Activity>,
}

impl RequestBody {
    pub(crate) fn new(incoming: Incoming, head: &Parts, app: &App, activity: Arc<Activity>) -> Self {
        let waits = head.headers.contains_key(header::EXPECT);
        let comes_from = Instant::now() + if waits { EXPECT_PATIENCE } else { Duration::ZERO };
        let (limits, tasks) = (app.settings.drain, app.tasks.clone());
        Self { incoming: Some(incoming), comes_from, asked: false, limits, tasks, activity }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.asked = true;
        let Some(incoming) = &mut self.incoming else { return Poll::Ready(None) };
        let frame = Pin::new(incoming).poll_frame(cx);
        match &frame {
            Poll::Ready(Some(Ok(_))) => self.activity.touch(),
            // At its end, or broken: nothing is left to drain.
            Poll::Ready(Some(Err(_)) | None) => self.incoming = None,
            Poll::Pending => {}
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        if let Some(incoming) = self.incoming.take()
            && (self.asked || self.comes_from <= Instant::now())
            && !incoming.is_end_stream()
        {
            self.tasks.spawn(drain(incoming, self.limits));
        }
    }
}

async fn drain(mut incoming: Incoming, limits: DrainLimits) {
    let deadline = Instant::now() + limits.time;
    let mut left = limits.bytes;
    while let Ok(Some(Ok(frame))) = timeout_at(deadline, incoming.frame()).await {
        left = left.saturating_sub(frame.data_ref().map_or(0, |data| data.len() as u64));
        if left == 0 {
            return;
        }
    }
}
