//! A client that writes what it is told, byte by byte if need be, and the datacenter that it talks to.
#![allow(dead_code, reason = "every test binary uses a part")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use sluice_edge::{DrainLimits, Edge, EdgeConfig, EdgeParts, EdgeSettings};
use sluice_engine::context::{Scope, SignedContext};
use sluice_engine::ids::{DcId, RevocationEpoch, SessionId, TenantId, Timestamp};
use sluice_engine::revocations::Revocation;
use sluice_node::access::{ContextVerifier, Revocations};
use sluice_node::admin::Health;
use sluice_node::budget::MemoryBudget;
use sluice_node::clock::{Clock, SystemClock};
use sluice_node::material::ClusterMaterial;
use sluice_node::metrics::Metrics;
use sluice_node::shutdown::Shutdown;
use sluice_node::tls;
use sluice_node::token::{TokenGrant, TokenMint};
use sluice_proto::calls::Tenants;
use sluice_proto::http::{ProblemDetails, Revoke, RevokedTokens, TenantStatus};
use sluice_proto::problem::Refusal;
use sluice_session::MemorySessions;
use sluice_worker::{Pace, Rates, Worker, WorkerParts, WorkerSettings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::memory::{MemorySlots, MemoryStore};

pub(crate) const HERE: DcId = DcId::new(1);
pub(crate) const TENANT: TenantId = TenantId::new(7);

pub(crate) fn quick() -> EdgeSettings {
    EdgeSettings {
        handshake: Duration::from_millis(500),
        head: Duration::from_millis(700),
        json: Duration::from_millis(700),
        drain: DrainLimits { time: Duration::from_secs(5), ..DrainLimits::default() },
        ..EdgeSettings::default()
    }
}

/// A datacenter in memory behind a real edge.
pub(crate) struct Datacenter {
    pub(crate) address: SocketAddr,
    pub(crate) mint: TokenMint,
    pub(crate) token: String,
    pub(crate) revocations: Revocations,
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) slots: Arc<MemorySlots>,
    pub(crate) tenants: Arc<dyn Tenants>,
    pub(crate) tasks: Shutdown,
    pub(crate) health: Health,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) memory: MemoryBudget,
    tls: ClientConfig,
    name: ServerName<'static>,
}

/// Revokes in memory.
struct Operated {
    access: Arc<ContextVerifier>,
    revocations: Revocations,
}

#[async_trait::async_trait]
impl Tenants for Operated {
    async fn revoke(&self, context: &SignedContext, revoke: Revoke) -> Result<RevokedTokens, Refusal> {
        self.access.require(context, Scope::Operate)?;
        let Revoke { tenant, session, epoch } = revoke;
        let epoch = epoch.unwrap_or(u64::MAX);
        self.revocations.apply(Revocation {
            tenant: TenantId::new(tenant),
            session: session.map(SessionId::new),
            epoch: RevocationEpoch::new(epoch),
        });
        Ok(RevokedTokens { tenant, session, epoch, dc: "dc-a".into() })
    }

    async fn tenant(&self, context: &SignedContext, tenant: TenantId) -> Result<TenantStatus, Refusal> {
        self.access.require(context, Scope::Operate)?;
        let revoked = self.revocations.all();
        Ok(TenantStatus {
            tenant: tenant.number(),
            dc: "dc-a".into(),
            revoked_before: revoked.epoch_of(tenant).number(),
            revoked_sessions: revoked.sessions_of(tenant) as u64,
            stored_bytes: 0,
            files: 0,
        })
    }
}

impl Datacenter {
    pub(crate) fn start() -> Self {
        Self::with(quick(), 64 << 20)
    }

    /// One that waits as long as in production, for tests in which nothing is late but the machine.
    pub(crate) fn patient() -> Self {
        Self::made(EdgeSettings::default(), 64 << 20, Pace::default())
    }

    pub(crate) fn with(settings: EdgeSettings, memory: u64) -> Self {
        let pace =
            Pace { idle: Duration::from_millis(400), grace: Duration::from_millis(800), rate: 1 << 20 };
        Self::made(settings, memory, pace)
    }

    pub(crate) fn made(settings: EdgeSettings, memory: u64, pace: Pace) -> Self {
        let material = ClusterMaterial::generate("test", &[(HERE, "dc-a")]).unwrap();
        let clock = SystemClock::shared();
        let (revocations, tasks, health) = (Revocations::new(), Shutdown::new(), Health::new());
        health.set_started();
        let metrics = Arc::new(Metrics::new("dc-a"));
        let memory = MemoryBudget::measured(memory, &metrics);
        let sessions = MemorySessions::new(HERE, &material, clock.clone(), revocations.clone()).unwrap();
        let access = Arc::new(ContextVerifier::new(&material, HERE, clock.clone(), revocations.clone()));
        let tenants: Arc<dyn Tenants> =
            Arc::new(Operated { access: access.clone(), revocations: revocations.clone() });
        let store = Arc::new(MemoryStore::default());
        let slots = MemorySlots::new(store.clone(), access.clone());
        let parts = WorkerParts {
            dc: "dc-a".into(),
            store: store.clone(),
            slots: slots.clone(),
            access,
            memory: memory.clone(),
            elsewhere: None,
            metrics: metrics.clone(),
            tasks: tasks.clone(),
            rates: Arc::new(Rates::new(clock.clone(), None)),
        };
        let worker = Worker::new(parts, WorkerSettings { pace, ..WorkerSettings::default() });
        let config = EdgeConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            dc: "dc-a".into(),
            tls: tls::edge_server(&material, clock).unwrap(),
            settings,
        };
        let parts = EdgeParts {
            sessions: Arc::new(sessions),
            workers: Arc::new(worker),
            tenants: tenants.clone(),
            memory: memory.clone(),
            metrics: metrics.clone(),
            health: health.clone(),
            leaving: tokio::sync::watch::channel(sluice_proto::calls::Leaving::default()).1,
        };
        let edge = Edge::bind(config, parts).unwrap();
        let address = edge.address();
        edge.serve(&tasks);
        let mint = material.token_mint().unwrap();
        let token = mint.mint(&everything(), SystemClock.now()).unwrap();
        let tls = tls::edge_client(&material.cas(), &[]).unwrap();
        let name = tls::edge_name(&material).unwrap();
        Self {
            address,
            mint,
            token,
            revocations,
            store,
            slots,
            tenants,
            tasks,
            health,
            metrics,
            memory,
            tls,
            name,
        }
    }

    pub(crate) async fn connect(&self, alpn: &str) -> TlsStream<TcpStream> {
        let mut tls = self.tls.clone();
        tls.alpn_protocols = vec![alpn.as_bytes().to_vec()];
        let stream = TcpStream::connect(self.address).await.unwrap();
        TlsConnector::from(Arc::new(tls)).connect(self.name.clone(), stream).await.unwrap()
    }

    /// Writes all of it on a new HTTP/1.1 connection before it reads a byte of the answer.
    pub(crate) async fn raw(&self, head: &str, body: &[u8]) -> Answer {
        let mut stream = self.connect("http/1.1").await;
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body).await.unwrap();
        stream.flush().await.unwrap();
        read_answer(&mut stream).await
    }

    /// A request with a token, and more headers, each with its line end.
    pub(crate) async fn ask_with(&self, request: &str, headers: &str, body: &[u8]) -> Answer {
        let authorization = format!("Authorization: Bearer {}\r\n", self.token);
        self.raw(&head(request, &format!("{authorization}{headers}"), body.len()), body).await
    }

    pub(crate) async fn ask(&self, request: &str, body: &[u8]) -> Answer {
        self.ask_with(request, "", body).await
    }

    pub(crate) async fn create(&self, id: &str, size: u64) -> Answer {
        let body = format!(r#"{{"id":"{id}","size":{size},"name":"a.bin"}}"#);
        self.ask("POST /v1/files", body.as_bytes()).await
    }
}

pub(crate) fn everything() -> TokenGrant {
    TokenGrant::everything(TENANT, "acme", Duration::from_secs(3600))
}

pub(crate) fn now() -> Timestamp {
    SystemClock.now()
}

/// The head of a request; a body of no bytes is not declared for requests that have none.
pub(crate) fn head(request: &str, headers: &str, len: usize) -> String {
    let has_body = ["PUT", "POST", "PATCH"].iter().any(|method| request.starts_with(method));
    let length = if has_body { format!("Content-Length: {len}\r\n") } else { String::new() };
    format!("{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{length}{headers}\r\n")
}

/// An answer, taken apart.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head
            .lines()
            .skip(1)
            .filter_map(|line| line.split_once(": "))
            .find_map(|(key, value)| key.eq_ignore_ascii_case(name).then_some(value))
    }

    pub(crate) fn json<T: serde::de::DeserializeOwned>(&self) -> T {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| {
            panic!("{error} in {}\n{}", self.head, String::from_utf8_lossy(&self.body))
        })
    }

    /// The status and the code of a problem, whose form is checked.
    #[track_caller]
    pub(crate) fn problem(&self) -> (u16, String) {
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{}", self.head);
        let details: ProblemDetails = self.json();
        assert_eq!(details.status, self.status);
        assert_eq!(self.header("sluice-dc"), Some(details.dc.as_str()));
        assert_eq!(self.header("trace-id"), Some(details.trace.as_str()));
        let retryable = [408, 429, 503].contains(&self.status);
        assert_eq!(self.header("retry-after").is_some(), retryable);
        assert_eq!(self.header("www-authenticate").is_some(), [401, 403].contains(&self.status));
        (self.status, details.code().to_owned())
    }
}

/// Reads one answer to the end of the connection, or of the declared length.
pub(crate) async fn read_answer(stream: &mut TlsStream<TcpStream>) -> Answer {
    let mut bytes = Vec::new();
    loop {
        if let Some(answer) = parse(&bytes) {
            return answer;
        }
        let mut piece = vec![0; 64 << 10];
        let read = tokio::time::timeout(Duration::from_secs(20), stream.read(&mut piece));
        let n = match read.await.expect("an answer in time") {
            Ok(n) => n,
            Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&bytes)),
        };
        assert!(n > 0, "the connection ended after {:?}", String::from_utf8_lossy(&bytes));
        bytes.extend_from_slice(&piece[..n]);
    }
}

fn parse(bytes: &[u8]) -> Option<Answer> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let status: u16 = head[9..12].parse().unwrap();
    let mut answer = Answer { status, head, body: bytes[end + 4..].to_vec() };
    let length: usize = answer.header("content-length").map_or(0, |length| length.parse().unwrap());
    if status < 200 || status == 304 || status == 204 {
        return Some(answer);
    }
    if answer.body.len() < length && answer.header("x-head").is_none() {
        return None;
    }
    answer.body.truncate(length);
    Some(answer)
}
