//! HTTP/1.1 over TLS: requests and answers, one at a time, on pooled connections.
//!
//! hyper itself rather than a client around it, for one thing that those keep to themselves: the answer 100. A body
//! of some size waits for it ([`Body`]), so that a request which is refused, or sent on to another datacenter, costs
//! no bytes of it. A server that says nothing for a while gets the body all the same (RFC 9110, section 10.1.1).
//!
//! What is refused takes its connection with it: neither side can tell there whether a body follows.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::header::{EXPECT, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use http::{Method, StatusCode};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde::Serialize;
use sluice_proto::gate::Gate;
use sluice_proto::trace::{TRACEPARENT, TraceContext};
use tokio::time::{Instant, Sleep, sleep, sleep_until};
use url::Url;

use crate::config::Timeouts;

/// Bodies from this length on wait for 100: what is shorter costs less than the wait.
const EXPECT_FROM: usize = 256 << 10;

/// How long a body waits for 100, at most: as long as other clients do.
const EXPECT_PATIENCE: Duration = Duration::from_secs(1);

/// How much of a body is handed to the connection at once; the grain of the stall watch.
const FRAME: usize = 256 << 10;

/// How long an idle connection is kept.
const IDLE: Duration = Duration::from_secs(90);

type Error = Box<dyn std::error::Error + Send + Sync>;

/// The connections of one client, to any of its datacenters.
#[derive(Clone)]
pub(crate) struct Wire {
    client: Client<HttpsConnector<HttpConnector>, Body>,
    patience: Duration,
    trace: HeaderValue,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wire")
    }
}

impl Wire {
    /// Connections that trust as `tls` says; `idle` of them are kept for each datacenter. What is sent follows from `trace`.
    pub(crate) fn new(
        tls: rustls::ClientConfig,
        timeouts: Timeouts,
        idle: usize,
        trace: Option<TraceContext>,
    ) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(timeouts.connect));
        // HTTP/1.1 only: one connection per request in flight, each with its own window and its own core.
        let https = HttpsConnectorBuilder::new().with_tls_config(tls).https_only().enable_http1();
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(idle)
            .build(https.wrap_connector(tcp));
        let own = || TraceContext::new(rand::random(), rand::random(), false);
        // All zeros do not come up.
        let trace = trace.or_else(own).map_or(HeaderValue::from_static(""), |trace| trace.header());
        Self { client, patience: EXPECT_PATIENCE.min(timeouts.stall / 4), trace }
    }

    /// Sends a request; returns once the head of its answer is there.
    pub(crate) async fn send(&self, request: &Request) -> Result<Answer, Error> {
        let gate = (request.bytes.len() >= EXPECT_FROM).then(|| Arc::new(Gate::default()));
        let mut out = http::Request::builder().method(request.method.clone()).uri(request.url.as_str());
        if let Some(headers) = out.headers_mut() {
            headers.clone_from(&request.headers);
            headers.insert(TRACEPARENT, self.trace.clone());
            headers
                .insert(USER_AGENT, HeaderValue::from_static(concat!("sluice/", env!("CARGO_PKG_VERSION"))));
            if gate.is_some() {
                headers.insert(EXPECT, HeaderValue::from_static("100-continue"));
            }
        }
        let watch = request.watch.clone();
        watch.begin(request.bytes.len());
        let wait = gate.clone().map(|gate| Wait { gate, patience: Box::pin(sleep(self.patience)) });
        let mut out = out.body(Body { bytes: request.bytes.clone(), wait, watch })?;
        if let Some(gate) = gate.clone() {
            hyper::ext::on_informational(&mut out, move |answer| {
                if answer.status() == StatusCode::CONTINUE {
                    gate.open();
                }
            });
        }
        let (head, body) = self.client.request(out).await?.into_parts();
        Ok(Answer { head, body, is_from_elsewhere: false })
    }
}

/// A request, which can be sent more than once.
#[derive(Debug)]
pub(crate) struct Request {
    method: Method,
    pub(crate) url: Url,
    headers: HeaderMap,
    bytes: Bytes,
    /// How its body gets on.
    pub(crate) watch: Arc<Watch>,
}

impl Request {
    pub(crate) fn new(method: Method, url: Url) -> Self {
        let watch = Arc::new(Watch::new());
        Self { method, url, headers: HeaderMap::new(), bytes: Bytes::new(), watch }
    }

    /// Adds a header; one that no header can hold is a bug, and left out.
    #[must_use]
    pub(crate) fn header(mut self, name: impl TryInto<HeaderName>, value: impl TryInto<HeaderValue>) -> Self {
        if let (Ok(name), Ok(value)) = (name.try_into(), value.try_into()) {
            self.headers.insert(name, value);
        }
        self
    }

    /// Takes a header away.
    pub(crate) fn forget(&mut self, name: &str) {
        self.headers.remove(name);
    }

    #[must_use]
    pub(crate) fn query(mut self, name: &str, value: impl fmt::Display) -> Self {
        self.url.query_pairs_mut().append_pair(name, &value.to_string());
        self
    }

    #[must_use]
    pub(crate) fn body(mut self, bytes: Bytes) -> Self {
        self.bytes = bytes;
        self
    }

    #[must_use]
    pub(crate) fn json(self, body: &impl Serialize) -> Self {
        // Strings and numbers always make JSON.
        let bytes = serde_json::to_vec(body).unwrap_or_default();
        self.header("content-type", HeaderValue::from_static("application/json")).body(bytes.into())
    }
}

/// An answer, whose body comes piece by piece.
#[derive(Debug)]
pub(crate) struct Answer {
    head: http::response::Parts,
    body: Incoming,
    /// Whether it is of another datacenter than the one that was asked.
    pub(crate) is_from_elsewhere: bool,
}

impl Answer {
    pub(crate) fn status(&self) -> StatusCode {
        self.head.status
    }

    pub(crate) fn headers(&self) -> &HeaderMap {
        &self.head.headers
    }

    /// The next piece of the body; `None` at its end.
    pub(crate) async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            match self.body.frame().await.transpose()? {
                None => return Ok(None),
                // Trailers say nothing here.
                Some(frame) => match frame.into_data() {
                    Ok(data) => return Ok(Some(data)),
                    Err(_) => continue,
                },
            }
        }
    }
}

#[derive(Debug)]
struct Wait {
    gate: Arc<Gate>,
    patience: Pin<Box<Sleep>>,
}

impl Wait {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.gate.poll(cx) {
            Poll::Ready(()) => Poll::Ready(()),
            Poll::Pending => self.patience.as_mut().poll(cx),
        }
    }
}

/// The body of a request, which notes when the connection last took some of it.
#[derive(Debug)]
struct Body {
    bytes: Bytes,
    wait: Option<Wait>,
    watch: Arc<Watch>,
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.bytes.is_empty() {
            return Poll::Ready(None);
        }
        if let Some(wait) = &mut self.wait {
            std::task::ready!(wait.poll(cx));
            self.wait = None;
        }
        let len = self.bytes.len().min(FRAME);
        let frame = self.bytes.split_to(len);
        self.watch.moved(self.bytes.len());
        Poll::Ready(Some(Ok(Frame::data(frame))))
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.len() as u64)
    }
}

/// How the body of a request gets on.
#[derive(Debug)]
pub(crate) struct Watch {
    begun: Instant,
    /// When the connection last asked for bytes, in ms after `begun`.
    moved_ms: AtomicU64,
    left: AtomicU64,
}

impl Watch {
    fn new() -> Self {
        Self { begun: Instant::now(), moved_ms: AtomicU64::new(0), left: AtomicU64::new(0) }
    }

    fn begin(&self, len: usize) {
        self.moved(len);
    }

    fn moved(&self, left: usize) {
        self.moved_ms.store(self.begun.elapsed().as_millis() as u64, Ordering::Relaxed);
        self.left.store(left as u64, Ordering::Relaxed);
    }

    /// Returns when nothing moved for `stall`, or, once all is handed over, nothing came back for `answer`.
    pub(crate) async fn stalled(&self, stall: Duration, answer: Duration) {
        loop {
            let patience = if self.left.load(Ordering::Relaxed) > 0 { stall } else { answer };
            let moved = Duration::from_millis(self.moved_ms.load(Ordering::Relaxed));
            let until = self.begun + moved + patience;
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }
}
