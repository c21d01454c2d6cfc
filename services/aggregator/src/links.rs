//! Links to the other datacenters: one direction each. A task per peer dials, says hello, and carries signed commands
//! until the link breaks; then it dials again, with growing pauses and jitter. Of several processes of a peer one has the
//! share that this is about: they are tried in turn, and the one that welcomed the last link is asked for everything else,
//! over a channel of its own, so that data never delays a command.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use hyper_util::rt::TokioIo;
use sluice_engine::aggregator::{Greeting, NodeEvent};
use sluice_engine::command::{COMMAND_LEN, Command};
use sluice_engine::ids::{DcId, Incarnation};
use sluice_engine::share::Share;
use sluice_node::material::ClusterMaterial;
use sluice_node::metrics::OutgoingCall;
use sluice_node::strangers::{describe, is_about_certificates};
use sluice_node::{tcp, telemetry, tls};
use sluice_proto::code;
use sluice_proto::peer::peer_client::PeerClient;
use sluice_proto::peer::{CommandTrace, Hello, LinkFrame};
use sluice_proto::problem::{Problem, Refusal};
use sluice_proto::trace::{TRACEPARENT, TraceContext};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio::time::error::Elapsed;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};
use tracing::{debug, info, warn};

use crate::door::SHARE;
use crate::ledgers::{Greeted, too_slow};
use crate::metrics::AggregatorMetrics;
use crate::refusal::of_status;
use crate::traces::{Traces, chunks_told};
use crate::{AggregatorError, AggregatorParts, AggregatorService, PeerAddress};

/// Commands that may wait for one link. What does not fit is dropped: the engine says it again.
const QUEUE: usize = 1024;

/// Commands in one frame.
const FRAME: usize = 64;

/// Frames under way inside one link: one being sent, one being filled.
const FRAMES: usize = 2;

/// The shortest and the longest pause between two attempts to reach a peer.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// How long connecting and the hello may take.
const GREETING: Duration = Duration::from_secs(5);

/// The longest pause before the next of a peer's processes is asked, after one that does not have the share.
const ELSEWHERE: Duration = Duration::from_millis(300);

/// How many are asked in such a hurry. After that perhaps nobody has it.
const MISSES: u32 = 16;

/// How long one of a peer's processes may take for its part of that, before the next is asked.
const CONNECT: Duration = Duration::from_secs(2);

/// What calls to peers are counted as.
pub(crate) const GRPC: &str = "grpc";
pub(crate) const LINK: &str = "sluice.peer.v1.Peer/Link";
pub(crate) const RECORD: &str = "sluice.peer.v1.Peer/Record";
pub(crate) const VALUES: &str = "sluice.peer.v1.Peer/Values";
pub(crate) const CHUNKS: &str = "sluice.peer.v1.Peer/Chunks";
pub(crate) const STATUS: &str = "sluice.peer.v1.Peer/Status";
pub(crate) const LOCATE: &str = "sluice.peer.v1.Peer/Locate";

/// A peer, and the way to it.
pub(crate) struct Peer {
    pub(crate) dc: DcId,
    pub(crate) name: String,
    pub(crate) edge_url: Option<String>,
    link: Endpoint,
    connector: Connector,
    /// For everything but commands: the channel, and since when.
    bulk: Mutex<(Channel, Instant)>,
    along: Along,
    outlet: Mutex<Option<mpsc::Sender<Said>>>,
    /// Counts links, so that a late end of one is not taken for that of the next.
    count: AtomicU64,
}

/// The peers of a datacenter.
pub(crate) struct Links {
    peers: BTreeMap<DcId, Arc<Peer>>,
    dc: DcId,
    material: Arc<ClusterMaterial>,
    metrics: Arc<AggregatorMetrics>,
}

impl Links {
    pub(crate) fn new(
        parts: &AggregatorParts,
        addresses: &[PeerAddress],
        metrics: Arc<AggregatorMetrics>,
    ) -> Result<Self, AggregatorError> {
        let config = tls::peer_client(&parts.material, parts.dc)?;
        let mut peers = BTreeMap::new();
        for PeerAddress { dc, address, edge_url } in addresses {
            let connector = Connector {
                address: address.clone(),
                tls: TlsConnector::from(config.clone()),
                name: tls::peer_name(&parts.material, *dc)?,
                next: Arc::default(),
                first: None,
                reached: Arc::default(),
            };
            // The connector speaks TLS itself, so the scheme says that there is nothing more to do.
            let endpoint = Endpoint::from_static("http://peer.sluice")
                .connect_timeout(GREETING)
                .http2_keep_alive_interval(Duration::from_secs(5))
                .keep_alive_timeout(Duration::from_secs(5))
                .keep_alive_while_idle(true)
                .initial_stream_window_size(1 << 20)
                .initial_connection_window_size(8 << 20);
            let bulk = endpoint.connect_with_connector_lazy(connector.clone());
            let name = parts.material.dc_name(*dc).unwrap_or_default().to_owned();
            let peer = Peer {
                dc: *dc,
                name,
                edge_url: edge_url.clone(),
                link: endpoint,
                connector,
                bulk: Mutex::new((bulk, Instant::now())),
                along: Along(parts.share),
                outlet: Mutex::new(None),
                count: AtomicU64::new(0),
            };
            peers.insert(*dc, Arc::new(peer));
        }
        parts.material.command_key(parts.dc)?;
        Ok(Self { peers, dc: parts.dc, material: parts.material.clone(), metrics })
    }

    pub(crate) fn peer(&self, dc: DcId) -> Option<&Arc<Peer>> {
        self.peers.get(&dc)
    }

    pub(crate) fn peers(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.peers.values()
    }

    /// Signs a command and hands it to its link; drops it if there is none, or no room. What it tells of came in `traces`.
    pub(crate) fn send(&self, command: &Command, traces: &Traces) {
        let kind = command.statement.kind();
        let outlet = self.peers.get(&command.to).and_then(|peer| peer.outlet());
        // With the key of the moment.
        let outcome = match outlet.zip(self.material.command_key(self.dc).ok()) {
            Some((outlet, key)) => match outlet.try_send(Said {
                bytes: command.sign(&key),
                trace: chunks_told(command).and_then(|chunks| traces.newest(command.file, &chunks)),
            }) {
                Ok(()) => "sent",
                Err(_) => "no-room",
            },
            None => "no-link",
        };
        debug!(to = %command.to, file = %command.file, statement = %command.statement, outcome, "command");
        self.metrics.sent(kind, outcome);
    }

    /// Closes the link to a peer; its task dials again.
    pub(crate) fn close(&self, dc: DcId) {
        if let Some(peer) = self.peers.get(&dc) {
            *peer.outlet.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }
}

impl Peer {
    fn outlet(&self) -> Option<mpsc::Sender<Said>> {
        self.outlet.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A client for bulk calls.
    pub(crate) fn client(&self) -> PeerClient<InterceptedService<Channel, Along>> {
        let bulk = self.bulk.lock().unwrap_or_else(PoisonError::into_inner).0.clone();
        PeerClient::with_interceptor(bulk, self.along)
    }

    /// The process at this address has the share: it is asked for everything else, too. Calls under way stay where they are.
    fn prefer(&self, first: Option<SocketAddr>) {
        let connector = Connector { first, ..self.connector() };
        let bulk = self.link.connect_with_connector_lazy(connector);
        *self.bulk.lock().unwrap_or_else(PoisonError::into_inner) = (bulk, Instant::now());
    }

    /// Whoever was asked does not have the share: the next call goes to another. Behind one address of many processes that is
    /// whichever is given.
    fn look_on(&self) {
        let mut bulk = self.bulk.lock().unwrap_or_else(PoisonError::into_inner);
        if bulk.1.elapsed() >= ELSEWHERE {
            *bulk = (self.link.connect_with_connector_lazy(self.connector()), Instant::now());
        }
    }

    fn connector(&self) -> Connector {
        Connector { reached: Arc::default(), ..self.connector.clone() }
    }
}

impl AggregatorService {
    /// What a peer answers in the time that a call may take; counts how long it took.
    pub(crate) async fn asked<T>(
        &self,
        peer: &Peer,
        method: &'static str,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Refusal> {
        let mut counted = self.metrics.calls.begin(GRPC, method);
        let answer = tokio::time::timeout(self.parts.settings.call_timeout, answer).await;
        Ok(answered(&mut counted, peer, answer)?.into_inner())
    }
}

/// What came of a call to a peer, or of the next message of one; counted as that.
pub(crate) fn answered<T>(
    counted: &mut OutgoingCall,
    peer: &Peer,
    answer: Result<Result<T, Status>, Elapsed>,
) -> Result<T, Refusal> {
    let code = match &answer {
        Ok(Ok(_)) => Code::Ok,
        Ok(Err(status)) => status.code(),
        Err(_) => Code::DeadlineExceeded,
    };
    counted.ended(code::name(code));
    let answer = answer.map_err(|_| too_slow(&peer.name))?;
    answer.map_err(|status| of_status(&status, &peer.name)).inspect_err(|refusal| {
        if refusal.problem == Problem::Stopping {
            peer.look_on();
        }
    })
}

/// Sends along which share a call is about, and which trace it is part of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Along(Share);

impl Interceptor for Along {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        let step = telemetry::outgoing().and_then(|step| step.to_str().ok()?.parse().ok());
        if let Some(step) = step {
            request.metadata_mut().insert(TRACEPARENT, step);
        }
        if let Some(share) = Some(self.0).filter(|share| *share != Share::WHOLE)
            && let Ok(share) = share.to_string().parse()
        {
            request.metadata_mut().insert(SHARE, share);
        }
        Ok(request)
    }
}

/// A command on its way, and the step of a trace that it tells of.
struct Said {
    bytes: [u8; COMMAND_LEN],
    trace: Option<TraceContext>,
}

/// Opens TLS connections to one peer.
#[derive(Clone)]
struct Connector {
    address: String,
    tls: TlsConnector,
    name: tokio_rustls::rustls::pki_types::ServerName<'static>,
    /// Whom the next connection asks first.
    next: Arc<AtomicUsize>,
    /// Who is asked before all others.
    first: Option<SocketAddr>,
    /// Who was reached last.
    reached: Arc<Mutex<Option<SocketAddr>>>,
}

impl Connector {
    async fn connect(self) -> std::io::Result<TlsStream<TcpStream>> {
        let greet = |stream: TcpStream| {
            let (tls, name) = (self.tls.clone(), self.name.clone());
            async move {
                stream.set_nodelay(true)?;
                let at = stream.peer_addr()?;
                Ok((tls.connect(name, stream).await?, at))
            }
        };
        if let Some(first) = self.first {
            let greeted = async { greet(TcpStream::connect(first).await?).await };
            if let Ok(Ok((stream, _))) = tokio::time::timeout(CONNECT, greeted).await {
                return Ok(stream);
            }
        }
        // One that hangs is not waited for.
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let (stream, at) = tcp::reach(&self.address, turn, CONNECT, greet).await?;
        *self.reached.lock().unwrap_or_else(PoisonError::into_inner) = Some(at);
        Ok(stream)
    }
}

impl tower::Service<tonic::codegen::http::Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = std::io::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: tonic::codegen::http::Uri) -> Self::Future {
        let connector = self.clone();
        Box::pin(async move { connector.connect().await.map(TokioIo::new) })
    }
}

/// Dials every peer, for as long as the datacenter runs.
pub(crate) fn dial_all(service: &Arc<AggregatorService>) {
    for peer in service.links.peers() {
        service.parts.tasks.spawn(dial(service.clone(), peer.clone()));
    }
}

async fn dial(service: Arc<AggregatorService>, peer: Arc<Peer>) {
    let (mut pause, mut misses) = (PAUSES.0, 0);
    loop {
        let (mut greeted, mut longest) = (false, PAUSES.1);
        let began = Instant::now();
        tokio::select! {
            () = service.parts.tasks.draining() => return,
            ended = link(&service, &peer, &mut greeted) => {
                if let Err(NoLink { reason, is_elsewhere }) = ended {
                    debug!(peer = %peer.name, reason, "no link");
                    if is_about_certificates(&reason) && let Some(times) = service.refused.met((peer.dc, "link")) {
                        warn!(peer = %peer.name, reason, times, "no link, for a certificate: ours, or the peer's");
                    }
                    if is_elsewhere && misses < MISSES {
                        misses += 1;
                        longest = ELSEWHERE;
                    }
                }
            }
        }
        if greeted {
            misses = 0;
            info!(peer = %peer.name, "link lost");
            service.ledgers.tell(NodeEvent::LinkDown { peer: peer.dc }).await;
        }
        // One that ends at once is dialled ever more slowly: perhaps two processes call in one name.
        if greeted && began.elapsed() >= PAUSES.1 {
            pause = PAUSES.0;
        }
        // Up to half as much again, so that peers that lost each other do not dial in step.
        let jitter = u64::from(sluice_node::clock::random_bytes::<1>()[0]);
        tokio::select! {
            () = service.parts.tasks.draining() => return,
            () = tokio::time::sleep(pause + pause * (jitter as u32) / 512) => {}
        }
        pause = (pause * 2).min(longest);
    }
}

/// Why there is no link.
struct NoLink {
    reason: String,
    /// Whether another process of the peer may have the share.
    is_elsewhere: bool,
}

impl NoLink {
    fn of(status: &Status) -> Self {
        let refusal = of_status(status, "it");
        Self { reason: status.message().to_owned(), is_elsewhere: refusal.problem == Problem::Stopping }
    }
}

impl<T: Into<String>> From<T> for NoLink {
    fn from(reason: T) -> Self {
        Self { reason: reason.into(), is_elsewhere: false }
    }
}

/// One link, from hello to its end.
async fn link(service: &Arc<AggregatorService>, peer: &Arc<Peer>, greeted: &mut bool) -> Result<(), NoLink> {
    let (me, dc) = (service.parts.dc, peer.dc);
    let greeted_with = service.ledgers.greet(NodeEvent::Dial { peer: dc }).await;
    let Greeted { greeting, .. } = greeted_with.map_err(|error| error.to_string())?;
    let (frames, receiver) = mpsc::channel(FRAMES);
    frames.send(hello(me, greeting)).await.map_err(|_| "closed")?;
    let answered = async {
        let connector = peer.connector();
        let channel =
            peer.link.connect_with_connector(connector.clone()).await.map_err(|error| describe(&error))?;
        let reached = *connector.reached.lock().unwrap_or_else(PoisonError::into_inner);
        let mut client = PeerClient::with_interceptor(channel, peer.along);
        let answer = client.link(ReceiverStream::new(receiver)).await;
        let mut inbound = answer.map_err(|status| NoLink::of(&status))?.into_inner();
        let first = inbound.message().await.map_err(|status| NoLink::of(&status))?;
        peer.prefer(reached);
        Ok::<_, NoLink>((inbound, first.and_then(|frame| frame.hello).ok_or("no hello")?))
    };
    // Of a link only its beginning is a call; it lasts for as long as it can.
    let mut counted = service.metrics.calls.begin(GRPC, LINK);
    let answered = tokio::time::timeout(GREETING, answered).await;
    counted.ended(code::name(match &answered {
        Ok(Ok(_)) => Code::Ok,
        Ok(Err(_)) => Code::Unavailable,
        Err(_) => Code::DeadlineExceeded,
    }));
    drop(counted);
    let (mut inbound, theirs) = answered.map_err(|_| "no answer in time")??;
    if theirs.dc != u32::from(dc.number()) {
        warn!(peer = %peer.name, says = theirs.dc, "a peer says that it is another datacenter");
        return Err("another datacenter answers".into());
    }
    let (outlet, mut queue) = mpsc::channel(QUEUE);
    *peer.outlet.lock().unwrap_or_else(PoisonError::into_inner) = Some(outlet);
    let number = peer.count.fetch_add(1, Ordering::Relaxed);
    *greeted = true;
    if theirs.seen > greeting.incarnation.number() {
        // The engine becomes one above that; whatever it says as it was is not heard.
        warn!(peer = %peer.name, mine = %greeting.incarnation, seen = theirs.seen, "a newer incarnation of this datacenter has spoken");
    } else {
        info!(peer = %peer.name, number, "link up");
    }
    let up = NodeEvent::LinkUp {
        peer: dc,
        incarnation: Incarnation::new(theirs.incarnation),
        seen_of_me: Incarnation::new(theirs.seen),
    };
    service.ledgers.tell(up).await;
    loop {
        tokio::select! {
            // The other side is silent; whatever comes is its end.
            ended = inbound.message() => {
                return ended.map(|_| ()).map_err(|status| NoLink::of(&status));
            }
            command = queue.recv() => {
                let Some(command) = command else { return Ok(()) };
                let mut said = vec![command];
                while said.len() < FRAME && let Ok(command) = queue.try_recv() {
                    said.push(command);
                }
                if frames.send(frame_of(&said)).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
}

/// The first frame of either side of a link.
pub(crate) fn hello(me: DcId, Greeting { incarnation, seen }: Greeting) -> LinkFrame {
    let hello = Hello { dc: u32::from(me.number()), incarnation: incarnation.number(), seen: seen.number() };
    LinkFrame { hello: Some(hello), ..LinkFrame::default() }
}

/// Commands as they go over the link.
fn frame_of(said: &[Said]) -> LinkFrame {
    let mut commands = BytesMut::with_capacity(said.len() * COMMAND_LEN);
    said.iter().for_each(|said| commands.extend_from_slice(&said.bytes));
    let traces = (0..).zip(said).filter_map(|(index, said)| {
        let step = Bytes::copy_from_slice(&said.trace?.to_bytes());
        Some(CommandTrace { command: index, step })
    });
    LinkFrame { hello: None, commands: commands.freeze(), traces: traces.collect() }
}
