//! Refusals on the gRPC wire: the one list of problems, mapped to codes in this one place, exhaustively.

use std::time::Duration;

use http::HeaderMap;
use sluice_proto::ingest;
use sluice_proto::problem::{Problem, Refusal};
use sluice_proto::trace::TraceId;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// Whose the reasons in a `google.rpc.ErrorInfo` are.
const DOMAIN: &str = "sluice";

/// Metadata: the code of the problem, what to do about it, and the milliseconds after which a client library that
/// retries by itself should do so (gRFC A6).
pub(super) const PROBLEM: &str = "sluice-problem";
const HINT: &str = "sluice-hint";
const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// The gRPC code of a problem. What may succeed later has one that clients try again.
pub(super) fn code(problem: Problem) -> Code {
    match problem {
        Problem::InvalidId
        | Problem::InvalidMetadata
        | Problem::InvalidParameter
        | Problem::ChunkLength
        | Problem::ChunkAlignment
        | Problem::Truncated
        | Problem::LengthRequired
        | Problem::ChunkValue => Code::InvalidArgument,
        Problem::ChunkIndex | Problem::TooLarge | Problem::Range => Code::OutOfRange,
        Problem::Unauthenticated | Problem::InvalidToken | Problem::ExpiredToken | Problem::RevokedToken => {
            Code::Unauthenticated
        }
        Problem::Forbidden => Code::PermissionDenied,
        Problem::NotFound | Problem::Dropped => Code::NotFound,
        Problem::NoRoute | Problem::Method | Problem::Encoding => Code::Unimplemented,
        Problem::Timeout => Code::DeadlineExceeded,
        Problem::MetadataConflict | Problem::SizeConflict | Problem::ChunkConflict => Code::AlreadyExists,
        Problem::SizeOpen
        | Problem::Conflict
        | Problem::Incomplete
        | Problem::Precondition
        | Problem::CreditExceeded => Code::FailedPrecondition,
        Problem::Quota | Problem::RateLimited | Problem::VolumeFull | Problem::RevocationsFull => {
            Code::ResourceExhausted
        }
        Problem::Internal => Code::Internal,
        Problem::Elsewhere
        | Problem::Unavailable
        | Problem::NoMetadata
        | Problem::Overloaded
        | Problem::ReadOnly
        | Problem::Stopping => Code::Unavailable,
    }
}

/// The status with which a call is refused.
pub(super) fn of(refusal: &Refusal, dc: &str, trace: TraceId) -> Status {
    let Refusal { problem, detail, hint, retry_after, to: _ } = refusal;
    let title = ("title".to_owned(), problem.title().to_owned());
    let mut more = std::collections::HashMap::from([title, ("dc".to_owned(), dc.to_owned())]);
    let mut metadata = MetadataMap::new();
    metadata.insert(PROBLEM, MetadataValue::from_static(problem.code()));
    if let Some(hint) = hint {
        more.insert("hint".to_owned(), hint.clone());
        if let Ok(hint) = hint.parse() {
            metadata.insert(HINT, hint);
        }
    }
    let mut details = ErrorDetails::new();
    details.set_error_info(problem.code(), DOMAIN, more).set_request_info(trace.to_string(), dc);
    if let Some(after) = retry_after {
        details.set_retry_info(Some(*after));
        metadata.insert(PUSHBACK, millis(*after).into());
    }
    let message = format!("{detail} ({problem})");
    Status::with_error_details_and_metadata(code(*problem), message, details, metadata)
}

/// The same inside a stream that goes on.
pub(super) fn problem_of(refusal: &Refusal, dc: &str, trace: TraceId) -> ingest::Problem {
    let Refusal { problem, detail, hint, retry_after, to: _ } = refusal;
    ingest::Problem {
        code: problem.code().into(),
        title: problem.title().into(),
        detail: detail.clone(),
        hint: hint.clone().unwrap_or_default(),
        retry_after_ms: retry_after.map_or(0, millis),
        dc: dc.into(),
        trace: trace.to_string(),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1)
}

/// What tonic refused by itself, in headers or trailers, as one of ours; `None` if it is, or if all is well.
pub(super) fn unnamed(headers: &HeaderMap) -> Option<Refusal> {
    let status = Status::from_header_map(headers).filter(|_| !headers.contains_key(PROBLEM))?;
    let problem = match status.code() {
        Code::Ok => return None,
        Code::InvalidArgument => Problem::InvalidParameter,
        Code::OutOfRange => Problem::TooLarge,
        Code::Unimplemented => Problem::NoRoute,
        Code::Cancelled => Problem::Truncated,
        Code::DeadlineExceeded => Problem::Timeout,
        Code::Unknown
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated => Problem::Internal,
    };
    Some(Refusal::new(problem, status.message()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_proto::code::name;
    use sluice_proto::trace::TraceContext;

    #[test]
    fn every_problem_is_told_in_full_and_retried_only_if_that_helps() {
        let trace = TraceContext::new([1; 16], [2; 8], true).unwrap().id();
        for problem in Problem::ALL {
            let refusal = Refusal::new(*problem, "what came").hint("do that");
            let status = of(&refusal, "dc-a", trace);
            assert_eq!(status.message(), format!("what came ({problem})"));
            assert_eq!(status.metadata().get(PROBLEM).unwrap(), problem.code());
            assert_eq!(status.metadata().get(HINT).unwrap(), "do that");
            let details = status.get_error_details();
            let info = details.error_info().unwrap();
            assert_eq!((info.reason.as_str(), info.domain.as_str()), (problem.code(), "sluice"));
            assert_eq!((info.metadata["hint"].as_str(), info.metadata["dc"].as_str()), ("do that", "dc-a"));
            assert_eq!(details.request_info().unwrap().request_id, trace.to_string());
            let again = [Code::Unavailable, Code::ResourceExhausted, Code::DeadlineExceeded];
            assert_eq!(details.retry_info().is_some(), problem.is_retryable(), "{problem}");
            assert_eq!(status.metadata().get(PUSHBACK).is_some(), problem.is_retryable(), "{problem}");
            assert!(!problem.is_retryable() || again.contains(&status.code()), "{problem}");
            assert_ne!(status.code(), Code::Ok);
            assert_eq!(problem_of(&refusal, "dc-a", trace).retry_after_ms > 0, problem.is_retryable());
        }
    }

    #[test]
    fn the_documentation_says_the_same() {
        let table = include_str!("../../../../docs/grpc.md");
        for problem in Problem::ALL {
            let row = format!("| `{}`", name(code(*problem)));
            let row = table.lines().find(|line| line.starts_with(&row)).unwrap_or_else(|| panic!("{row}"));
            assert!(row.contains(&format!("`{problem}`")), "{problem} is not in {row}");
        }
    }

    #[test]
    fn what_tonic_refuses_gets_a_name_once() {
        let headers = |status: Status| status.into_http::<()>().into_parts().0.headers;
        let refusal = unnamed(&headers(Status::out_of_range("4 > 3"))).unwrap();
        assert_eq!((refusal.problem, refusal.detail.as_str()), (Problem::TooLarge, "4 > 3"));
        let named = of(&refusal, "dc-a", TraceContext::new([1; 16], [2; 8], true).unwrap().id());
        assert!(unnamed(&headers(named)).is_none());
        assert!(unnamed(&headers(Status::ok(""))).is_none());
        assert!(unnamed(&HeaderMap::new()).is_none());
    }
}
