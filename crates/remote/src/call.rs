//! What a call looks like: the one form of all requests and answers.
//!
//! `POST /v1/<service>/<call>`. The session context is in `sluice-context`, in base64. Arguments are JSON: in front of the
//! body, behind their length in four bytes (big-endian); or in `sluice-arguments`, where the body is bytes that come as they
//! come. The answer is JSON, or bytes, with 200; or a refusal with the status of its problem.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{FromRequest, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::{StreamExt, TryStreamExt};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, StatusCode};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sluice_engine::context::SignedContext;
use sluice_node::budget::{MemoryBudget, MemoryPermit};
use sluice_node::telemetry::{self, Whence};
use sluice_proto::calls::ByteStream;
use sluice_proto::problem::{Problem, Refusal};
use sluice_proto::trace::TRACEPARENT;
use sluice_store::MAX_PAGE_LEN;

use crate::tenure::Tenure;

pub(crate) const CONTEXT: &str = "sluice-context";
pub(crate) const ARGUMENTS: &str = "sluice-arguments";
pub(crate) const TENURE: &str = "sluice-tenure";

/// The most that arguments and what is sent along take: a page of a ledger, or a chunk, and room for a metadata record.
const MAX_CALL_LEN: usize = MAX_PAGE_LEN + (1 << 20);

/// How long a call may take to arrive that is collected before it is acted on.
const COLLECTING: Duration = Duration::from_secs(30);

/// The most that an answer takes, if it is no stream: a summary of a file of some ten million separate ranges.
pub(crate) const MAX_ANSWER_LEN: usize = 64 << 20;

/// A call with its arguments, and the bytes that were sent along.
pub(crate) struct Call<Q> {
    pub(crate) context: Result<SignedContext, Refusal>,
    pub(crate) tenure: Option<Tenure>,
    pub(crate) arguments: Q,
    pub(crate) bytes: Bytes,
}

/// A call whose body comes as it comes.
pub(crate) struct Flow<Q> {
    pub(crate) context: Result<SignedContext, Refusal>,
    pub(crate) tenure: Option<Tenure>,
    pub(crate) arguments: Q,
    pub(crate) body: ByteStream,
}

/// An answer in JSON, or a refusal.
pub(crate) struct Answer<A>(pub(crate) Result<A, Refusal>);

/// A refusal on the wire.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct WireRefusal {
    problem: String,
    detail: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    to: Option<String>,
}

impl WireRefusal {
    pub(crate) fn of(refusal: Refusal) -> Self {
        let Refusal { problem, detail, hint, retry_after, to } = refusal;
        let retry_after_ms = retry_after.map(|after| u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
        Self { problem: problem.code().to_owned(), detail, hint, retry_after_ms, to }
    }

    /// The refusal; `None` if there is no such problem here, as when a newer version refuses.
    pub(crate) fn refusal(self) -> Option<Refusal> {
        let Self { problem, detail, hint, retry_after_ms, to } = self;
        let retry_after = retry_after_ms.map(Duration::from_millis);
        Problem::from_code(&problem).map(|problem| Refusal { problem, detail, hint, retry_after, to })
    }
}

/// That what came is not what a caller of this version sends.
pub(crate) fn garbled(what: impl std::fmt::Display) -> Refusal {
    Refusal::new(Problem::InvalidParameter, format!("a call that makes no sense: {what}"))
}

/// That an answer is not what a process of this version gives: another may.
pub(crate) fn misunderstood(what: impl std::fmt::Display) -> Refusal {
    Refusal::new(Problem::Unavailable, format!("an answer that makes no sense: {what}"))
}

/// The bytes in front of a body: arguments behind their length.
pub(crate) fn head(arguments: &impl Serialize) -> Result<Bytes, Refusal> {
    let json = json(arguments)?;
    let mut head = BytesMut::with_capacity(4 + json.len());
    head.put_u32(json.len() as u32);
    head.extend_from_slice(&json);
    Ok(head.freeze())
}

/// Arguments as a header.
pub(crate) fn header(arguments: &impl Serialize) -> Result<HeaderValue, Refusal> {
    HeaderValue::from_str(&STANDARD.encode(json(arguments)?)).map_err(garbled)
}

/// A session context as a header.
pub(crate) fn context_header(context: &SignedContext) -> Result<HeaderValue, Refusal> {
    HeaderValue::from_str(&STANDARD.encode(context.as_bytes())).map_err(garbled)
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, Refusal> {
    serde_json::to_vec(value).map_err(|error| Refusal::new(Problem::Internal, error.to_string()))
}

fn decoded(headers: &HeaderMap, name: &str) -> Result<Vec<u8>, Refusal> {
    let value = headers.get(name).ok_or_else(|| garbled(format!("{name} is missing")))?;
    STANDARD.decode(value.as_bytes()).map_err(|error| garbled(format!("{name}: {error}")))
}

fn context(headers: &HeaderMap) -> Result<SignedContext, Refusal> {
    SignedContext::from_bytes(decoded(headers, CONTEXT)?).map_err(garbled)
}

/// The tenure that a call names, if it is one.
pub(crate) fn tenure(headers: &HeaderMap) -> Option<Tenure> {
    headers.get(TENURE)?.to_str().ok()?.parse().ok()
}

/// Has a call, and all that is logged of it, follow from what it is made for.
pub(crate) async fn follow(State(dc): State<Arc<str>>, request: Request, next: Next) -> Response {
    let span = tracing::error_span!(
        "call",
        otel.kind = "server",
        otel.name = %request.uri().path(),
        trace = tracing::field::Empty,
        dc = &*dc,
        tenant = tracing::field::Empty,
        file = tracing::field::Empty,
    );
    let served = telemetry::serve(span, request.headers().get(TRACEPARENT), Whence::Inside);
    served.scope(next.run(request)).await
}

/// What was paid for the body of a call: whoever collects it takes it.
#[derive(Clone, Debug)]
struct Payment(Arc<Mutex<Option<MemoryPermit>>>);

/// Pays for the body of a call that is collected, by its length, before a byte of it is read.
pub(crate) async fn pay(State(memory): State<MemoryBudget>, mut request: Request, next: Next) -> Response {
    if !request.headers().contains_key(ARGUMENTS) {
        let len = request.headers().get(CONTENT_LENGTH).and_then(|len| len.to_str().ok()?.parse().ok());
        let permit = match len {
            Some(len) if len <= MAX_CALL_LEN as u64 => memory.try_take(len),
            Some(_) | None => Err(garbled("a length of the body was expected, and not so much")),
        };
        match permit {
            Ok(permit) => request.extensions_mut().insert(Payment(Arc::new(Mutex::new(Some(permit))))),
            Err(refusal) => return Answer::<()>(Err(refusal)).into_response(),
        };
    }
    next.run(request).await
}

impl<S: Sync, Q: DeserializeOwned> FromRequest<S> for Call<Q> {
    type Rejection = Response;

    async fn from_request(request: Request, _: &S) -> Result<Self, Response> {
        let (parts, body) = request.into_parts();
        let split = async {
            let body = tokio::time::timeout(COLLECTING, to_bytes(body, MAX_CALL_LEN)).await;
            let late = |_| Refusal::new(Problem::Timeout, "the call took too long to arrive");
            let mut bytes = body.map_err(late)?.map_err(garbled)?;
            let payment = parts.extensions.get::<Payment>();
            let permit =
                payment.and_then(|paid| paid.0.lock().unwrap_or_else(PoisonError::into_inner).take());
            if let Some(permit) = permit {
                // Whoever keeps the bytes keeps their memory.
                bytes = permit.pay_for(bytes);
            }
            let len = bytes.try_get_u32().map_err(garbled)? as usize;
            if len > bytes.len() {
                return Err(garbled("arguments are cut off"));
            }
            let arguments = serde_json::from_slice(&bytes.split_to(len)).map_err(garbled)?;
            let (context, tenure) = (context(&parts.headers), tenure(&parts.headers));
            Ok(Self { context, tenure, arguments, bytes })
        };
        split.await.map_err(|refusal| Answer::<()>(Err(refusal)).into_response())
    }
}

impl<S: Sync, Q: DeserializeOwned> FromRequest<S> for Flow<Q> {
    type Rejection = Response;

    async fn from_request(request: Request, _: &S) -> Result<Self, Response> {
        let (parts, body) = request.into_parts();
        let arguments = decoded(&parts.headers, ARGUMENTS)
            .and_then(|json| serde_json::from_slice(&json).map_err(garbled))
            .map_err(|refusal| Answer::<()>(Err(refusal)).into_response())?;
        let cut = |_| Refusal::new(Problem::Truncated, "the body broke off before its end");
        let body = body.into_data_stream().map_err(cut).boxed();
        let (context, tenure) = (context(&parts.headers), tenure(&parts.headers));
        Ok(Self { context, tenure, arguments, body })
    }
}

impl<A: Serialize> IntoResponse for Answer<A> {
    fn into_response(self) -> Response {
        let answer = self.0.and_then(|answer| json(&answer));
        let (status, body) = match answer {
            Ok(body) => (StatusCode::OK, body),
            Err(refusal) => {
                let status = StatusCode::from_u16(refusal.problem.status());
                let body = serde_json::to_vec(&WireRefusal::of(refusal)).unwrap_or_default();
                (status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), body)
            }
        };
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }
}

/// Bytes that are answered as they come. An error breaks the connection off, and is never taken for the end.
pub(crate) fn bytes_answer(answer: Result<ByteStream, Refusal>) -> Response {
    match answer {
        Ok(stream) => Response::new(Body::from_stream(stream)),
        Err(refusal) => Answer::<()>(Err(refusal)).into_response(),
    }
}
