//! Which request goes where, what every request passes first, and who is calling.

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::{FromRequestParts, MatchedPath, Request};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use http::request::Parts;
use http::{HeaderMap, HeaderName, Method, Uri, header};
use sluice_engine::context::SignedContext;
use sluice_engine::ids::ClientFileId;
use sluice_node::metrics::HttpLabels;
use sluice_node::telemetry::{self, Whence};
use sluice_proto::calls::Way;
use sluice_proto::problem::{Problem, Refusal};
use sluice_proto::trace::TRACEPARENT;
use tower::Service;
use tracing::field::{Empty, display};

use crate::answer::{self, PASSED, Refused};
use crate::{App, chunks, content, drain, files, tenants};

/// Every pattern, which is also what metrics call it.
const ROUTES: [&str; 9] = [
    drain::ABOUT,
    "/v1/files",
    "/v1/files/{id}",
    "/v1/files/{id}/chunks/{index}",
    "/v1/files/{id}/content",
    "/v1/files/{id}/tree",
    "/v1/admin/revocations",
    "/v1/admin/tenants/{tenant}",
    drain::PATH,
];

/// The routes of the HTTP door.
pub(crate) fn router(app: Arc<App>) -> Router {
    let [about, list, file, chunk, bytes, tree, revocations, tenant, drains] = ROUTES;
    Router::new()
        .route(about, get(files::about))
        .route(list, get(files::list).post(files::create))
        .route(file, get(files::status).patch(files::settle).delete(files::remove))
        .route(chunk, put(chunks::put))
        .route(bytes, get(content::get).head(content::head))
        .route(tree, get(files::tree))
        .route(revocations, post(tenants::revoke))
        .route(tenant, get(tenants::status))
        .route(drains, get(drain::show).put(drain::begin).delete(drain::end))
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(axum::middleware::map_response(note_route))
        .with_state(app)
}

/// The pattern that a request matched.
#[derive(Clone, Copy)]
struct Route(&'static str);

/// Tells the outside which pattern matched.
async fn note_route(matched: Option<MatchedPath>, mut response: Response) -> Response {
    let route = matched.and_then(|path| ROUTES.into_iter().find(|route| *route == path.as_str()));
    response.extensions_mut().insert(Route(route.unwrap_or("none")));
    response
}

async fn no_route(request: Request) -> Refused {
    let path: String = request.uri().path().chars().take(100).collect();
    Refusal::new(Problem::NoRoute, format!("there is nothing at {path}"))
        .hint("HTTP is under /v1/files; gRPC comes over HTTP/2 as application/grpc")
        .into()
}

async fn wrong_method(method: Method) -> Refused {
    let method: String = method.as_str().chars().take(20).collect();
    Refusal::new(Problem::Method, format!("{method} is not for this path; Allow names what is")).into()
}

/// Serves one request, from its head to the head of its answer.
pub(crate) fn answer(
    mut router: Router,
    mut request: Request,
    app: Arc<App>,
) -> impl Future<Output = http::Response<Body>> + Send {
    let began = Instant::now();
    let method = request.method().clone();
    let span = tracing::error_span!(
        "request",
        otel.kind = "server",
        otel.name = method_label(&method),
        otel.status_code = Empty,
        trace = Empty,
        dc = %app.dc,
        tenant = Empty,
        file = Empty,
        http.request.method = method_label(&method),
        http.route = Empty,
        http.response.status_code = Empty,
    );
    let served = telemetry::serve(span, request.headers().get(TRACEPARENT), Whence::Client);
    let (trace, span) = (served.trace(), served.span().clone());
    strip_internal(request.headers_mut());
    note_way(&mut request);
    served.scope(async move {
        let mut response = match app.requests.try_take() {
            // Held until the answer's head is ready; a stream on its way out is paid for by its chunks.
            Ok(_permit) => match drain::send_away(&app, &request) {
                Some(away) => away.into_response(),
                None => match router.call(request).await {
                    Ok(response) => response,
                    Err(never) => match never {},
                },
            },
            Err(refusal) => {
                app.parts.metrics.count_shed("requests");
                Refused::from(refusal).into_response()
            }
        };
        if let Some(refused) = response.extensions().get::<Refused>() {
            log(refused.refusal());
        }
        let route = response.extensions_mut().remove::<Route>().map_or("none", |Route(route)| route);
        let labels = HttpLabels {
            http_route: route,
            http_request_method: method_label(&method),
            http_response_status_code: response.status().as_u16(),
        };
        span.record("http.route", route);
        span.record("http.response.status_code", labels.http_response_status_code);
        telemetry::rename(&span, || format!("{} {route}", labels.http_request_method));
        if response.status().is_server_error() {
            span.record("otel.status_code", "ERROR");
        }
        app.parts.metrics.http_requests.get_or_create(&labels).observe(began.elapsed().as_secs_f64());
        answer::finish(response, &method, &app.dc, trace)
    })
}

/// Bugs are shouted, the rest is whispered: a refusal is the client's business.
pub(crate) fn log(refusal: &Refusal) {
    if refusal.problem == Problem::Internal {
        tracing::error!(?refusal, "a request failed");
    } else {
        tracing::debug!(?refusal, "a request was refused");
    }
}

fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        _ => "_OTHER",
    }
}

/// Takes away what only the inside may set: a client that sends it means no good (fault 44).
pub(crate) fn strip_internal(headers: &mut HeaderMap) {
    let internal: Vec<HeaderName> = headers
        .keys()
        .filter(|name| name.as_str().starts_with("sluice-") || name.as_str().starts_with("x-sluice-"))
        .cloned()
        .collect();
    for name in internal {
        headers.remove(name);
    }
}

/// Who is calling: the signed context of the session that the request's token stands for. It is asked for before a
/// body is touched, because handlers take it before the request.
pub(crate) struct Caller(pub(crate) SignedContext);

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Refused> {
        let token = bearer(&parts.headers)?;
        Ok(Self(app.parts.sessions.context(token).await?))
    }
}

pub(crate) fn bearer(headers: &HeaderMap) -> Result<&str, Refusal> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let hint = "send Authorization: Bearer <token>";
    let Some(value) = values.next() else {
        return Err(Refusal::new(Problem::Unauthenticated, "the request has no token").hint(hint));
    };
    let malformed =
        || Refusal::new(Problem::InvalidToken, "the Authorization header holds no bearer token").hint(hint);
    let (scheme, token) = value.to_str().ok().and_then(|text| text.split_once(' ')).ok_or_else(malformed)?;
    if values.next().is_none() && scheme.eq_ignore_ascii_case("bearer") {
        Ok(token.trim_matches(' '))
    } else {
        Err(malformed())
    }
}

/// Notes by which way a request came: whether it was sent on to here, and whether its client would go elsewhere
/// (`Prefer: redirect`, RFC 7240). What said that it was sent on is taken out of its query.
fn note_way(request: &mut Request) {
    let preferences = request.headers().get_all("prefer").iter().filter_map(|value| value.to_str().ok());
    let follows = preferences.flat_map(|value| value.split(',')).any(|one| one.trim() == "redirect");
    let mut way = if follows { Way::Follows } else { Way::Direct };
    let is_mark = |part: &str| part.split('=').next() == Some(PASSED);
    if let Some(query) = request.uri().query().filter(|query| query.split('&').any(is_mark)) {
        way = Way::Passed;
        let rest: Vec<&str> = query.split('&').filter(|part| !is_mark(part)).collect();
        let path = request.uri().path();
        let target = if rest.is_empty() { path.to_owned() } else { format!("{path}?{}", rest.join("&")) };
        let mut parts = request.uri().clone().into_parts();
        // Less of what was a target is one.
        parts.path_and_query = target.parse().ok();
        if let Ok(uri) = Uri::from_parts(parts) {
            *request.uri_mut() = uri;
        }
    }
    request.extensions_mut().insert(way);
}

/// By which way a request came.
pub(crate) fn way(request: &Request) -> Way {
    request.extensions().get().copied().unwrap_or_default()
}

/// The id of a file in a path.
pub(crate) fn file_id(text: &str) -> Result<ClientFileId, Refusal> {
    let id: ClientFileId = text
        .parse()
        .map_err(|error: sluice_engine::ids::BadId| Refusal::new(Problem::InvalidId, error.to_string()))?;
    tracing::Span::current().record("file", display(id));
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn internal_headers_are_stripped_and_no_others() {
        let mut headers = HeaderMap::new();
        for name in ["sluice-context", "x-sluice-tenant", "chunk-value", "authorization", "x-forwarded-for"] {
            headers.append(name, HeaderValue::from_static("1"));
            headers.append(name, HeaderValue::from_static("2"));
        }
        strip_internal(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["authorization", "chunk-value", "x-forwarded-for"]);
    }

    #[test]
    fn a_request_says_whether_it_may_be_sent_on() {
        let of = |uri: &str, prefer: &'static str| {
            let mut request = Request::put(uri).header("prefer", prefer).body(Body::empty()).unwrap();
            note_way(&mut request);
            (way(&request), request.uri().to_string())
        };
        assert_eq!(of("/v1/files?x=passed", "wait=5"), (Way::Direct, "/v1/files?x=passed".into()));
        assert_eq!(of("https://a/v1", "wait=5, redirect"), (Way::Follows, "https://a/v1".into()));
        assert_eq!(of("/v1/files?passed", "redirect"), (Way::Passed, "/v1/files".into()));
        assert_eq!(of("https://a/v1?x=1&passed&y", "redirect"), (Way::Passed, "https://a/v1?x=1&y".into()));
    }

    #[test]
    fn one_bearer_token_is_read_whatever_the_case_of_the_scheme() {
        let of = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, HeaderValue::from_static(value));
            }
            bearer(&headers).map(str::to_owned).map_err(|refusal| refusal.problem)
        };
        assert_eq!(of(&["bEARER  abc"]), Ok("abc".into()));
        assert_eq!(of(&[]), Err(Problem::Unauthenticated));
        for bad in [&["Basic abc"][..], &["Bearer"], &["Bearer a", "Bearer b"]] {
            assert_eq!(of(bad), Err(Problem::InvalidToken));
        }
    }
}
