//! Connections: accepted, secured, served, and cut when they cost too much or say nothing.
//!
//! One task accepts, and each connection has its own, all on the datacenter's [`Shutdown`]. TLS says which protocol
//! is spoken (ALPN), so there is no guessing and no wait for a first byte.

use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::{HttpService, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use rustls::ServerConfig;
use sluice_engine::drain::Phase;
use sluice_node::budget::{Concurrency, ConcurrencyPermit};
use sluice_node::listener;
use sluice_node::secure::{Readers, Secure};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout};
use tonic::service::Routes;

use crate::App;
use crate::body::RequestBody;
use crate::{grpc, routes};

/// The most an HTTP/1.1 connection buffers: what a request with a body pays for. Buffers grow only while a client
/// fills them, and there are none before its first byte.
pub(crate) const READ_BUFFER: usize = 32 << 10;

/// Head of a request, in bytes and in fields, for both protocols. A token is at most 4 KiB of it.
const MAX_HEAD_LEN: u32 = 16 << 10;
const MAX_HEADERS: usize = 100;

/// Requests at once on one HTTP/2 connection.
const STREAMS: u32 = 64;

/// Bytes that may arrive unread: on one HTTP/2 stream, and on all streams of a connection.
const STREAM_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 1 << 20;

/// Streams that a client may reset before they are taken up, and may make us reset, before it is sent away
/// (CVE-2023-44487, CVE-2025-8671).
const MAX_RESETS: usize = 20;
const MAX_LOCAL_RESETS: usize = 64;

/// HTTP/2 pings, to notice peers that are gone.
const PING: Duration = Duration::from_secs(20);
const PONG: Duration = Duration::from_secs(10);

/// How long a connection that was told goodbye has to go.
const GOODBYE: Duration = Duration::from_secs(5);

/// When the datacenter hands its channels over: how long idle connections are left alone, so that those with requests go
/// first; and how soon one is looked at again.
const IDLE_LAST: Duration = Duration::from_secs(3);
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// What stands behind the port.
#[derive(Clone)]
struct Doors {
    http: Router,
    grpc: Routes,
}

/// Accepts until the datacenter drains.
pub(crate) async fn run(listener: TcpListener, tls: Arc<ServerConfig>, app: Arc<App>) {
    let readers = Readers::default();
    let doors = Doors { http: routes::router(app.clone()), grpc: grpc::routes(&app) };
    let connections = Concurrency::new("connections", app.settings.connections);
    let stopped = async {
        app.tasks.draining().await;
        app.parts.health.set_serving(false);
        sleep(app.settings.notice).await;
    };
    let mut stopped = pin!(stopped);
    loop {
        let stream = tokio::select! {
            () = &mut stopped => return,
            stream = listener::accept(&listener, "edge") => stream,
        };
        let Ok(permit) = connections.try_take() else {
            app.parts.metrics.count_shed("connections");
            continue;
        };
        let handshake = (tls.clone(), readers.clone());
        app.tasks.spawn(serve(stream, handshake, Counted::new(&app, permit), doors.clone()));
    }
}

/// One of the connections, counted down however its task ends.
struct Counted {
    app: Arc<App>,
    _permit: ConcurrencyPermit,
}

impl Counted {
    fn new(app: &Arc<App>, permit: ConcurrencyPermit) -> Self {
        app.parts.metrics.connections.inc();
        Self { app: app.clone(), _permit: permit }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.app.parts.metrics.connections.dec();
    }
}

/// A connection after its handshake. Boxed, like everything that is kept of it: a task is as large as the largest thing
/// that it ever holds.
type Encrypted = Box<Secure<TcpStream>>;

/// What it takes to shake hands.
type Handshake = (Arc<ServerConfig>, Readers);

async fn serve(stream: TcpStream, handshake: Handshake, counted: Counted, doors: Doors) {
    let app = &counted.app;
    let Some(stream) = Box::pin(secure(stream, handshake, app)).await else { return };
    let activity = Arc::new(Activity::default());
    if is_h2(&stream) {
        drive(http2(stream, app, doors, &activity).as_mut(), app, &activity).await;
    } else {
        drive(http1(stream, app, doors, &activity).as_mut(), app, &activity).await;
    }
}

/// Shakes hands, and waits for the first byte: until then there are no buffers. `None` if it is too
/// late for either.
async fn secure(stream: TcpStream, (tls, readers): Handshake, app: &App) -> Option<Encrypted> {
    // An answer is one write, and waits for no other.
    let _ = stream.set_nodelay(true);
    let mut stream = match timeout(app.settings.handshake, Secure::accept(stream, tls, readers)).await {
        Ok(Ok(stream)) => {
            app.parts.metrics.count_handshake(if stream.is_resumed() { "resumed" } else { "full" });
            Box::new(stream)
        }
        Ok(Err(error)) => {
            tracing::debug!(%error, "a TLS handshake failed");
            return None;
        }
        Err(_) => {
            app.parts.metrics.count_shed("handshake");
            return None;
        }
    };
    let first = tokio::select! {
        first = timeout(app.settings.head, stream.has_more()) => first,
        () = app.tasks.draining() => return None,
    };
    // Without one, or at its end, there is nobody to answer.
    matches!(first, Ok(Ok(true))).then_some(stream)
}

fn is_h2(stream: &Encrypted) -> bool {
    stream.alpn_protocol() == Some(b"h2")
}

/// An answer on its way. Boxed, because a connection keeps room for one.
type Answering = Pin<Box<dyn Future<Output = Result<Response<AnswerBody>, Infallible>> + Send>>;

/// Takes the requests of a connection to their doors.
fn service(
    app: &Arc<App>,
    doors: Doors,
    activity: &Arc<Activity>,
    is_h2: bool,
) -> impl HttpService<Incoming, ResBody = AnswerBody, Error = Infallible, Future = Answering> + use<> {
    let (app, activity) = (app.clone(), activity.clone());
    service_fn(move |request: Request<Incoming>| -> Answering {
        let begun = activity.begin();
        let (head, incoming) = request.into_parts();
        let body = Body::new(RequestBody::new(incoming, &head, &app, activity.clone()));
        let is_call = is_h2 && grpc::is_call(&head);
        let request = Request::from_parts(head, body);
        if is_call {
            let answer = grpc::answer(doors.grpc.clone(), request, app.clone());
            Box::pin(async move { Ok(answer.await.map(|body| begun.until_end(body))) })
        } else {
            let answer = routes::answer(doors.http.clone(), request, app.clone());
            Box::pin(async move { Ok(answer.await.map(|body| begun.until_end(body))) })
        }
    })
}

fn http2(
    stream: Encrypted,
    app: &Arc<App>,
    doors: Doors,
    activity: &Arc<Activity>,
) -> Pin<Box<impl GracefulConnection<Error = hyper::Error> + use<>>> {
    let mut builder = http2::Builder::new(app.tasks.clone());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(READ_BUFFER)
        .max_header_list_size(MAX_HEAD_LEN)
        .max_pending_accept_reset_streams(MAX_RESETS)
        .max_local_error_reset_streams(MAX_LOCAL_RESETS)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PONG);
    Box::pin(builder.serve_connection(TokioIo::new(stream), service(app, doors, activity, true)))
}

fn http1(
    stream: Encrypted,
    app: &Arc<App>,
    doors: Doors,
    activity: &Arc<Activity>,
) -> Pin<Box<impl GracefulConnection<Error = hyper::Error> + use<>>> {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(app.settings.head)
        .max_headers(MAX_HEADERS)
        .max_header_size(MAX_HEAD_LEN as usize)
        .max_buf_size(READ_BUFFER);
    Box::pin(builder.serve_connection(TokioIo::new(stream), service(app, doors, activity, false)))
}

/// Serves a connection to its end: its own, the datacenter's, or that of our patience.
async fn drive<C>(mut connection: Pin<&mut C>, app: &App, activity: &Activity)
where
    C: GracefulConnection<Error = hyper::Error>,
{
    let mut goodbye = false;
    let mut leaving = app.parts.leaving.clone();
    let mut leaves_since = None;
    loop {
        let left = activity.left(&app.settings);
        let leaves = {
            let leaving = leaving.borrow_and_update();
            leaving.phase == Some(Phase::Channels) && leaving.target.is_some()
        };
        // A connection that was told goodbye is looked at again: its last request may end while its client stays.
        let mut patience = if goodbye { left.min(GOODBYE) } else { left };
        if leaves && !goodbye {
            // Told with the answer to a request, a client knows where to go on; an idle one is told when nobody else is.
            let since = *leaves_since.get_or_insert_with(Instant::now);
            if activity.is_busy() || since.elapsed() >= IDLE_LAST {
                connection.as_mut().graceful_shutdown();
                goodbye = true;
                continue;
            }
            patience = patience.min(LOOK_AGAIN);
        } else {
            leaves_since = None;
        }
        tokio::select! {
            result = connection.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "a connection broke");
                }
                return;
            }
            Ok(()) = leaving.changed(), if !goodbye => {}
            () = app.tasks.draining(), if !goodbye => {
                connection.as_mut().graceful_shutdown();
                goodbye = true;
            }
            () = sleep(patience) => {
                if goodbye && !activity.is_busy() {
                    return;
                }
                if activity.left(&app.settings).is_zero() {
                    if activity.is_busy() {
                        app.parts.metrics.count_shed("stalled");
                        return;
                    }
                    connection.as_mut().graceful_shutdown();
                    goodbye = true;
                }
            }
        }
    }
}

/// What a connection does: how many requests it has, and when something last moved.
#[derive(Debug)]
pub(crate) struct Activity {
    began: Instant,
    requests: AtomicUsize,
    moved_ms: AtomicU64,
}

impl Default for Activity {
    fn default() -> Self {
        Self { began: Instant::now(), requests: AtomicUsize::new(0), moved_ms: AtomicU64::new(0) }
    }
}

impl Activity {
    /// Something moved.
    pub(crate) fn touch(&self) {
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.moved_ms.store(now, Ordering::Relaxed);
    }

    fn begin(self: &Arc<Self>) -> Begun {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.touch();
        Begun(self.clone())
    }

    fn is_busy(&self) -> bool {
        self.requests.load(Ordering::Relaxed) > 0
    }

    /// How long the connection may go on as it does.
    fn left(&self, settings: &crate::EdgeSettings) -> Duration {
        let allowed = if self.is_busy() { settings.stall } else { settings.idle };
        let moved = self.began + Duration::from_millis(self.moved_ms.load(Ordering::Relaxed));
        (moved + allowed).saturating_duration_since(Instant::now())
    }
}

/// A request that is being served, until the last byte of its answer has gone.
struct Begun(Arc<Activity>);

impl Begun {
    fn until_end(self, body: Body) -> AnswerBody {
        AnswerBody { body, begun: self }
    }
}

impl Drop for Begun {
    fn drop(&mut self) {
        self.0.requests.fetch_sub(1, Ordering::Relaxed);
        self.0.touch();
    }
}

/// The body of an answer, whose progress is seen.
struct AnswerBody {
    body: Body,
    begun: Begun,
}

impl http_body::Body for AnswerBody {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Self::Data>, Self::Error>>> {
        self.begun.0.touch();
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
