//! The private admin port: is the process alive, started, ready, and what do its metrics say?
//!
//! Plain HTTP/1.1 on loopback by default, owned by the composition. `/livez` depends on nothing, `/startupz` and
//! `/readyz` on [`Health`], never on another datacenter. It runs on a [`Shutdown`] of its own, which is stopped after
//! that of the services, so that `/readyz` can be seen to fail while requests finish.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use crate::listener;
use crate::metrics::{CONTENT_TYPE, Metrics};
use crate::shutdown::Shutdown;

/// Connections at once: a probe and a scraper or two, and room for a person.
const MAX_CONNECTIONS: usize = 32;

/// How long one connection may last, whatever it does.
const CONNECTION_LIFE: Duration = Duration::from_secs(60);

/// How long the head of a request may take to arrive.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// What the probes report. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Health(watch::Sender<Flags>);

#[derive(Clone, Copy, Debug, Default)]
struct Flags {
    started: bool,
    serving: bool,
}

impl Flags {
    fn is_ready(self) -> bool {
        self.started && self.serving
    }
}

impl Health {
    /// Not started, not serving.
    pub fn new() -> Self {
        Self::default()
    }

    /// The volume is open and the slots are loaded.
    pub fn set_started(&self) {
        self.0.send_modify(|flags| flags.started = true);
    }

    /// Requests are taken; or, on the way to a stop, will soon not be.
    pub fn set_serving(&self, serving: bool) {
        self.0.send_modify(|flags| flags.serving = serving);
    }

    /// Whether the process has started.
    pub fn is_started(&self) -> bool {
        self.0.borrow().started
    }

    /// Whether requests should be sent here.
    pub fn is_ready(&self) -> bool {
        self.0.borrow().is_ready()
    }

    /// Returns once [`is_ready`](Self::is_ready) is no longer `ready`.
    pub async fn turns_from(&self, ready: bool) {
        // An error would mean that nobody can set it any more, while we can.
        let _ = self.0.subscribe().wait_for(|flags| flags.is_ready() != ready).await;
    }
}

/// Why the admin port does not open.
#[derive(Debug, thiserror::Error)]
#[error("the admin port cannot listen on {address}: {source}")]
pub struct AdminError {
    /// Where.
    pub address: SocketAddr,
    /// What the system says.
    pub source: io::Error,
}

/// An open admin port.
#[derive(Debug)]
pub struct Admin {
    address: SocketAddr,
}

impl Admin {
    /// Opens the port (0: any free one) and serves it on `tasks` until they drain. Pass a [`Shutdown`] that nothing
    /// else runs on, and stop it last.
    pub async fn open(
        address: SocketAddr,
        health: Health,
        metrics: Arc<Metrics>,
        tasks: &Shutdown,
    ) -> Result<Self, AdminError> {
        let failed = |source| AdminError { address, source };
        let listener = listener::bind(address).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let (inner, end) = (tasks.clone(), tasks.clone());
        tasks.spawn(async move {
            tokio::select! {
                () = end.draining() => {}
                () = accept(listener, health, metrics, inner) => {}
            }
        });
        Ok(Self { address: bound })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn accept(listener: TcpListener, health: Health, metrics: Arc<Metrics>, tasks: Shutdown) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else { return };
        let stream = listener::accept(&listener, "admin").await;
        let (health, metrics, end) = (health.clone(), metrics.clone(), tasks.clone());
        tasks.spawn(async move {
            let service = service_fn(move |request| {
                let (health, metrics) = (health.clone(), metrics.clone());
                async move { Ok::<_, Infallible>(answer(&request, &health, &metrics).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_buf_size(16 << 10)
                .serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                () = end.draining() => {}
                // A probe that hangs up early is no event.
                _ = tokio::time::timeout(CONNECTION_LIFE, connection) => {}
            }
            drop(permit);
        });
    }
}

async fn answer(request: &Request<Incoming>, health: &Health, metrics: &Metrics) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return text(StatusCode::METHOD_NOT_ALLOWED, "GET only\n");
    }
    let probe = |well: bool, yes: &'static str, no: &'static str| {
        if well { text(StatusCode::OK, yes) } else { text(StatusCode::SERVICE_UNAVAILABLE, no) }
    };
    match request.uri().path() {
        "/livez" => text(StatusCode::OK, "alive\n"),
        "/startupz" => probe(health.is_started(), "started\n", "starting\n"),
        "/readyz" => probe(health.is_ready(), "ready\n", "not ready\n"),
        "/metrics" => match metrics.read().await {
            Ok(body) => {
                let mut response = Response::new(Full::new(Bytes::from(body)));
                let kind = header::HeaderValue::from_static(CONTENT_TYPE);
                response.headers_mut().insert(header::CONTENT_TYPE, kind);
                response
            }
            Err(_) => text(StatusCode::INTERNAL_SERVER_ERROR, "the metrics could not be written\n"),
        },
        _ => text(StatusCode::NOT_FOUND, "/livez /startupz /readyz /metrics\n"),
    }
}

fn text(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from_static(body.as_bytes())));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shutdown::Stopped;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    async fn ask(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn probes_follow_the_life_of_the_process() {
        let (health, shutdown) = (Health::new(), Shutdown::new());
        let metrics = Arc::new(Metrics::new("dc-a"));
        let loopback = "127.0.0.1:0".parse().unwrap();
        let admin = Admin::open(loopback, health.clone(), metrics, &shutdown).await.unwrap();
        let status = async |path| ask(admin.address(), path).await[9..12].to_owned();
        assert_eq!(status("/livez").await, "200");
        assert_eq!(status("/startupz").await, "503");
        health.set_serving(true);
        assert_eq!(status("/readyz").await, "503", "not before it has started");
        health.set_started();
        assert_eq!((status("/startupz").await, status("/readyz").await), ("200".into(), "200".into()));
        health.set_serving(false);
        assert_eq!(status("/readyz").await, "503");
        assert!(ask(admin.address(), "/metrics").await.contains("sluice_build_info"));
        assert_eq!(status("/other").await, "404");

        let busy = Admin::open(admin.address(), health, Arc::new(Metrics::new("dc-b")), &shutdown).await;
        assert!(busy.unwrap_err().to_string().contains(&admin.address().to_string()));
        assert_eq!(shutdown.stop(Duration::from_secs(5)).await, Stopped::Clean);
    }
}
