//! Answers: what every one carries, and how a refusal looks on the wire (RFC 9457). The one place where that is said.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method, StatusCode};
use serde::Serialize;
use sluice_proto::http::ProblemDetails;
use sluice_proto::problem::{Problem, Refusal};
use sluice_proto::trace::TraceId;

/// Names the datacenter that answers.
const SLUICE_DC: HeaderName = HeaderName::from_static("sluice-dc");

/// Names the trace of the request.
const TRACE_ID: HeaderName = HeaderName::from_static("trace-id");

/// Query of a request that another datacenter sent on.
pub(crate) const PASSED: &str = "passed";

const PROBLEM_JSON: HeaderValue = HeaderValue::from_static("application/problem+json");

/// A refusal on its way out; it becomes a problem in [`finish`], which knows the rest.
#[derive(Clone, Debug)]
pub(crate) struct Refused {
    // Boxed, because it is the rare half of every result.
    refusal: Box<Refusal>,
    header: Option<(HeaderName, HeaderValue)>,
}

impl Refused {
    /// Adds a header to the answer.
    pub(crate) fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.header = Some((name, value));
        self
    }

    /// Why.
    pub(crate) fn refusal(&self) -> &Refusal {
        &self.refusal
    }
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Self { refusal: Box::new(refusal), header: None }
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = status(self.refusal.problem);
        response.extensions_mut().insert(self);
        response
    }
}

/// What a handler answers.
pub(crate) type Answer = Result<Response, Refused>;

/// A refusal of a request for this path; who is sent elsewhere is told where, and that it is not to be sent on again.
pub(crate) fn sent_on(refusal: Refusal, path: &str) -> Refused {
    let location = refusal.to.as_deref().map(|url| format!("{}{path}?{PASSED}", url.trim_end_matches('/')));
    let refused = Refused::from(refusal);
    match location.and_then(|location| HeaderValue::try_from(location).ok()) {
        Some(location) => refused.with(header::LOCATION, location),
        None => refused,
    }
}

/// A parameter or header that is malformed.
pub(crate) fn invalid(detail: impl Into<String>) -> Refusal {
    Refusal::new(Problem::InvalidParameter, detail)
}

/// An answer in JSON.
pub(crate) fn json(status: StatusCode, body: &impl Serialize) -> Answer {
    let bytes = serde_json::to_vec(body)
        .map_err(|error| Refusal::new(Problem::Internal, format!("the answer is no JSON: {error}")))?;
    let mut response = Response::new(Body::from(bytes));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}

/// Completes an answer: a refusal gets its body, every answer the names of its datacenter and trace.
pub(crate) fn finish(mut response: Response, method: &Method, dc: &str, trace: TraceId) -> Response {
    if let Some(Refused { refusal, header }) = response.extensions_mut().remove::<Refused>() {
        write_problem(&mut response, &refusal, dc, trace);
        if let Some((name, value)) = header {
            response.headers_mut().insert(name, value);
        }
        if method == Method::HEAD {
            *response.body_mut() = Body::empty();
        }
    }
    stamp(response.headers_mut(), dc, trace);
    response
}

/// Names the datacenter and the trace.
pub(crate) fn stamp(headers: &mut HeaderMap, dc: &str, trace: TraceId) {
    for (name, value) in [(SLUICE_DC, dc.to_owned()), (TRACE_ID, trace.to_string())] {
        if let Ok(value) = HeaderValue::try_from(value) {
            headers.insert(name, value);
        }
    }
}

fn write_problem(response: &mut Response, refusal: &Refusal, dc: &str, trace: TraceId) {
    let Refusal { problem, detail, hint, retry_after, to: _ } = refusal;
    let details = ProblemDetails {
        kind: format!("/problems/{}", problem.code()),
        title: problem.title().to_owned(),
        status: problem.status(),
        detail: detail.clone(),
        hint: hint.clone(),
        dc: dc.to_owned(),
        trace: trace.to_string(),
    };
    // Strings and a number always make JSON.
    let body = serde_json::to_vec(&details).unwrap_or_default();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, PROBLEM_JSON);
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
    if let Some(challenge) = challenge(*problem) {
        headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
    }
    if let Some(after) = retry_after {
        let secs = after.as_secs() + u64::from(after.subsec_nanos() > 0);
        headers.insert(header::RETRY_AFTER, HeaderValue::from(secs.max(1)));
    }
    *response.body_mut() = Body::from(body);
}

/// The HTTP status of a problem.
fn status(problem: Problem) -> StatusCode {
    StatusCode::from_u16(problem.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

/// How to authenticate (RFC 6750, section 3), for each problem that asks for it.
fn challenge(problem: Problem) -> Option<&'static str> {
    match problem {
        Problem::Unauthenticated => Some(r#"Bearer realm="sluice""#),
        Problem::InvalidToken | Problem::ExpiredToken | Problem::RevokedToken => {
            Some(r#"Bearer realm="sluice", error="invalid_token""#)
        }
        Problem::Forbidden => Some(r#"Bearer realm="sluice", error="insufficient_scope""#),
        Problem::Elsewhere
        | Problem::InvalidId
        | Problem::InvalidMetadata
        | Problem::InvalidParameter
        | Problem::ChunkIndex
        | Problem::ChunkLength
        | Problem::ChunkAlignment
        | Problem::Truncated
        | Problem::CreditExceeded
        | Problem::Quota
        | Problem::NotFound
        | Problem::NoRoute
        | Problem::Method
        | Problem::Timeout
        | Problem::MetadataConflict
        | Problem::SizeConflict
        | Problem::SizeOpen
        | Problem::ChunkConflict
        | Problem::Conflict
        | Problem::Incomplete
        | Problem::Dropped
        | Problem::LengthRequired
        | Problem::Precondition
        | Problem::TooLarge
        | Problem::Encoding
        | Problem::Range
        | Problem::ChunkValue
        | Problem::RateLimited
        | Problem::RevocationsFull
        | Problem::Internal
        | Problem::Unavailable
        | Problem::NoMetadata
        | Problem::Overloaded
        | Problem::VolumeFull
        | Problem::ReadOnly
        | Problem::Stopping => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_proto::trace::TraceContext;
    use std::time::Duration;

    #[test]
    fn every_problem_has_a_status_and_401_a_challenge() {
        for problem in Problem::ALL {
            let status = status(*problem);
            let sends_on = *problem == Problem::Elsewhere && status == 307;
            assert!(sends_on || status.is_client_error() || status.is_server_error(), "{problem}");
            assert_eq!(
                status == 401 || status == 403 && *problem == Problem::Forbidden,
                challenge(*problem).is_some()
            );
            let refused = Refused::from(Refusal::new(*problem, "detail"));
            let response = finish(
                refused.into_response(),
                &Method::GET,
                "dc-a",
                TraceContext::new([1; 16], [2; 8], true).unwrap().id(),
            );
            assert_eq!(response.headers().contains_key(header::RETRY_AFTER), problem.is_retryable());
            assert_eq!(response.headers()[&SLUICE_DC], "dc-a");
        }
    }

    #[test]
    fn a_time_to_come_back_is_rounded_up() {
        let refusal = Refusal::new(Problem::Overloaded, "x").retry_after(Duration::from_millis(1200));
        let response = finish(
            Refused::from(refusal).into_response(),
            &Method::GET,
            "dc-a",
            TraceContext::new([1; 16], [2; 8], true).unwrap().id(),
        );
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
    }
}
