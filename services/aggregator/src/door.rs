//! The port for peers: mutual TLS, HTTP/2, and the peer service of `peer.proto`.
//!
//! A connection is a datacenter's by its certificate, and a command another's only by its signature. Every call says which
//! share it is about, in `sluice-share`; nothing there means all slots. A process answers for the shares that it has, and
//! whoever finds another has to look on. Accepting and every connection are tasks of the port, every stream one of its share's
//! aggregator: a kill drops them all.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError, RwLock, Weak};
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
use sluice_engine::share::Share;
use sluice_engine::span::Place;
use sluice_node::budget::Concurrency;
use sluice_node::listener;
use sluice_node::material::ClusterMaterial;
use sluice_node::shutdown::Shutdown;
use sluice_node::strangers::Strangers;
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
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tower::ServiceExt;
use tracing::{debug, warn};

use crate::ledgers::Greeted;
use crate::locate::Units;
use crate::refusal::{of_store, to_status};
use crate::traces::chunks_told;
use crate::{AggregatorError, AggregatorService, bulk, carry, links};

/// Which share a call is about, as in `3/16`.
pub(crate) const SHARE: &str = "sluice-share";

/// Connections at once for each share: each peer has two, and restarts overlap.
const MAX_CONNECTIONS: usize = 4 * sluice_engine::limits::MAX_DCS;

/// Why somebody whom TLS lets in is turned away.
const NO_PEER: &str = "a peer's certificate names no other datacenter of this cluster";

/// Why somebody is turned away before TLS.
const CROWDED: &str = "there are more connections of peers than peers need";

/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// How long a connection may take to ask for something. Whoever dials has something to ask.
const FIRST_CALL: Duration = Duration::from_secs(10);

/// How long a link may take to begin with a hello.
const GREETING: Duration = Duration::from_secs(5);

/// Bytes in one frame of chunk data.
const PIECE: usize = 256 << 10;

/// Pieces that wait for a slow peer: one chunk.
const PIECES: usize = 4;

/// Streams of chunks that one share serves at once.
pub(crate) const MAX_SERVED: usize = 256;

/// How long a peer that takes nothing is waited for by whoever stops.
const GOODBYE: Duration = Duration::from_secs(2);

/// After how many commands others have a turn.
const YIELD_EVERY: u32 = 64;

/// The most commands in a frame, which are verified one after the other: ours have 64.
const MAX_COMMANDS: usize = 1024;

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

/// The port at which a process answers peers, for as long as its tasks run.
#[derive(Clone)]
pub struct PeerPort(Arc<Shared>);

struct Shared {
    dc: DcId,
    material: Arc<ClusterMaterial>,
    /// What all shares of the process spend together.
    units: Arc<Units>,
    pulls: Arc<Semaphore>,
    /// Whoever has a share in this process, while it lives.
    owners: RwLock<BTreeMap<Share, Weak<AggregatorService>>>,
    /// Who is no peer.
    strangers: Strangers,
    tasks: Shutdown,
}

impl fmt::Debug for PeerPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerPort({})", self.0.dc)
    }
}

impl PeerPort {
    /// Answers peers of a datacenter on `listener`, which is served by `tasks`. Nobody has a share yet.
    pub fn open(
        listener: Listener,
        material: &Arc<ClusterMaterial>,
        dc: DcId,
        tasks: &Shutdown,
    ) -> Result<Self, AggregatorError> {
        let config = tls::peer_server(material, dc)?;
        let shared = Shared {
            dc,
            material: material.clone(),
            units: Arc::default(),
            pulls: Arc::new(Semaphore::new(carry::PULLS)),
            owners: RwLock::default(),
            strangers: Strangers::at("peer"),
            tasks: tasks.clone(),
        };
        let this = Self(Arc::new(shared));
        tasks.spawn(this.clone().serve(listener, config));
        Ok(this)
    }

    /// Units that were proven lately.
    pub(crate) fn units(&self) -> Arc<Units> {
        self.0.units.clone()
    }

    /// Pulls under way at once, over all files: more would only be larger.
    pub(crate) fn pulls(&self) -> Arc<Semaphore> {
        self.0.pulls.clone()
    }

    /// From now on an aggregator answers for its share, instead of whoever did.
    pub(crate) fn add(&self, service: &Arc<AggregatorService>) {
        let mut owners = self.0.owners.write().unwrap_or_else(PoisonError::into_inner);
        owners.insert(service.parts.share, Arc::downgrade(service));
    }

    /// Whoever answers for the share that a call is about.
    fn owner<T>(&self, request: &Request<T>) -> Result<Arc<AggregatorService>, Status> {
        let share = match request.metadata().get(SHARE) {
            None => Share::WHOLE,
            Some(text) => {
                let parsed = text.to_str().ok().and_then(|text| text.parse().ok());
                parsed.ok_or_else(|| malformed("no share"))?
            }
        };
        if share.of() != self.0.material.shares() {
            let (mine, theirs) = (self.0.material.shares().count(), share.of().count());
            let detail = format!("slots are divided into {mine} shares here, and into {theirs} by who asks");
            warn!(
                mine,
                theirs,
                "a peer divides slots otherwise: all datacenters of a cluster have to divide them alike"
            );
            return Err(to_status(&Refusal::new(Problem::Precondition, detail)));
        }
        let owners = self.0.owners.read().unwrap_or_else(PoisonError::into_inner);
        let owner = owners.get(&share).and_then(Weak::upgrade);
        let owner = owner.filter(|owner| !owner.parts.tasks.is_draining());
        owner.ok_or_else(|| to_status(&Refusal::new(Problem::Stopping, format!("{share} is not here"))))
    }

    async fn serve(self, listener: Listener, config: Arc<ServerConfig>) {
        let tasks = self.0.tasks.clone();
        let acceptor = TlsAcceptor::from(config);
        let shares = self.0.material.shares().count() as usize;
        let room = Concurrency::new("connections of peers", MAX_CONNECTIONS * shares);
        loop {
            let stream = tokio::select! {
                () = tasks.draining() => return,
                stream = listener::accept(&listener.listener, "peer") => stream,
            };
            let Ok(permit) = room.try_take() else {
                self.0.strangers.turned_away(CROWDED, stream.peer_addr().ok(), &"it is closed at once");
                continue;
            };
            let (port, acceptor) = (self.clone(), acceptor.clone());
            tasks.spawn(async move {
                port.connection(acceptor, stream).await;
                drop(permit);
            });
        }
    }

    async fn connection(self, acceptor: TlsAcceptor, stream: TcpStream) {
        let Shared { dc: me, material, strangers, tasks, .. } = &*self.0;
        let from = stream.peer_addr().ok();
        let _ = stream.set_nodelay(true);
        let stream = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                strangers.failed(from, &error);
                return;
            }
            Err(_) => {
                debug!("a peer's handshake took too long");
                return;
            }
        };
        let caller = match tls::peer_dc(material, stream.get_ref().1.peer_certificates()) {
            Ok(dc) if dc != *me => Caller(dc),
            Ok(_) => return strangers.turned_away(NO_PEER, from, &"it names this one"),
            Err(error) => return strangers.turned_away(NO_PEER, from, &error),
        };
        let shown = stream.get_ref().1.peer_certificates().map(<[_]>::to_vec);
        let dc: Arc<str> = material.dc_name(*me).unwrap_or_default().into();
        let routes = tonic::service::Routes::new(PeerServer::new(self.clone())).prepare();
        let routes =
            routes.map_request(move |mut request: tonic::codegen::http::Request<hyper::body::Incoming>| {
                request.extensions_mut().insert(caller);
                request.map(tonic::body::Body::new)
            });
        let asked = Arc::new(Notify::new());
        let asks = asked.clone();
        let routes =
            tower::service_fn(move |request: tonic::codegen::http::Request<hyper::body::Incoming>| {
                asks.notify_one();
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
                tokio::time::timeout(2 * GOODBYE, connection).await.unwrap_or(Ok(()))
            }
            // A link lasts for as long as it can: it is broken off, and made again with what counts now.
            () = material.distrusts(shown.as_deref()) => {
                debug!(peer = %caller.0, "the certificate of a peer's connection no longer counts");
                return;
            }
            () = never_asks(&asked) => {
                debug!(peer = %caller.0, "a peer's connection asked nothing in time");
                return;
            }
        };
        if let Err(error) = ended {
            debug!(%error, "a peer's connection broke");
        }
    }
}

/// Gives a peer the next of what it asked for. False: it has gone, or takes nothing for so long that it is not waited for.
async fn give(
    service: &AggregatorService,
    sender: &mpsc::Sender<Result<ChunkPiece, Status>>,
    next: Result<ChunkPiece, Status>,
    peer: DcId,
) -> bool {
    let stops = async {
        service.parts.tasks.draining().await;
        tokio::time::sleep(GOODBYE).await;
    };
    tokio::select! {
        sent = sender.send(next) => return sent.is_ok(),
        () = tokio::time::sleep(service.parts.settings.stall) => {}
        () = stops => {}
    }
    debug!(%peer, "a peer asked for chunks and does not take them");
    false
}

/// Waits until it is certain that a connection asked nothing in time.
async fn never_asks(asked: &Notify) {
    if tokio::time::timeout(FIRST_CALL, asked.notified()).await.is_ok() {
        std::future::pending::<()>().await;
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

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl peer_server::Peer for PeerPort {
    type LinkStream = Answers<LinkFrame>;
    type ChunksStream = Answers<ChunkPiece>;

    async fn link(
        &self,
        request: Request<Streaming<LinkFrame>>,
    ) -> Result<Response<Self::LinkStream>, Status> {
        let from = caller(&request)?;
        let service = self.owner(&request)?;
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
        let greeted = service.ledgers.greet(heard).await;
        let Greeted { greeting, welcome } = greeted.map_err(|refusal| to_status(&refusal))?;
        let answer = links::hello(service.parts.dc, greeting);
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
        let mut replaced = service.speakers.replace(from);
        let tasks = service.parts.tasks.clone();
        service.parts.tasks.clone().spawn(async move {
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
        let service = self.owner(&request)?;
        let file = file_id(&request.get_ref().file)?;
        let summary =
            service.parts.store.summary(file).await.map_err(|error| to_status(&of_store(&error)))?;
        let record =
            summary.and_then(|summary| summary.record).ok_or_else(|| to_status(&Refusal::not_found()))?;
        Ok(Response::new(RecordReply { record: record.to_bytes().into() }))
    }

    async fn values(&self, request: Request<ValuesRequest>) -> Result<Response<ValuesReply>, Status> {
        caller(&request)?;
        let service = self.owner(&request)?;
        let ValuesRequest { file, start, level, under_start, under_level } = request.into_inner();
        let file = file_id(&file)?;
        let (place, under) = (place(start, level)?, place(under_start, under_level)?);
        let (values, beside) =
            bulk::own_values(&service, file, place, under).await.map_err(|e| to_status(&e))?;
        Ok(Response::new(ValuesReply { values: bulk::concat(&values), beside: bulk::concat(&beside) }))
    }

    async fn chunks(&self, request: Request<ChunksRequest>) -> Result<Response<Self::ChunksStream>, Status> {
        let from = caller(&request)?;
        let service = self.owner(&request)?;
        let ChunksRequest { file, start, count, relay } = request.into_inner();
        let file = file_id(&file)?;
        if count == 0 || u64::from(count) > UNIT_CHUNKS {
            return Err(malformed("1 to 4,096 chunks are asked for at once"));
        }
        let end =
            start.checked_add(u64::from(count)).ok_or_else(|| malformed("the range of chunks overflows"))?;
        ChunkIndex::new(end - 1).map_err(|error| malformed(error.to_string()))?;
        // Each has a chunk in memory.
        let turn = tokio::time::timeout(GREETING, service.served.clone().acquire_owned()).await;
        let Ok(Ok(turn)) = turn else {
            let detail = format!("{MAX_SERVED} streams of chunks are the limit at once");
            return Err(to_status(&Refusal::new(Problem::Overloaded, detail)));
        };
        let (sender, receiver) = mpsc::channel(PIECES);
        tracing::Span::current().record("file", tracing::field::display(file));
        service.parts.tasks.clone().spawn(telemetry::carried(async move {
            let _turn = turn;
            for number in start..end {
                let Ok(index) = ChunkIndex::new(number) else { return };
                // What is not begun by then the peer asks for again, here or elsewhere.
                if service.parts.tasks.is_draining() {
                    return;
                }
                let bytes = match bulk::chunk(&service, file, index, relay, from).await {
                    Ok(bytes) => bytes,
                    Err(refusal) => {
                        give(&service, &sender, Err(to_status(&refusal)), from).await;
                        return;
                    }
                };
                service.metrics.served_bytes.inc_by(bytes.len() as u64);
                for at in (0..bytes.len()).step_by(PIECE) {
                    let data = bytes.slice(at..bytes.len().min(at + PIECE));
                    if !give(&service, &sender, Ok(ChunkPiece { data }), from).await {
                        return;
                    }
                }
            }
        }));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        caller(&request)?;
        let service = self.owner(&request)?;
        let StatusRequest { context, id } = request.into_inner();
        let (context, id) = (signed(context)?, client_id(&id)?);
        let status = service.own_status(&context, id).await.map_err(|refusal| to_status(&refusal))?;
        let json = status.map(|status| serde_json::to_vec(&status)).transpose();
        let json = json.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(StatusReply { status: json.map(Bytes::from) }))
    }

    async fn locate(&self, request: Request<LocateRequest>) -> Result<Response<LocateReply>, Status> {
        caller(&request)?;
        let service = self.owner(&request)?;
        let LocateRequest { context, id, start, level } = request.into_inner();
        let (context, id, place) = (signed(context)?, client_id(&id)?, place(start, level)?);
        let (values, proof) =
            service.own_unit(&context, id, place).await.map_err(|refusal| to_status(&refusal))?;
        Ok(Response::new(LocateReply { values: bulk::concat(&values), proof: bulk::concat(&proof) }))
    }
}

/// Verifies the commands of a frame and gives them to the engine.
async fn take_commands(service: &Arc<AggregatorService>, from: DcId, frame: &LinkFrame) {
    let LinkFrame { commands, traces, .. } = frame;
    let ring = service.parts.material.command_ring();
    let count = commands.len() / COMMAND_LEN;
    if !commands.len().is_multiple_of(COMMAND_LEN) || count > MAX_COMMANDS || traces.len() > count {
        service.metrics.received("none", "length");
        if let Some(times) = service.refused.met((from, "length")) {
            let (len, traces) = (commands.len(), traces.len());
            warn!(peer = %from, len, traces, times, "a frame does not hold up to {MAX_COMMANDS} whole commands");
        }
        return;
    }
    let steps: HashMap<u32, &Bytes> = traces.iter().map(|said| (said.command, &said.step)).collect();
    for (index, bytes) in (0..).zip(commands.chunks_exact(COMMAND_LEN)) {
        if index % YIELD_EVERY == YIELD_EVERY - 1 {
            // Verifying them takes a while, and others wait for this thread.
            tokio::task::yield_now().await;
        }
        match Command::verify(bytes, &ring, service.parts.dc) {
            Ok(verified) => {
                let command = verified.command();
                debug!(from = %command.from, file = %command.file, statement = %command.statement, "heard");
                service.metrics.received(command.statement.kind().name(), "taken");
                if let Some(step) = steps.get(&index) {
                    note_trace(service, command, step);
                }
                service.ledgers.tell(NodeEvent::Received(verified)).await;
            }
            Err(error) => {
                let code = error.code();
                service.metrics.received("none", code);
                if let Some(times) = service.refused.met((from, code)) {
                    // Whose keys are older: see which revision the peer has.
                    let keys = service.parts.material.revision();
                    warn!(peer = %from, code, keys, times, %error, "a command was refused");
                }
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
