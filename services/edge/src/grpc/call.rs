//! One call: who makes it, what it has paid for, and its answer on the way out, up to the status at its end.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use sluice_engine::context::SignedContext;
use sluice_node::budget::{ConcurrencyPermit, MemoryPermit};
use sluice_node::metrics::RpcLabels;
use sluice_node::telemetry::Served;
use sluice_proto::problem::{Problem, Refusal};
use sluice_proto::trace::TraceId;
use sluice_proto::{code, ingest};
use tokio::time::{Sleep, sleep_until};
use tonic::{Code, Status};

use super::status;
use crate::App;
use crate::routes::log;

/// A call, as far as refusing it goes.
#[derive(Clone)]
pub(super) struct Call {
    pub(super) app: Arc<App>,
    pub(super) trace: TraceId,
}

impl Call {
    /// The status with which the call ends when it is refused.
    pub(super) fn status(&self, refusal: &Refusal) -> Status {
        status::of(refusal, &self.app.dc, self.trace)
    }

    /// A refusal inside the call, which goes on.
    pub(super) fn problem(&self, refusal: &Refusal) -> ingest::Problem {
        status::problem_of(refusal, &self.app.dc, self.trace)
    }
}

/// Who makes a call.
#[derive(Clone)]
pub(super) struct Caller {
    pub(super) context: SignedContext,
    pub(super) call: Call,
}

/// The memory that a call has paid for, held until it ends.
#[derive(Clone, Default)]
pub(super) struct Paid(Arc<Mutex<Option<MemoryPermit>>>);

impl Paid {
    /// Pays, or refuses.
    pub(super) fn take(&self, app: &App, bytes: u64) -> Result<(), Refusal> {
        let permit = app.parts.memory.try_take(bytes);
        let permit = permit.inspect_err(|_| app.parts.metrics.count_shed("memory"))?;
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(permit);
        Ok(())
    }
}

/// How a call may end, and what it gives back then.
#[derive(Default)]
pub(super) struct End {
    /// When the client stops waiting.
    pub(super) deadline: Option<tokio::time::Instant>,
    /// Whether its refusals have names of ours.
    pub(super) is_ours: bool,
    /// One of the requests that go on at once.
    pub(super) permit: Option<ConcurrencyPermit>,
    /// The memory.
    pub(super) paid: Paid,
}

/// The client's time is up.
pub(super) fn out_of_time() -> Refusal {
    Refusal::new(Problem::Timeout, "the time that grpc-timeout gave the call is up")
}

/// The answer to a call: its messages as they come, then its status.
pub(super) struct CallBody {
    body: tonic::body::Body,
    call: Call,
    method: &'static str,
    began: Instant,
    /// The status, once it is known.
    code: Option<Code>,
    /// Ready when the client's time is up.
    late: Option<Pin<Box<Sleep>>>,
    is_ours: bool,
    has_ended: bool,
    served: Served,
    _held: (Option<ConcurrencyPermit>, Paid),
}

impl CallBody {
    /// Follows an answer to its end.
    pub(super) fn wrap(
        response: Response<tonic::body::Body>,
        call: Call,
        method: &'static str,
        began: Instant,
        end: End,
        served: Served,
    ) -> Response<Body> {
        let End { deadline, is_ours, permit, paid } = end;
        let (mut head, body) = response.into_parts();
        let code = end_of(&mut head.headers, &call, is_ours);
        let late = deadline.map(|deadline| Box::pin(sleep_until(deadline)));
        let has_ended = code.is_some();
        let held = (permit, paid);
        let body = Self { body, call, method, began, code, late, is_ours, has_ended, served, _held: held };
        Response::from_parts(head, Body::new(body))
    }
}

/// Reads the status at the end of a call, and gives it a name if it has none. `None` if it is not there.
fn end_of(headers: &mut HeaderMap, call: &Call, is_ours: bool) -> Option<Code> {
    let code = Status::from_header_map(headers)?.code();
    let Some(refusal) = status::unnamed(headers).filter(|_| is_ours) else { return Some(code) };
    log(&refusal);
    let named = call.status(&refusal);
    // Names that are there are replaced. What cannot be put in a header stays as it was.
    let _ = named.add_header(headers);
    Some(named.code())
}

impl HttpBody for CallBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        if this.has_ended {
            return Poll::Ready(None);
        }
        if this.late.as_mut().is_some_and(|late| late.as_mut().poll(cx).is_ready()) {
            // Whatever works for the answer ends with it.
            this.body = tonic::body::Body::empty();
            this.has_ended = true;
            let status = this.call.status(&out_of_time());
            this.code = Some(status.code());
            let mut trailers = HeaderMap::new();
            let added = status.add_header(&mut trailers);
            return Poll::Ready(Some(added.map(|()| Frame::trailers(trailers))));
        }
        let frame = this.served.within(|| Pin::new(&mut this.body).poll_frame(cx));
        match frame {
            Poll::Ready(Some(Ok(frame))) => {
                let mut trailers = match frame.into_trailers() {
                    Ok(trailers) => trailers,
                    Err(data) => return Poll::Ready(Some(Ok(data))),
                };
                this.has_ended = true;
                this.code = end_of(&mut trailers, &this.call, this.is_ours);
                Poll::Ready(Some(Ok(Frame::trailers(trailers))))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(error))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.has_ended || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

impl Drop for CallBody {
    fn drop(&mut self) {
        // A client that goes away before the end has cancelled the call.
        let outcome = self.code.unwrap_or(Code::Cancelled);
        let labels = RpcLabels {
            rpc_system_name: "grpc",
            rpc_method: self.method,
            rpc_response_status_code: code::name(outcome),
        };
        self.served.span().record("rpc.response.status_code", code::name(outcome));
        let metrics = &self.call.app.parts.metrics;
        metrics.rpc_calls.get_or_create(&labels).observe(self.began.elapsed().as_secs_f64());
    }
}
