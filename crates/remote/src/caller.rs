//! Calls to processes of one role, wherever they are.

use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http::header::{CONTENT_LENGTH, EXPECT, HeaderValue};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sluice_engine::context::SignedContext;
use sluice_engine::ids::DcId;
use sluice_node::material::ClusterMaterial;
use sluice_node::role::Role;
use sluice_node::shutdown::Shutdown;
use sluice_node::tcp;
use sluice_node::tls::{self, TlsError};
use sluice_proto::calls::ByteStream;
use sluice_proto::gate::Gate;
use sluice_proto::problem::{Problem, Refusal};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::call::{ARGUMENTS, CONTEXT, MAX_ANSWER_LEN, WireRefusal, context_header, head, header};
use crate::outgoing::{Cause, Outgoing};

/// How long connecting and shaking hands may take, for one address.
const CONNECT: Duration = Duration::from_secs(3);

/// How long an idle connection is kept: not long, so that new processes get their share.
const IDLE: Duration = Duration::from_secs(20);

/// Who is called, and by whom.
#[derive(Clone, Debug)]
pub struct CallerConfig {
    /// The datacenter that both are in.
    pub dc: DcId,
    /// The role of this process.
    pub me: Role,
    /// The role that is called.
    pub whom: Role,
    /// `host:port`; each address that the name has is a process of the role.
    pub address: String,
    /// How long an answer may take, from when all of the call was sent.
    pub patience: Duration,
}

/// Calls processes of one role. Cheap to share; its connections end when the last of it is dropped.
#[derive(Clone)]
pub struct Caller {
    client: Client<Connector, Outgoing>,
    whom: Role,
    patience: Duration,
}

impl fmt::Debug for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Caller({})", self.whom)
    }
}

impl Caller {
    /// Calls as `config` says, with the keys of `material`. Nothing is connected yet; what connections need to run is
    /// spawned on `tasks`, which are to be killed once nobody calls any more: an idle connection does not end by itself.
    pub fn new(config: CallerConfig, material: &ClusterMaterial, tasks: &Shutdown) -> Result<Self, TlsError> {
        let connector = Connector {
            address: config.address,
            tls: TlsConnector::from(tls::role_client(material, config.dc, config.me)?),
            name: tls::role_name(material, config.dc, config.whom)?,
            next: Arc::new(AtomicUsize::new(0)),
        };
        let client = Client::builder(tasks.clone())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .build(connector);
        Ok(Self { client, whom: config.whom, patience: config.patience })
    }

    /// A call with arguments and answer in JSON, and `bytes` sent along.
    pub(crate) async fn ask<A: DeserializeOwned>(
        &self,
        path: &'static str,
        context: Option<&SignedContext>,
        arguments: &impl Serialize,
        bytes: Bytes,
        longer: Duration,
    ) -> Result<A, Refusal> {
        let pieces = [head(arguments)?, bytes].into_iter().filter(|piece| !piece.is_empty()).collect();
        let request = self.request(path, context)?.body(Outgoing::Whole(pieces));
        let request = request.map_err(|error| self.unable(error))?;
        let answered = async {
            let response = self.client.request(request).await.map_err(|error| self.unable(error))?;
            self.json(response).await
        };
        self.in_time(self.patience + longer, answered).await
    }

    /// A call whose `len` bytes of body come as they come, once the other side asks for them.
    pub(crate) async fn send<A: DeserializeOwned>(
        &self,
        path: &'static str,
        context: &SignedContext,
        arguments: &impl Serialize,
        len: u64,
        stream: ByteStream,
    ) -> Result<A, Refusal> {
        let (gate, cause) = (Arc::new(Gate::default()), Cause::default());
        let shut = gate.clone();
        let body = Outgoing::Flow { gate: gate.clone(), stream, left: len, last: None, cause: cause.clone() };
        let request = self
            .request(path, Some(context))?
            .header(ARGUMENTS, header(arguments)?)
            .header(EXPECT, HeaderValue::from_static("100-continue"))
            .header(CONTENT_LENGTH, len)
            .body(body);
        let mut request = request.map_err(|error| self.unable(error))?;
        hyper::ext::on_informational(&mut request, move |answer| {
            if answer.status() == StatusCode::CONTINUE {
                gate.open();
            }
        });
        let response = self.client.request(request);
        let mut response = std::pin::pin!(response);
        // Once it is asked for, whoever sends the body, and whoever takes it, watches over its pace.
        let response = tokio::select! {
            response = response.as_mut() => response,
            () = still_shut(&shut, self.patience) => {
                return Err(self.unable(format!("it asked for nothing in {} s", self.patience.as_secs())));
            }
        };
        match response {
            Ok(response) => self.in_time(self.patience, self.json(response)).await,
            Err(error) => Err(cause.take().unwrap_or_else(|| self.unable(error))),
        }
    }

    /// A call that is answered with bytes.
    pub(crate) async fn receive(
        &self,
        path: &'static str,
        context: &SignedContext,
        arguments: &impl Serialize,
    ) -> Result<ByteStream, Refusal> {
        let pieces = [head(arguments)?].into();
        let request = self.request(path, Some(context))?.body(Outgoing::Whole(pieces));
        let request = request.map_err(|error| self.unable(error))?;
        let response = self.client.request(request);
        let response = async { response.await.map_err(|error| self.unable(error)) };
        let response = self.in_time(self.patience, response).await?;
        if response.status() != StatusCode::OK {
            return Err(self.refusal(response).await);
        }
        let whom = self.whom;
        let broken = move |error: hyper::Error| {
            Refusal::new(Problem::Unavailable, format!("the {whom} broke off: {error}"))
        };
        Ok(response.into_body().into_data_stream().map(move |piece| piece.map_err(broken)).boxed())
    }

    fn request(
        &self,
        path: &'static str,
        context: Option<&SignedContext>,
    ) -> Result<http::request::Builder, Refusal> {
        let uri = Uri::builder().scheme("http").authority(self.whom.name()).path_and_query(path).build();
        let request = Request::post(uri.map_err(|error| self.unable(error))?);
        Ok(match context {
            Some(context) => request.header(CONTEXT, context_header(context)?),
            None => request,
        })
    }

    async fn json<A: DeserializeOwned>(&self, response: Response<Incoming>) -> Result<A, Refusal> {
        if response.status() != StatusCode::OK {
            return Err(self.refusal(response).await);
        }
        let body = self.body(response).await?;
        serde_json::from_slice(&body).map_err(|error| self.unable(error))
    }

    async fn refusal(&self, response: Response<Incoming>) -> Refusal {
        let status = response.status();
        let body = self.body(response).await.unwrap_or_default();
        let refusal = serde_json::from_slice::<WireRefusal>(&body).ok().and_then(WireRefusal::refusal);
        refusal.unwrap_or_else(|| self.unable(format!("it answered {status}")))
    }

    async fn body(&self, response: Response<Incoming>) -> Result<Bytes, Refusal> {
        let whole = Limited::new(response.into_body(), MAX_ANSWER_LEN).collect().await;
        whole.map(|whole| whole.to_bytes()).map_err(|error| self.unable(error))
    }

    async fn in_time<T>(
        &self,
        patience: Duration,
        answer: impl Future<Output = Result<T, Refusal>>,
    ) -> Result<T, Refusal> {
        let late = || self.unable(format!("it did not answer in {} s", patience.as_secs()));
        tokio::time::timeout(patience, answer).await.unwrap_or_else(|_| Err(late()))
    }

    fn unable(&self, why: impl fmt::Display) -> Refusal {
        let whom = self.whom;
        tracing::debug!(%whom, error = %why, "a call failed");
        Refusal::new(Problem::Unavailable, format!("the {whom} of this datacenter cannot be asked now"))
    }
}

/// Returns if a body is not asked for within `patience`.
async fn still_shut(gate: &Gate, patience: Duration) {
    tokio::time::sleep(patience).await;
    if gate.is_open() {
        std::future::pending::<()>().await;
    }
}

/// Connects to the processes of a role in turn.
#[derive(Clone)]
struct Connector {
    address: String,
    tls: TlsConnector,
    name: ServerName<'static>,
    next: Arc<AtomicUsize>,
}

impl Connector {
    async fn connect(self) -> std::io::Result<Channel> {
        // Asked anew for each connection: processes come and go.
        let addresses: Vec<SocketAddr> = tokio::net::lookup_host(&self.address).await?.collect();
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address");
        for at in 0..addresses.len() {
            let address = addresses[(first.wrapping_add(at)) % addresses.len()];
            let greeting = async {
                let stream = TcpStream::connect(address).await?;
                tcp::watch_over(&stream)?;
                self.tls.connect(self.name.clone(), stream).await
            };
            match tokio::time::timeout(CONNECT, greeting).await {
                Ok(Ok(stream)) => return Ok(Channel(Box::new(stream))),
                Ok(Err(error)) => last = error,
                Err(_) => last = std::io::ErrorKind::TimedOut.into(),
            }
            tracing::debug!(%address, error = %last, "no connection");
        }
        Err(last)
    }
}

impl tower::Service<Uri> for Connector {
    type Response = TokioIo<Channel>;
    type Error = std::io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.connect().await.map(TokioIo::new) })
    }
}

/// A connection to a process of the role.
struct Channel(Box<TlsStream<TcpStream>>);

impl Connection for Channel {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl AsyncRead for Channel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut *self.0).poll_read(cx, out)
    }
}

impl AsyncWrite for Channel {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut *self.0).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut *self.0).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut *self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut *self.0).poll_shutdown(cx)
    }
}
