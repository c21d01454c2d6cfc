//! The port for peers: mutual TLS, HTTP/2, and the peer service of `peer.proto`.
//!
//! A connection is a datacenter's by its certificate, and a command another's only by its signature. Accepting,
//! every connection and every stream are tasks of the datacenter: a kill drops them all.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use sluice_engine::aggregator::NodeEvent;
use sluice_engine::command::{COMMAND_LEN, Command};
use sluice_engine::context::SignedContext;
use sluice_engine::geometry::ChunkIndex;
use sluice_engine::ids::{ClientFileId, DcId, FileId, Incarnation};
use sluice_engine::limits::UNIT_CHUNKS;
use sluice_engine::span::Place;
use sluice_node::budget::Concurrency;
use sluice_node::listener;
use sluice_node::shutdown::Shutdown;
use sluice_node::telemetry::{self, Served, Whence};
use sluice_node::tls;
use sluice_proto::peer::peer_server::{self, PeerServer};
use sluice_proto::peer::{
    ChunkPiece, ChunksRequest, LinkFrame, LocateReply, LocateRequest, RecordReply, RecordRequest,
    StatusReply, StatusRequest, ValuesReply, ValuesRequest,
};
use sluice_proto::problem::{Problem, Refusal};
use sluice_proto::trace::{TRACEPARENT, TraceContext};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tower::ServiceExt;
use tracing::{debug, warn};

use crate::ledgers::Greeted;
use crate::refusal::{of_store, to_status};
use crate::traces::chunks_told;
use crate::{AggregatorError, AggregatorService, bulk, links};

/// Connections at once: each peer has two, and restarts overlap.
const MAX_CONNECTIONS: usize = 4 * sluice_engine::limits::MAX_DCS;

/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long a link may take to begin with a hello.
const GREETING: Duration = Duration::from_secs(5);

/// Bytes in one frame of chunk data.
const PIECE: usize = 256 << 10;

/// Pieces that wait for a slow peer: one chunk.
const PIECES: usize = 4;

/// A port for peers that is open, so that its number is known before anything starts.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    address: SocketAddr,
}

impl Listener {
    /// Opens the port; 0 takes any that is free.
    pub fn bind(listen: SocketAddr) -> Result<Self, AggregatorError> {
        let failed = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::AddrInUse => AggregatorError::Busy { address: listen },
            _ => AggregatorError::Listen { address: listen, reason: error.to_string() },
        };
        let listener = listener::bind(listen).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address })
    }

    /// The address it is open on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// Whose connection a request came over.
#[derive(Clone, Copy)]
struct Caller(DcId);

/// Who speaks for each peer: of several links the last one that was welcome. A process that was cloned, or whose end nobody
/// has noticed yet, is not heard beside it.
#[derive(Debug, Default)]
pub(crate) struct Speakers(Mutex<BTreeMap<DcId, oneshot::Sender<Infallible>>>);

impl Speakers {
    /// Makes room for a link; the earlier one is told by this that it is over.
    fn replace(&self, peer: DcId) -> oneshot::Receiver<Infallible> {
        let (speaker, replaced) = oneshot::channel();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(peer, speaker);
        replaced
    }
}

/// Answers peers until the datacenter stops.
pub(crate) fn serve(service: Arc<AggregatorService>, listener: Listener, config: Arc<ServerConfig>) {
    let tasks = service.parts.tasks.clone();
    tasks.clone().spawn(async move {
        let acceptor = TlsAcceptor::from(config);
        let room = Concurrency::new("connections of peers", MAX_CONNECTIONS);
        loop {
            let stream = tokio::select! {
                () = tasks.draining() => return,
                stream = listener::accept(&listener.listener, "peer") => stream,
            };
            let Ok(permit) = room.try_take() else { continue };
            let (service, acceptor, owner) = (service.clone(), acceptor.clone(), tasks.clone());
            tasks.spawn(async move {
                connection(service, acceptor, stream, owner).await;
                drop(permit);
            });
        }
    });
}

async fn connection(
    service: Arc<AggregatorService>,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    tasks: Shutdown,
) {
    let _ = stream.set_nodelay(true);
    let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            debug!(%error, "a peer's handshake failed");
            return;
        }
        Err(_) => return,
    };
    let caller = match tls::peer_dc(&service.parts.material, stream.get_ref().1.peer_certificates()) {
        Ok(dc) if dc != service.parts.dc => Caller(dc),
        Ok(_) | Err(_) => {
            warn!("a peer's certificate names no other datacenter of this cluster");
            return;
        }
    };
    let service_dc = service.dc_name(service.parts.dc);
    let routes =
        tonic::service::Routes::new(PeerServer::new(Door { service, tasks: tasks.clone() })).prepare();
    let routes =
        routes.map_request(move |mut request: tonic::codegen::http::Request<hyper::body::Incoming>| {
            request.extensions_mut().insert(caller);
            request.map(tonic::body::Body::new)
        });
    let dc: Arc<str> = service_dc.into();
    let routes = tower::service_fn(move |request: tonic::codegen::http::Request<hyper::body::Incoming>| {
        let served = served(&request, &dc, caller);
        served.scope(routes.clone().oneshot(request))
    });
    let connection = hyper::server::conn::http2::Builder::new(tasks.clone())
        .timer(TokioTimer::new())
        .max_concurrent_streams(256)
        .max_pending_accept_reset_streams(64)
        .max_local_error_reset_streams(256)
        .max_header_list_size(16 << 10)
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(8 << 20)
        .keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(10))
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = tasks.draining() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "a peer's connection broke");
    }
}

/// Begins to serve a call of a peer.
fn served<B>(request: &tonic::codegen::http::Request<B>, dc: &str, from: Caller) -> Served {
    let name = request.uri().path().trim_start_matches('/');
    let span = tracing::error_span!(
        "peer call",
        otel.kind = "server",
        otel.name = name,
        trace = tracing::field::Empty,
        dc,
        from = %from.0,
        tenant = tracing::field::Empty,
        file = tracing::field::Empty,
    );
    telemetry::serve(span, request.headers().get(TRACEPARENT), Whence::Inside)
}

/// The peer service.
struct Door {
    service: Arc<AggregatorService>,
    tasks: Shutdown,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl peer_server::Peer for Door {
    type LinkStream = Answers<LinkFrame>;
    type ChunksStream = Answers<ChunkPiece>;

    async fn link(
        &self,
        request: Request<Streaming<LinkFrame>>,
    ) -> Result<Response<Self::LinkStream>, Status> {
        let from = caller(&request)?;
        let mut frames = request.into_inner();
        let first = tokio::time::timeout(GREETING, frames.message()).await;
        let first = first.map_err(|_| malformed("no hello came in time"))??;
        let hello = first.and_then(|frame| frame.hello);
        let hello = hello.ok_or_else(|| malformed("a link begins with a hello"))?;
        if hello.dc != u32::from(from.number()) {
            let detail = "the certificate is another datacenter's";
            return Err(to_status(&Refusal::new(Problem::Forbidden, detail)));
        }
        let heard = NodeEvent::Hello {
            peer: from,
            incarnation: Incarnation::new(hello.incarnation),
            seen_of_me: Incarnation::new(hello.seen),
        };
        let greeted = self.service.ledgers.greet(heard).await;
        let Greeted { greeting, welcome } = greeted.map_err(|refusal| to_status(&refusal))?;
        let answer = links::hello(self.service.parts.dc, greeting);
        // Holds the hello, and perhaps a refusal; stays open for as long as the link does.
        let (sender, receiver) = mpsc::channel(2);
        sender.send(Ok(answer)).await.map_err(|_| Status::cancelled("gone"))?;
        if !welcome {
            warn!(peer = %from, incarnation = hello.incarnation, seen = %greeting.seen, "an older incarnation calls");
            let detail = "a newer incarnation of this datacenter has spoken";
            let refusal = to_status(&Refusal::new(Problem::Precondition, detail));
            sender.send(Err(refusal)).await.map_err(|_| Status::cancelled("gone"))?;
            return Ok(Response::new(Box::pin(ReceiverStream::new(receiver))));
        }
        let mut replaced = self.service.speakers.replace(from);
        let (service, tasks) = (self.service.clone(), self.tasks.clone());
        self.tasks.spawn(async move {
            let _open = sender;
            loop {
                tokio::select! {
                    // Whoever speaks would go on for ever: the end of our silence tells it that we stop, or that somebody
                    // else has called in its name.
                    () = tasks.draining() => return,
                    _ = &mut replaced => return,
                    frame = frames.message() => match frame {
                        Ok(Some(frame)) => take_commands(&service, from, &frame).await,
                        Ok(None) | Err(_) => return,
                    },
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn record(&self, request: Request<RecordRequest>) -> Result<Response<RecordReply>, Status> {
        caller(&request)?;
        let file = file_id(&request.get_ref().file)?;
        let summary =
            self.service.parts.store.summary(file).await.map_err(|error| to_status(&of_store(&error)))?;
        let record =
            summary.and_then(|summary| summary.record).ok_or_else(|| to_status(&Refusal::not_found()))?;
        Ok(Response::new(RecordReply { record: record.to_bytes().into() }))
    }

    async fn values(&self, request: Request<ValuesRequest>) -> Result<Response<ValuesReply>, Status> {
        caller(&request)?;
        let ValuesRequest { file, start, level, under_start, under_level } = request.into_inner();
        let file = file_id(&file)?;
        let (place, under) = (place(start, level)?, place(under_start, under_level)?);
        let (values, beside) =
            bulk::own_values(&self.service, file, place, under).await.map_err(|e| to_status(&e))?;
        Ok(Response::new(ValuesReply { values: bulk::concat(&values), beside: bulk::concat(&beside) }))
    }

    async fn chunks(&self, request: Request<ChunksRequest>) -> Result<Response<Self::ChunksStream>, Status> {
        let from = caller(&request)?;
        let ChunksRequest { file, start, count, relay } = request.into_inner();
        let file = file_id(&file)?;
        if count == 0 || u64::from(count) > UNIT_CHUNKS {
            return Err(malformed("1 to 4,096 chunks are asked for at once"));
        }
        let end =
            start.checked_add(u64::from(count)).ok_or_else(|| malformed("the range of chunks overflows"))?;
        ChunkIndex::new(end - 1).map_err(|error| malformed(error.to_string()))?;
        let (sender, receiver) = mpsc::channel(PIECES);
        let service = self.service.clone();
        tracing::Span::current().record("file", tracing::field::display(file));
        self.tasks.spawn(telemetry::carried(async move {
            for number in start..end {
                let Ok(index) = ChunkIndex::new(number) else { return };
                let bytes = match bulk::chunk(&service, file, index, relay, from).await {
                    Ok(bytes) => bytes,
                    Err(refusal) => {
                        // A peer that has gone does not hear it.
                        let _ = sender.send(Err(to_status(&refusal))).await;
                        return;
                    }
                };
                service.metrics.served_bytes.inc_by(bytes.len() as u64);
                for at in (0..bytes.len()).step_by(PIECE) {
                    let data = bytes.slice(at..bytes.len().min(at + PIECE));
                    if sender.send(Ok(ChunkPiece { data })).await.is_err() {
                        return;
                    }
                }
            }
        }));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        caller(&request)?;
        let StatusRequest { context, id } = request.into_inner();
        let (context, id) = (signed(context)?, client_id(&id)?);
        let status = self.service.own_status(&context, id).await.map_err(|refusal| to_status(&refusal))?;
        let json = status.map(|status| serde_json::to_vec(&status)).transpose();
        let json = json.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(StatusReply { status: json.map(Bytes::from) }))
    }

    async fn locate(&self, request: Request<LocateRequest>) -> Result<Response<LocateReply>, Status> {
        caller(&request)?;
        let LocateRequest { context, id, start, level } = request.into_inner();
        let (context, id, place) = (signed(context)?, client_id(&id)?, place(start, level)?);
        let (values, proof) =
            self.service.own_unit(&context, id, place).await.map_err(|refusal| to_status(&refusal))?;
        Ok(Response::new(LocateReply { values: bulk::concat(&values), proof: bulk::concat(&proof) }))
    }
}

/// Verifies the commands of a frame and gives them to the engine.
async fn take_commands(service: &Arc<AggregatorService>, from: DcId, frame: &LinkFrame) {
    let LinkFrame { commands, traces, .. } = frame;
    let ring = service.parts.material.command_ring();
    if !commands.len().is_multiple_of(COMMAND_LEN) {
        service.metrics.received("none", "length");
        warn!(peer = %from, len = commands.len(), "a frame does not hold whole commands");
        return;
    }
    for (index, bytes) in (0..).zip(commands.chunks_exact(COMMAND_LEN)) {
        match Command::verify(bytes, &ring, service.parts.dc) {
            Ok(verified) => {
                let command = verified.command();
                debug!(from = %command.from, file = %command.file, statement = %command.statement, "heard");
                service.metrics.received(command.statement.kind().name(), "taken");
                if let Some(said) = traces.iter().find(|said| said.command == index) {
                    note_trace(service, command, &said.step);
                }
                service.ledgers.tell(NodeEvent::Received(verified)).await;
            }
            Err(error) => {
                service.metrics.received("none", error.code());
                warn!(peer = %from, code = error.code(), %error, "a command was refused");
            }
        }
    }
}

/// What a command tells of came with this step of a trace, says the peer: a hint, and never more than that.
fn note_trace(service: &AggregatorService, command: &Command, step: &[u8]) {
    let chunks = chunks_told(command).filter(|_| telemetry::is_exporting());
    let (Some(chunks), Some(step)) = (chunks, TraceContext::from_bytes(step)) else { return };
    let dc = service.dc_name(service.parts.dc);
    let from = service.dc_name(command.from);
    let span = tracing::info_span!(
        "have", otel.kind = "consumer", dc, from, file = %command.file, first = chunks.start, chunks = chunks.end - chunks.start,
    );
    telemetry::follow(&span, step);
    span.in_scope(|| service.traces.note(command.file, chunks));
}

fn caller<T>(request: &Request<T>) -> Result<DcId, Status> {
    let caller = request.extensions().get::<Caller>();
    caller.map(|Caller(dc)| *dc).ok_or_else(|| Status::unauthenticated("no certificate"))
}

/// The refusal of a message that does not say what it should.
fn malformed(detail: impl Into<String>) -> Status {
    to_status(&Refusal::new(Problem::InvalidParameter, detail))
}

fn file_id(bytes: &[u8]) -> Result<FileId, Status> {
    let bytes = bytes.try_into().map_err(|_| malformed("a file id has 16 bytes"))?;
    Ok(FileId::from_bytes(bytes))
}

fn client_id(bytes: &[u8]) -> Result<ClientFileId, Status> {
    let uuid = uuid::Uuid::from_slice(bytes).map_err(|_| malformed("a UUID has 16 bytes"))?;
    Ok(ClientFileId::new(uuid))
}

fn signed(bytes: Bytes) -> Result<SignedContext, Status> {
    SignedContext::from_bytes(bytes.to_vec())
        .map_err(|error| to_status(&sluice_node::access::refusal(&error)))
}

fn place(start: u64, level: u32) -> Result<Place, Status> {
    let level = u8::try_from(level).map_err(|_| malformed("no span has this level"))?;
    Place::new(start, level).map_err(|error| malformed(error.to_string()))
}

/// The refusal for a place that is larger than a unit, or not in the file.
pub(crate) fn no_such_place(reason: impl std::fmt::Display) -> Refusal {
    Refusal::new(Problem::InvalidParameter, reason.to_string())
}
