//! Calls to processes of one role, wherever they are.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt};
use http::header::{CONTENT_LENGTH, EXPECT, HeaderValue};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper_util::client::legacy::connect::{Connected, Connection, capture_connection};
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sluice_engine::context::SignedContext;
use sluice_engine::ids::DcId;
use sluice_node::material::ClusterMaterial;
use sluice_node::metrics::{OutgoingCall, OutgoingCalls};
use sluice_node::role::Role;
use sluice_node::secure::{Readers, SecureClient};
use sluice_node::seldom::Seldom;
use sluice_node::shutdown::Shutdown;
use sluice_node::strangers::{describe, is_about_certificates};
use sluice_node::tcp;
use sluice_node::telemetry;
use sluice_node::tls::{self, TlsError};
use sluice_proto::calls::ByteStream;
use sluice_proto::gate::Gate;
use sluice_proto::problem::{Problem, Refusal};
use sluice_proto::trace::TRACEPARENT;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::call::{ARGUMENTS, CONTEXT, MAX_ANSWER_LEN, TENURE, WireRefusal, context_header, head, header};
use crate::outgoing::{Cause, Outgoing};
use crate::tenure::Tenure;

/// How long connecting and shaking hands may take, for one address.
const CONNECT: Duration = Duration::from_secs(3);

/// How long an idle connection is kept: not long, so that new processes get their share.
const IDLE: Duration = Duration::from_secs(20);

/// How long a connection is used however busy it is: so a process that a name has only now gets its share, too.
const RENEW: Duration = Duration::from_secs(60);

/// Who is called, and by whom.
#[derive(Clone, Debug)]
pub struct CallerConfig {
    /// The datacenter of this process.
    pub dc: DcId,
    /// The datacenter of the processes that are called.
    pub of: DcId,
    /// The role of this process.
    pub me: Role,
    /// The role that is called.
    pub whom: Role,
    /// `host:port`, or several with commas between them; each address that such a name has is a process of the role.
    pub address: String,
    /// How long an answer may take, from when all of the call was sent.
    pub patience: Duration,
}

/// What is called, and in whose name.
#[derive(Clone, Copy)]
pub(crate) struct Head<'a> {
    pub(crate) path: &'static str,
    pub(crate) context: Option<&'a SignedContext>,
    pub(crate) tenure: Option<Tenure>,
}

impl<'a> Head<'a> {
    /// A call for a session.
    pub(crate) fn of(path: &'static str, context: &'a SignedContext) -> Self {
        Self { path, context: Some(context), tenure: None }
    }

    /// A call of one process to another.
    pub(crate) fn own(path: &'static str) -> Self {
        Self { path, context: None, tenure: None }
    }

    /// The same, under a tenure.
    pub(crate) fn under(self, tenure: Tenure) -> Self {
        Self { tenure: Some(tenure), ..self }
    }
}

/// Why a call failed, by what it may have done.
#[derive(Clone, Debug)]
pub(crate) enum Failed {
    /// The other side refused, and did nothing.
    Refused(Refusal),
    /// It was never reached.
    Unreached(Refusal),
    /// It may have done it or not.
    Unknown(Refusal),
}

impl Failed {
    /// What is counted of it.
    fn outcome(&self) -> &'static str {
        match self {
            Self::Refused(refusal) => refusal.problem.code(),
            Self::Unreached(_) => "unreached",
            Self::Unknown(_) => "unknown",
        }
    }
}

impl From<Failed> for Refusal {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::Refused(refusal) | Failed::Unreached(refusal) | Failed::Unknown(refusal) => refusal,
        }
    }
}

/// Calls processes of one role. Cheap to share; its connections end when the last of it is dropped.
#[derive(Clone)]
pub struct Caller {
    client: Client<Connector, Outgoing>,
    whom: Role,
    is_near: bool,
    patience: Duration,
    renew: Duration,
    calls: OutgoingCalls,
    /// As it is written: names and ports.
    address: Arc<str>,
    /// That certificates do not count.
    strange: Arc<Seldom<()>>,
}

impl fmt::Debug for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Caller({})", self.whom)
    }
}

impl Caller {
    /// Calls as `config` says, with the keys of `material`. Nothing is connected yet; what connections need to run is
    /// spawned on `tasks`, which are to be killed once nobody calls any more: an idle connection does not end by itself.
    /// How long each call takes is counted among `calls`.
    pub fn new(
        config: CallerConfig,
        material: &ClusterMaterial,
        tasks: &Shutdown,
        calls: &OutgoingCalls,
    ) -> Result<Self, TlsError> {
        let address: Arc<str> = config.address.as_str().into();
        let connector = Connector {
            address: config.address,
            tls: tls::role_client(material, config.dc, config.me)?,
            readers: Readers::default(),
            name: tls::role_name(material, config.of, config.whom)?,
            next: Arc::new(AtomicUsize::new(0)),
        };
        let client = Client::builder(tasks.clone())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .build(connector);
        let is_near = config.of == config.dc;
        let (whom, patience, calls) = (config.whom, config.patience, calls.clone());
        Ok(Self { client, whom, is_near, patience, renew: RENEW, calls, address, strange: Arc::default() })
    }

    /// The same, whose connections are made anew after another time than a minute.
    #[must_use]
    pub fn renewing(self, renew: Duration) -> Self {
        Self { renew, ..self }
    }

    async fn issue(&self, mut request: Request<Outgoing>) -> Result<Response<Incoming>, Error> {
        let connection = capture_connection(&mut request);
        let response = self.client.request(request).await?;
        let is_old = response.extensions().get::<Since>().is_none_or(|since| since.0.elapsed() > self.renew);
        // The next connection is to another process.
        let is_old = is_old || response.status() == StatusCode::MISDIRECTED_REQUEST;
        if let Some(connected) = connection.connection_metadata().as_ref().filter(|_| is_old) {
            connected.poison();
        }
        Ok(response)
    }

    /// A call with arguments and answer in JSON, and `bytes` sent along.
    pub(crate) async fn ask<A: DeserializeOwned>(
        &self,
        call: Head<'_>,
        arguments: &impl Serialize,
        bytes: Bytes,
        longer: Duration,
    ) -> Result<A, Failed> {
        let answer = self.ask_bytes(call, arguments, bytes, longer).await?;
        serde_json::from_slice(&answer).map_err(|error| Failed::Unknown(self.unable(error)))
    }

    /// A call with arguments in JSON, `bytes` sent along, and an answer that is bytes, and comes whole.
    pub(crate) async fn ask_bytes(
        &self,
        call: Head<'_>,
        arguments: &impl Serialize,
        bytes: Bytes,
        longer: Duration,
    ) -> Result<Bytes, Failed> {
        let mut counted = self.begin(&call);
        let answer = self.ask_uncounted(call, arguments, bytes, longer).await;
        counted.ended(answer.as_ref().map_or_else(Failed::outcome, |_| "OK"));
        answer
    }

    async fn ask_uncounted(
        &self,
        call: Head<'_>,
        arguments: &impl Serialize,
        bytes: Bytes,
        longer: Duration,
    ) -> Result<Bytes, Failed> {
        let arguments = head(arguments).map_err(Failed::Refused)?;
        let pieces = [arguments, bytes].into_iter().filter(|piece| !piece.is_empty()).collect();
        let request = self.request(call).map_err(Failed::Refused)?.body(Outgoing::Whole(pieces));
        let request = request.map_err(|error| Failed::Unreached(self.unable(error)))?;
        let answered = async {
            let response = self.issue(request).await.map_err(|error| self.failed(&error))?;
            if response.status() != StatusCode::OK {
                return Err(Failed::Refused(self.refusal(response).await));
            }
            self.body(response).await.map_err(Failed::Unknown)
        };
        self.in_time(self.patience + longer, answered).await
    }

    /// A call whose `len` bytes of body come as they come, once the other side asks for them: then `wanted` is called.
    pub(crate) async fn send<A: DeserializeOwned>(
        &self,
        call: Head<'_>,
        arguments: &impl Serialize,
        len: u64,
        stream: ByteStream,
        wanted: impl Fn() + Send + Sync + 'static,
    ) -> Result<A, Failed> {
        let mut counted = self.begin(&call);
        let answer = self.send_uncounted(call, arguments, len, stream, wanted).await;
        counted.ended(answer.as_ref().map_or_else(Failed::outcome, |_| "OK"));
        answer
    }

    async fn send_uncounted<A: DeserializeOwned>(
        &self,
        call: Head<'_>,
        arguments: &impl Serialize,
        len: u64,
        stream: ByteStream,
        wanted: impl Fn() + Send + Sync + 'static,
    ) -> Result<A, Failed> {
        let (gate, cause) = (Arc::new(Gate::default()), Cause::default());
        let shut = gate.clone();
        let body = Outgoing::Flow { gate: gate.clone(), stream, left: len, last: None, cause: cause.clone() };
        let request = self
            .request(call)
            .map_err(Failed::Refused)?
            .header(ARGUMENTS, header(arguments).map_err(Failed::Refused)?)
            .header(EXPECT, HeaderValue::from_static("100-continue"))
            .header(CONTENT_LENGTH, len)
            .body(body);
        let mut request = request.map_err(|error| Failed::Unreached(self.unable(error)))?;
        hyper::ext::on_informational(&mut request, move |answer| {
            if answer.status() == StatusCode::CONTINUE {
                gate.open();
                wanted();
            }
        });
        let response = self.issue(request);
        let mut response = std::pin::pin!(response);
        // Once it is asked for, whoever sends the body, and whoever takes it, watches over its pace.
        let response = tokio::select! {
            response = response.as_mut() => response,
            () = still_shut(&shut, self.patience) => {
                let late = format!("it asked for nothing in {} s", self.patience.as_secs());
                return Err(Failed::Unknown(self.unable(late)));
            }
        };
        match response {
            Ok(response) => self.in_time(self.patience, self.json(response)).await,
            Err(error) => Err(match cause.take() {
                // It never came to its end, so the other side did nothing with it.
                Some(refusal) => Failed::Refused(refusal),
                None => self.failed(&error),
            }),
        }
    }

    /// A call that is answered with bytes: it lasts until whoever reads them has done so.
    pub(crate) async fn receive(
        &self,
        call: Head<'_>,
        arguments: &impl Serialize,
    ) -> Result<ByteStream, Failed> {
        let mut counted = self.begin(&call);
        let answer = self.receive_uncounted(call, arguments).await;
        counted.ended(answer.as_ref().map_or_else(Failed::outcome, |_| "OK"));
        Ok(answer?.inspect_err(move |refusal| counted.ended(refusal.problem.code())).boxed())
    }

    async fn receive_uncounted(
        &self,
        call: Head<'_>,
        arguments: &impl Serialize,
    ) -> Result<ByteStream, Failed> {
        let pieces = [head(arguments).map_err(Failed::Refused)?].into();
        let request = self.request(call).map_err(Failed::Refused)?.body(Outgoing::Whole(pieces));
        let request = request.map_err(|error| Failed::Unreached(self.unable(error)))?;
        let response = self.issue(request);
        let response = async { response.await.map_err(|error| self.failed(&error)) };
        let response = self.in_time(self.patience, response).await?;
        if response.status() != StatusCode::OK {
            return Err(Failed::Refused(self.refusal(response).await));
        }
        let whom = self.whom;
        let broken = move |error: hyper::Error| {
            Refusal::new(Problem::Unavailable, format!("the {whom} broke off: {error}"))
        };
        Ok(response.into_body().into_data_stream().map(move |piece| piece.map_err(broken)).boxed())
    }

    fn begin(&self, call: &Head<'_>) -> OutgoingCall {
        self.calls.begin("sluice", call.path.trim_start_matches("/v1/"))
    }

    fn request(&self, call: Head<'_>) -> Result<http::request::Builder, Refusal> {
        let Head { path, context, tenure } = call;
        // Nobody resolves it: it says whose connections may carry the call. Under another tenure another process answers.
        let whose = match tenure {
            Some(tenure) => format!("{}-{tenure}", self.whom),
            None => self.whom.name().to_owned(),
        };
        let uri = Uri::builder().scheme("http").authority(whose).path_and_query(path).build();
        let mut request = Request::post(uri.map_err(|error| self.unable(error))?);
        if let Some(step) = telemetry::outgoing() {
            request = request.header(TRACEPARENT, step);
        }
        if let Some(context) = context {
            request = request.header(CONTEXT, context_header(context)?);
        }
        if let Some(tenure) = tenure {
            request = request.header(TENURE, tenure.to_string());
        }
        Ok(request)
    }

    async fn json<A: DeserializeOwned>(&self, response: Response<Incoming>) -> Result<A, Failed> {
        if response.status() != StatusCode::OK {
            return Err(Failed::Refused(self.refusal(response).await));
        }
        let body = self.body(response).await.map_err(Failed::Unknown)?;
        serde_json::from_slice(&body).map_err(|error| Failed::Unknown(self.unable(error)))
    }

    fn failed(&self, error: &Error) -> Failed {
        let why = describe(error);
        if is_about_certificates(&why)
            && let Some(times) = self.strange.met(())
        {
            let (whom, at) = (self.whom, &*self.address);
            tracing::warn!(%whom, at, why, times, "no call, for a certificate: ours, or that of whom is asked");
        }
        let refusal = self.unable(why);
        if error.is_connect() { Failed::Unreached(refusal) } else { Failed::Unknown(refusal) }
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
        answer: impl Future<Output = Result<T, Failed>>,
    ) -> Result<T, Failed> {
        let late = || Failed::Unknown(self.unable(format!("it did not answer in {} s", patience.as_secs())));
        tokio::time::timeout(patience, answer).await.unwrap_or_else(|_| Err(late()))
    }

    fn unable(&self, why: impl fmt::Display) -> Refusal {
        let whom = self.whom;
        tracing::debug!(%whom, error = %why, "a call failed");
        let whose = if self.is_near { "this" } else { "the other" };
        Refusal::new(Problem::Unavailable, format!("the {whom} of {whose} datacenter cannot be asked now"))
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
    tls: Arc<ClientConfig>,
    readers: Readers,
    name: ServerName<'static>,
    next: Arc<AtomicUsize>,
}

impl Connector {
    async fn connect(self) -> std::io::Result<Channel> {
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        tcp::reach(&self.address, first, CONNECT, |stream| async {
            tcp::watch_over(&stream)?;
            let (tls, name) = (self.tls.clone(), self.name.clone());
            let stream = SecureClient::connect(stream, tls, name, self.readers.clone()).await?;
            Ok(Channel(Box::new(stream), Since(Instant::now())))
        })
        .await
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

/// Since when a connection is there.
#[derive(Clone, Copy)]
struct Since(Instant);

/// A connection to a process of the role.
struct Channel(Box<SecureClient<TcpStream>>, Since);

impl Connection for Channel {
    fn connected(&self) -> Connected {
        Connected::new().extra(self.1)
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
