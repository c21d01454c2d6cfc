//! The gRPC door: `sluice.v1.Ingest`, health and reflection, on the port and the connections of the HTTP door.
//!
//! A request is a call if it comes over HTTP/2 as `application/grpc`; everything else is HTTP. [`answer`] is what every
//! call passes: it counts it, finds out who is calling before a byte of the body is read, bounds its messages
//! ([`Messages`]) and its time ([`CallBody`]), and gives a name to every refusal. tonic frames, encodes and decodes in
//! between; connections, streams and resets are bounded where they are accepted.
//!
//! A call ends with its stream. An upload has a task of its own on the datacenter's
//! [`Shutdown`](sluice_node::shutdown::Shutdown), which ends with the call; all else runs in the connection's tasks.

mod call;
mod convert;
mod health;
mod ingest;
mod messages;
mod status;
mod upload;

use std::future::{Future, pending};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use http::request::Parts;
use http::{HeaderMap, Method as HttpMethod, Request, Response, header};
use sluice_node::telemetry::{self, Whence};
use sluice_proto::ingest::DESCRIPTION;
use sluice_proto::ingest::ingest_server::IngestServer;
use sluice_proto::problem::{Problem, Refusal};
use sluice_proto::trace::TRACEPARENT;
use tonic::service::Routes;
use tonic_health::pb::health_server::HealthServer;
use tower::Service;
use tracing::field::Empty;

use crate::App;
use crate::answer::{invalid, stamp};
use crate::routes::{bearer, log, strip_internal};

use self::call::{Call, CallBody, Caller, End, Paid};
use self::messages::Messages;

/// The longest message without chunks or metadata in it, in bytes.
const SMALL: u32 = 4 << 10;

/// The longest message with one whole chunk in it.
const CHUNK: u32 = sluice_engine::limits::CHUNK_LEN as u32 + SMALL;

/// The longest message that creates a file: as much metadata as HTTP takes, and all of a small file.
const CREATE: u32 = sluice_engine::limits::CHUNK_LEN as u32 + (64 << 10);

/// The longest message of an upload.
const PIECE: u32 = upload::MAX_PIECE + SMALL;

/// A method, and what its messages may cost.
#[derive(Debug)]
struct Method {
    /// Service and method, as metrics name them.
    name: &'static str,
    /// Whether it is ours: then it needs a token, and refuses by our names.
    is_ours: bool,
    /// Bytes in one message at most.
    max_message: u32,
    /// Whether messages come as long as the client likes; otherwise exactly one.
    is_streaming: bool,
}

impl Method {
    const fn unary(name: &'static str, max_message: u32) -> Self {
        Self { name, is_ours: true, max_message, is_streaming: false }
    }

    const fn foreign(name: &'static str, is_streaming: bool) -> Self {
        Self { name, is_ours: false, max_message: SMALL, is_streaming }
    }
}

const METHODS: [Method; 14] = [
    Method::unary("sluice.v1.Ingest/About", SMALL),
    Method::unary("sluice.v1.Ingest/Create", CREATE),
    Method::unary("sluice.v1.Ingest/Settle", SMALL),
    Method::unary("sluice.v1.Ingest/Put", CHUNK),
    Method { name: "sluice.v1.Ingest/Upload", is_ours: true, max_message: PIECE, is_streaming: true },
    Method::unary("sluice.v1.Ingest/Status", SMALL),
    Method::unary("sluice.v1.Ingest/List", SMALL),
    Method::unary("sluice.v1.Ingest/Read", SMALL),
    Method::unary("sluice.v1.Ingest/Tree", SMALL),
    Method::unary("sluice.v1.Ingest/Delete", SMALL),
    Method::foreign("grpc.health.v1.Health/Check", false),
    Method::foreign("grpc.health.v1.Health/Watch", false),
    Method::foreign("grpc.reflection.v1.ServerReflection/ServerReflectionInfo", true),
    Method::foreign("grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", true),
];

/// The services of the door. Cheap to clone.
pub(crate) fn routes(app: &Arc<App>) -> Routes {
    // Longer messages were refused before, by name.
    let ingest = IngestServer::new(ingest::Ingest).max_decoding_message_size(CREATE as usize);
    let mut routes = Routes::new(ingest).add_service(HealthServer::new(health::Health::of(app)));
    let description = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTION)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    match (description().build_v1(), description().build_v1alpha()) {
        (Ok(v1), Ok(v1alpha)) => routes = routes.add_service(v1).add_service(v1alpha),
        // The description is compiled in, and a test asks for it.
        (Err(error), _) | (_, Err(error)) => tracing::error!(%error, "gRPC reflection is off"),
    }
    routes.prepare()
}

/// Whether a request that came over HTTP/2 is a call.
pub(crate) fn is_call(head: &Parts) -> bool {
    let kind = head.headers.get(header::CONTENT_TYPE).map(|value| value.as_bytes());
    let kind = kind.and_then(|kind| kind.strip_prefix(b"application/grpc"));
    let is_proto = kind.is_some_and(|rest| {
        let rest = rest.strip_prefix(b"+proto").unwrap_or(rest);
        rest.is_empty() || rest[0] == b';'
    });
    is_proto && head.method == HttpMethod::POST
}

/// Serves one call, from its head to the head of its answer.
pub(crate) fn answer(
    routes: Routes,
    mut request: Request<Body>,
    app: Arc<App>,
) -> impl Future<Output = Response<Body>> + Send {
    let began = Instant::now();
    strip_internal(request.headers_mut());
    let method = METHODS.iter().find(|method| request.uri().path().strip_prefix('/') == Some(method.name));
    let name = method.map_or("_OTHER", |method| method.name);
    let span = tracing::error_span!(
        "call",
        otel.kind = "server",
        otel.name = name,
        trace = Empty,
        dc = %app.dc,
        tenant = Empty,
        file = Empty,
        rpc.system.name = "grpc",
        rpc.method = name,
        rpc.response.status_code = Empty,
    );
    let served = telemetry::serve(span, request.headers().get(TRACEPARENT), Whence::Client);
    let (call, kept) = (Call { app, trace: served.trace() }, served.clone());
    served.scope(async move {
        let (response, end) = match serve(routes, request, method, &call).await {
            Ok(served) => served,
            Err(refusal) => {
                log(&refusal);
                (call.status(&refusal).into_http(), End::default())
            }
        };
        let mut response = CallBody::wrap(response, call.clone(), name, began, end, kept);
        stamp(response.headers_mut(), &call.app.dc, call.trace);
        response
    })
}

async fn serve(
    mut routes: Routes,
    request: Request<Body>,
    method: Option<&'static Method>,
    call: &Call,
) -> Result<(Response<tonic::body::Body>, End), Refusal> {
    let app = &call.app;
    let (mut head, body) = request.into_parts();
    let Some(method) = method else {
        let path: String = head.uri.path().chars().take(100).collect();
        return Err(Refusal::new(Problem::NoRoute, format!("there is no method {path}"))
            .hint("reflection lists what there is"));
    };
    let permit = app.requests.try_take().inspect_err(|_| app.parts.metrics.count_shed("requests"))?;
    let deadline = timeout(&head.headers)?.map(|timeout| tokio::time::Instant::now() + timeout);
    refuse_encoding(&head.headers)?;
    if method.is_ours {
        let context = app.parts.sessions.context(bearer(&head.headers)?).await?;
        head.extensions.insert(Caller { context, call: call.clone() });
    }
    let paid = Paid::default();
    if method.is_streaming {
        // What the connection and tonic buffer of it, whatever becomes of its messages.
        paid.take(app, 2 * u64::from(method.max_message))?;
    }
    let body = Messages::new(body, method, call.clone(), paid.clone());
    let answer = routes.call(Request::from_parts(head, Body::new(body)));
    let until = async {
        match deadline {
            Some(deadline) => tokio::time::sleep_until(deadline).await,
            None => pending().await,
        }
    };
    let response = tokio::select! {
        response = answer => match response {
            Ok(response) => response,
            Err(never) => match never {},
        },
        () = until => return Err(call::out_of_time()),
    };
    let end = End { deadline, is_ours: method.is_ours, permit: Some(permit), paid };
    Ok((response, end))
}

/// How long the client gives the call: up to eight digits and a unit.
fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Refusal> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let malformed = || invalid("grpc-timeout is not up to eight digits and one of H, M, S, m, u, n");
    let text = value.to_str().map_err(|_| malformed())?;
    let (digits, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(malformed)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(malformed());
    }
    let number: u64 = digits.parse().map_err(|_| malformed())?;
    let timeout = match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return Err(malformed()),
    };
    Ok(Some(timeout))
}

/// No compression: chunks do not shrink, and what unfolds cannot be bounded by what came.
fn refuse_encoding(headers: &HeaderMap) -> Result<(), Refusal> {
    match headers.get("grpc-encoding") {
        Some(encoding) if encoding != "identity" => Err(messages::compressed()),
        Some(_) | None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use prost::Message;

    #[test]
    fn calls_are_told_from_requests() {
        let of = |method: &str, kind: &'static str| {
            let request = Request::builder().method(method).header(header::CONTENT_TYPE, kind);
            is_call(&request.body(()).unwrap().into_parts().0)
        };
        for kind in ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8"] {
            assert!(of("POST", kind), "{kind}");
            assert!(!of("GET", kind), "{kind}");
        }
        for kind in ["application/grpc-web", "application/grpc+json", "application/json", ""] {
            assert!(!of("POST", kind), "{kind}");
        }
    }

    #[test]
    fn timeouts_are_read_exactly() {
        let of = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", HeaderValue::from_static(text));
            timeout(&headers).map_err(|refusal| refusal.problem)
        };
        assert_eq!(timeout(&HeaderMap::new()).unwrap(), None);
        assert_eq!(of("1H"), Ok(Some(Duration::from_secs(3600))));
        assert_eq!(of("2M"), Ok(Some(Duration::from_secs(120))));
        assert_eq!(of("99999999S"), Ok(Some(Duration::from_secs(99_999_999))));
        assert_eq!(of("5m"), Ok(Some(Duration::from_millis(5))));
        assert_eq!(of("6u"), Ok(Some(Duration::from_micros(6))));
        assert_eq!(of("07n"), Ok(Some(Duration::from_nanos(7))));
        for bad in ["", "S", "1", "1s", "123456789S", "-1S", "1.5S", "1 S"] {
            assert_eq!(of(bad), Err(Problem::InvalidParameter), "{bad}");
        }
    }

    #[test]
    fn every_method_of_the_description_has_its_bounds() {
        let description = prost_types::FileDescriptorSet::decode(DESCRIPTION).unwrap();
        let ours = description.file.iter().find(|file| file.package() == "sluice.v1").unwrap();
        for service in &ours.service {
            for method in &service.method {
                let name = format!("sluice.v1.{}/{}", service.name(), method.name());
                let bounds = METHODS.iter().find(|method| method.name == name);
                let bounds = bounds.unwrap_or_else(|| panic!("{name} has none"));
                assert!(bounds.is_ours && bounds.is_streaming == method.client_streaming(), "{name}");
            }
        }
        assert!(METHODS.iter().filter(|method| method.is_ours).count() == ours.service[0].method.len());
    }
}
