//! A small stand-in for a cluster: the HTTP door `/v1` over TLS, all state in memory, and faults on demand.
//!
//! Every datacenter sees at once what the others took. `kill` ends a datacenter's connections in the middle of what
//! they do; `forget` makes the cluster lose what it held.

mod door;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use sluice_client::{Client, ClientConfig, RetryPolicy, Timeouts, Token};
use sluice_engine::geometry::{ChunkIndex, Geometry};
use sluice_engine::hash::{ChainingValue, Root};
use sluice_engine::span::{Place, Span};
use sluice_engine::span_tree::SpanTree;
use sluice_proto::http::{CreateFile, FileStatus, Holder, State};
use sluice_proto::problem::{Problem, Refusal};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use uuid::Uuid;

pub(crate) const TOKEN: &str = "token-of-tests";

/// What goes wrong with one request.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// It is refused.
    Refuse(Refusal),
    /// It is refused, and its body not asked for.
    RefuseUnread(Refusal),
    /// It is sent on to there, with this status, and its body not asked for.
    SendOn(u16, String),
    /// It is refused before its body is read, which is then read as far as the real door would.
    RefuseEarly(Refusal),
    /// The connection breaks before anything happens.
    Break,
    /// It is done, and the connection breaks before the answer.
    DropAnswer,
    /// It is never answered.
    Stall,
    /// One byte of the answer's body is another.
    Corrupt,
}

type Faults = Box<dyn FnMut(&Seen) -> Option<Fault> + Send>;

/// A request, as faults see it.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) method: Method,
    pub(crate) path: String,
    /// Whether whoever asks goes where it is sent.
    pub(crate) follows: bool,
    /// How many requests of this datacenter came before.
    pub(crate) nth: u64,
}

impl Seen {
    pub(crate) fn is_chunk(&self) -> bool {
        self.method == Method::PUT
    }
}

pub(crate) struct FakeCluster {
    pub(crate) ca_pem: String,
    pub(crate) dcs: Vec<Arc<FakeDc>>,
    pub(crate) files: Arc<Files>,
}

#[derive(Default)]
pub(crate) struct Files {
    files: Mutex<BTreeMap<Uuid, FakeFile>>,
    changed: Notify,
    /// The URLs of the cluster, as every datacenter tells them.
    pub(crate) urls: Mutex<Vec<String>>,
    /// How many ranges of a list are told; 0: the 1,000 of the real one.
    pub(crate) max_ranges: AtomicUsize,
    /// Whether whole files become `assembled` rather than `complete`.
    pub(crate) assembles: Mutex<bool>,
}

struct FakeFile {
    create: CreateFile,
    size: Option<u64>,
    home: String,
    chunks: BTreeMap<u64, (Bytes, ChainingValue)>,
    held: BTreeMap<String, BTreeSet<u64>>,
    dropped: bool,
}

pub(crate) struct FakeDc {
    pub(crate) name: String,
    pub(crate) addr: SocketAddr,
    acceptor: TlsAcceptor,
    files: Arc<Files>,
    faults: Mutex<Faults>,
    pub(crate) requests: AtomicU64,
    /// Chunk requests that were answered with success.
    pub(crate) chunk_requests: AtomicU64,
    /// Bytes that came, TLS and all.
    pub(crate) received: Arc<AtomicU64>,
    /// Chunk requests that are taken at once; the others are refused.
    limit: Mutex<Option<Arc<Semaphore>>>,
    /// It lacks the metadata of every file until it is told, and takes so many chunks meanwhile.
    bereft: Mutex<Option<u64>>,
    names: Vec<String>,
    /// How often it was killed: a connection of an earlier life answers nothing.
    deaths: AtomicU64,
    server: Mutex<Option<JoinHandle<()>>>,
}

impl FakeCluster {
    /// Datacenters `dc-a`, `dc-b`, …, up and without faults.
    pub(crate) async fn start(count: usize) -> Self {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let ca_key = KeyPair::generate().unwrap();
        let mut ca_params = CertificateParams::new(Vec::new()).unwrap();
        ca_params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = ca_params.self_signed(&ca_key).unwrap();
        let key = KeyPair::generate().unwrap();
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "edge.test.sluice".to_owned()];
        let params = CertificateParams::new(names).unwrap();
        let issuer = Issuer::new(ca_params, &ca_key);
        let certificate = params.signed_by(&key, &issuer).unwrap();
        let tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
            )
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let files = Arc::new(Files::default());
        let names: Vec<String> = (0..count).map(|i| format!("dc-{}", (b'a' + i as u8) as char)).collect();
        let mut dcs = Vec::new();
        for name in &names {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let dc = Arc::new(FakeDc {
                name: name.clone(),
                addr: listener.local_addr().unwrap(),
                acceptor: acceptor.clone(),
                files: files.clone(),
                faults: Mutex::new(Box::new(|_| None)),
                requests: AtomicU64::new(0),
                chunk_requests: AtomicU64::new(0),
                received: Arc::default(),
                limit: Mutex::new(None),
                bereft: Mutex::new(None),
                names: names.clone(),
                deaths: AtomicU64::new(0),
                server: Mutex::new(None),
            });
            dc.serve(listener);
            files.urls.lock().unwrap().push(format!("https://{}", dc.addr));
            dcs.push(dc);
        }
        Self { ca_pem: ca.pem(), dcs, files }
    }

    pub(crate) fn urls(&self) -> Vec<String> {
        self.dcs.iter().map(|dc| format!("https://{}", dc.addr)).collect()
    }

    /// Impatient, so that tests of failures are quick.
    pub(crate) fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new(self.urls(), Token::new(TOKEN), self.ca_pem.clone().into_bytes());
        config.retry = RetryPolicy {
            retry_for: Duration::from_secs(20),
            first_pause: Duration::from_millis(10),
            longest_pause: Duration::from_millis(100),
            tries_per_url: 2,
        };
        config.timeouts = Timeouts {
            connect: Duration::from_secs(2),
            answer: Duration::from_secs(5),
            stall: Duration::from_millis(700),
        };
        config
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.config()).unwrap()
    }

    /// What is stored of a file, in order; panics if it is not whole.
    pub(crate) fn bytes(&self, id: Uuid) -> Vec<u8> {
        let files = self.files.files.lock().unwrap();
        let file = &files[&id];
        assert_eq!(file.chunks.len() as u64, file.geometry().chunks(), "the file is whole");
        file.chunks.values().flat_map(|(bytes, _)| bytes.to_vec()).collect()
    }

    /// How many chunks this datacenter holds of a file.
    pub(crate) fn held(&self, dc: usize, id: Uuid) -> usize {
        let files = self.files.files.lock().unwrap();
        files[&id].held.get(&self.dcs[dc].name).map_or(0, BTreeSet::len)
    }

    /// Waits until the cluster has at least this many chunks, of all files.
    pub(crate) async fn until_taken(&self, chunks: usize) {
        loop {
            let changed = self.files.changed.notified();
            let taken: usize = self.files.files.lock().unwrap().values().map(|file| file.chunks.len()).sum();
            if taken >= chunks {
                return;
            }
            changed.await;
        }
    }

    /// Loses, for good, what this datacenter alone held.
    pub(crate) fn forget(&self, dc: usize) {
        self.forget_chunks(dc, |_| true);
    }

    /// Loses, for good, those of these chunks that this datacenter alone held.
    pub(crate) fn forget_chunks(&self, dc: usize, which: impl Fn(u64) -> bool) {
        let mut files = self.files.files.lock().unwrap();
        for file in files.values_mut() {
            let Some(held) = file.held.get_mut(&self.dcs[dc].name) else { continue };
            let gone: Vec<u64> = held.iter().copied().filter(|chunk| which(*chunk)).collect();
            held.retain(|chunk| !which(*chunk));
            for chunk in gone {
                if !file.held.values().any(|held| held.contains(&chunk)) {
                    file.chunks.remove(&chunk);
                }
            }
        }
        drop(files);
        self.files.changed.notify_waiters();
    }
}

/// How statuses are told.
struct Told {
    assembles: bool,
    max_ranges: usize,
}

impl Files {
    fn told(&self) -> Told {
        let max_ranges = match self.max_ranges.load(Ordering::Relaxed) {
            0 => 1000,
            limit => limit,
        };
        Told { assembles: *self.assembles.lock().unwrap(), max_ranges }
    }
}

impl FakeFile {
    /// The shape; the largest while the size is open.
    fn geometry(&self) -> Geometry {
        self.size.map_or(Geometry::largest(), |size| Geometry::new(size).unwrap())
    }

    fn root(&self) -> Option<Root> {
        let geometry = self.geometry();
        if geometry.chunks() == 1 {
            return self.chunks.get(&0).map(|(bytes, _)| Root::of_bytes(bytes));
        }
        let mut tree = SpanTree::new(geometry);
        for (index, (_, value)) in &self.chunks {
            let place = Place::of_chunk(ChunkIndex::new(*index).unwrap());
            tree.insert(Span::new(place, *value)).unwrap();
        }
        tree.root()
    }

    fn status(&self, id: Uuid, dc: &str, told: &Told) -> FileStatus {
        let (assembles, limit) = (told.assembles, told.max_ranges);
        let geometry = self.geometry();
        let whole = self.chunks.len() as u64 == geometry.chunks();
        let chunks = self.size.map_or(0, |_| geometry.chunks());
        let missing: Vec<u64> = (0..chunks).filter(|i| !self.chunks.contains_key(i)).collect();
        FileStatus {
            id,
            size: self.size,
            chunks,
            name: self.create.name.clone(),
            content_type: self.create.content_type.clone(),
            metadata: self.create.metadata.clone(),
            expires_in: None,
            expected_root: self.create.expected_root.clone(),
            state: match (self.dropped, whole, assembles) {
                (true, ..) => State::Dropped,
                (_, true, true) => State::Assembled,
                (_, true, false) => State::Complete,
                (_, false, _) => State::Receiving,
            },
            conflict: None,
            home: self.home.clone(),
            home_epoch: 0,
            root: if whole { self.root().map(|root| root.to_string()) } else { None },
            dc: dc.to_owned(),
            home_answered: true,
            missing_chunks: missing.len() as u64,
            missing: pairs(missing.iter().copied(), limit),
            damaged: Vec::new(),
            holders: self
                .held
                .iter()
                .map(|(dc, held)| Holder {
                    dc: dc.clone(),
                    chunks: held.len() as u64,
                    ranges: pairs(held.iter().copied(), limit),
                })
                .collect(),
        }
    }
}

fn pairs(chunks: impl Iterator<Item = u64>, limit: usize) -> Vec<[u64; 2]> {
    let mut pairs: Vec<[u64; 2]> = Vec::new();
    for chunk in chunks {
        match pairs.last_mut() {
            Some(last) if last[1] == chunk => last[1] += 1,
            _ => pairs.push([chunk, chunk + 1]),
        }
    }
    pairs.truncate(limit);
    pairs
}

impl FakeDc {
    /// From now on requests fail as `faults` says.
    pub(crate) fn fail(&self, faults: impl FnMut(&Seen) -> Option<Fault> + Send + 'static) {
        *self.faults.lock().unwrap() = Box::new(faults);
    }

    /// Refuses chunk requests, with no wish to be left alone, while it has this many.
    pub(crate) fn limit_chunk_requests(&self, limit: usize) {
        *self.limit.lock().unwrap() = Some(Arc::new(Semaphore::new(limit)));
    }

    /// Lacks the metadata of every file until it is told, and takes so many chunks meanwhile.
    pub(crate) fn bereave(&self, chunks: u64) {
        *self.bereft.lock().unwrap() = Some(chunks);
    }

    /// Whether it was told since.
    pub(crate) fn is_told(&self) -> bool {
        self.bereft.lock().unwrap().is_none()
    }

    /// Ends every connection at once, and takes no more.
    pub(crate) fn kill(&self) {
        self.deaths.fetch_add(1, Ordering::SeqCst);
        if let Some(server) = self.server.lock().unwrap().take() {
            server.abort();
        }
    }

    /// Comes back at the same address.
    pub(crate) async fn restart(self: &Arc<Self>) {
        loop {
            // The port is free as soon as the aborted server's task is dropped.
            match TcpListener::bind(self.addr).await {
                Ok(listener) => return self.serve(listener),
                Err(_) => tokio::task::yield_now().await,
            }
        }
    }

    fn serve(self: &Arc<Self>, listener: TcpListener) {
        let dc = self.clone();
        let deaths = self.deaths.load(Ordering::SeqCst);
        let server = tokio::spawn(async move {
            // Connections end with this set, and it with the task.
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let dc = dc.clone();
                connections.spawn(async move {
                    let stream = Counted::new(stream, dc.received.clone());
                    let Ok(stream) = dc.acceptor.clone().accept(stream).await else { return };
                    let service = service_fn(move |request| {
                        let dc = dc.clone();
                        async move {
                            let answer = dc.clone().answer(request).await;
                            match dc.deaths.load(Ordering::SeqCst) == deaths {
                                true => answer,
                                false => Err("killed by a test"),
                            }
                        }
                    });
                    let http = hyper::server::conn::http1::Builder::new();
                    // A client that goes away is no concern of ours.
                    let _ = http.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        *self.server.lock().unwrap() = Some(server);
    }

    async fn answer(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, &'static str> {
        let nth = self.requests.fetch_add(1, Ordering::Relaxed);
        let follows = request.headers().get("prefer").is_some_and(|value| value == "redirect");
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let seen = Seen { method, path, follows, nth };
        let fault = (self.faults.lock().unwrap())(&seen);
        match fault {
            Some(Fault::Refuse(refusal)) => {
                let _ = request.into_body().collect().await;
                return Ok(self.refuse(refusal));
            }
            Some(Fault::RefuseEarly(refusal)) => {
                let mut body = request.into_body();
                tokio::spawn(async move { while let Some(Ok(_)) = body.frame().await {} });
                return Ok(self.refuse(refusal));
            }
            Some(Fault::RefuseUnread(refusal)) => return Ok(self.refuse(refusal)),
            Some(Fault::SendOn(status, location)) => {
                let answer = Response::builder().status(status).header("location", location);
                return Ok(answer.body(Full::default()).unwrap());
            }
            Some(Fault::Break) => return Err("broken by a test"),
            Some(Fault::Stall) => std::future::pending().await,
            Some(Fault::DropAnswer | Fault::Corrupt) | None => {}
        }
        let limit = self.limit.lock().unwrap().clone().filter(|_| seen.is_chunk());
        let permit = limit.map(|limit| limit.try_acquire_owned());
        if let Some(Err(_)) = permit {
            let _ = request.into_body().collect().await;
            let refusal = Refusal::new(Problem::Overloaded, "too many at once").retry_after(Duration::ZERO);
            return Ok(self.refuse(refusal));
        }
        let mut response = match self.route(request).await {
            Ok(response) => response,
            Err(refusal) => self.refuse(refusal),
        };
        match fault {
            Some(Fault::DropAnswer) => return Err("the answer was dropped by a test"),
            Some(Fault::Corrupt) => {
                let (parts, body) = response.into_parts();
                let Ok(bytes) = body.collect().await.map_err(|error: Infallible| match error {});
                let mut bytes = bytes.to_bytes().to_vec();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                response = Response::from_parts(parts, Full::from(bytes));
            }
            Some(_) | None => {}
        }
        if seen.is_chunk() && response.status().is_success() {
            self.chunk_requests.fetch_add(1, Ordering::Relaxed);
        }
        Ok(response)
    }
}

/// A connection that counts what comes.
struct Counted {
    stream: TcpStream,
    received: Arc<AtomicU64>,
}

impl Counted {
    fn new(stream: TcpStream, received: Arc<AtomicU64>) -> Self {
        Self { stream, received }
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = into.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, into);
        self.received.fetch_add((into.filled().len() - before) as u64, Ordering::Relaxed);
        read
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Bytes that look random and are the same for the same seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_be_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}
