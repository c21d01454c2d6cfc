//! The edges: where clients come in.
//!
//! An [`Edge`] is owned by the composition of one datacenter: it listens on one TLS port, speaks HTTP/1.1, HTTP/2 and
//! over that gRPC, turns the bearer token of each request into a signed session context, and passes requests inwards to
//! [`Workers`] with it. It decides nothing about files.
//!
//! Contract:
//! 1. A request without a token that counts is refused before its body is read; the answer is sent, and the body
//!    drained a bounded while, so that clients that write first see it.
//! 2. What a client may cost is bounded: connections, requests, headers, bodies in memory, and time for each. Past a
//!    bound it is refused with a time to come back, or cut.
//! 3. Headers that only the inside may set are stripped. What goes inwards is the signed context, as an argument.
//! 4. Every refusal is a problem of the one list, made in one place for each door: of RFC 9457 in `answer.rs`, a gRPC
//!    status in `grpc/status.rs`. Every answer names its datacenter and trace.
//! 5. It stops with the datacenter's [`Shutdown`]: `/readyz` fails first, then the port closes, requests in flight
//!    finish, connections say goodbye. A kill drops the port and every connection at once.
//! 6. Once the datacenter hands its channels over, clients that follow are sent to the other datacenter, and connections end
//!    with the requests that they have, idle ones last; who comes back is served.

mod accept;
mod answer;
mod body;
mod chunks;
mod content;
mod drain;
mod files;
mod grpc;
mod routes;
mod tenants;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use sluice_node::admin::Health;
use sluice_node::budget::{Concurrency, MemoryBudget};
use sluice_node::listener;
use sluice_node::metrics::Metrics;
use sluice_node::shutdown::Shutdown;
use sluice_proto::calls::{Leaving, Sessions, Tenants, Workers};
use tokio::net::TcpListener;
use tokio::sync::watch;

pub use body::DrainLimits;

/// What an edge spends on its clients.
#[derive(Clone, Debug)]
pub struct EdgeSettings {
    /// Connections at once; more are closed as they come. One costs some 6 KiB before its first byte, 11 KiB when it is
    /// idle over HTTP/1.1, and 25 KiB over HTTP/2.
    pub connections: usize,
    /// Requests at once; more are refused.
    pub requests: usize,
    /// How long a TLS handshake may take.
    pub handshake: Duration,
    /// How long the head of a request may take, and an HTTP/1.1 connection may be idle.
    pub head: Duration,
    /// How long a body of JSON may take, and a gRPC message with no chunk in it.
    pub json: Duration,
    /// How long an HTTP/2 connection without requests is kept, and a gRPC stream on which nothing goes on.
    pub idle: Duration,
    /// How long a connection with requests is kept when no byte of a body moves: longer than any wait.
    pub stall: Duration,
    /// What is drained of a body after an early refusal.
    pub drain: DrainLimits,
    /// How long the port stays open after `/readyz` began to fail, for balancers to notice.
    pub notice: Duration,
}

impl Default for EdgeSettings {
    fn default() -> Self {
        Self {
            connections: 16_384,
            requests: 8192,
            handshake: Duration::from_secs(10),
            head: Duration::from_secs(30),
            json: Duration::from_secs(10),
            idle: Duration::from_secs(120),
            stall: Duration::from_secs(150),
            drain: DrainLimits::default(),
            notice: Duration::ZERO,
        }
    }
}

/// Bytes a second with which what is collected must come, on top of what any body of JSON is given.
const SLOWEST: u64 = 16 << 10;

impl EdgeSettings {
    /// How long a body or a message of so many bytes may take that is collected before it is acted on.
    fn patience(&self, len: u64) -> Duration {
        self.json + Duration::from_millis(len * 1000 / SLOWEST)
    }
}

/// Where and how an edge listens.
#[derive(Clone, Debug)]
pub struct EdgeConfig {
    /// The address; port 0 takes any free one.
    pub listen: SocketAddr,
    /// Name of the datacenter.
    pub dc: String,
    /// TLS, from [`sluice_node::tls::edge_server`].
    pub tls: Arc<ServerConfig>,
    /// What it spends.
    pub settings: EdgeSettings,
}

/// What an edge works with.
#[derive(Clone)]
pub struct EdgeParts {
    /// Turns tokens into contexts.
    pub sessions: Arc<dyn Sessions>,
    /// Does what is asked.
    pub workers: Arc<dyn Workers>,
    /// Answers who runs the cluster.
    pub tenants: Arc<dyn Tenants>,
    /// Pays for bodies in flight.
    pub memory: MemoryBudget,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Told when the edge serves, and when it stops.
    pub health: Health,
    /// Where clients should go, if the datacenter hands them over.
    pub leaving: watch::Receiver<Leaving>,
}

/// Why an edge does not open.
#[derive(Debug, thiserror::Error)]
pub enum EdgeError {
    /// The port is taken.
    #[error("{address} is in use: stop what listens there, or listen on another port")]
    Busy {
        /// Where.
        address: SocketAddr,
    },
    /// The system refuses.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
}

/// What every request is served with.
struct App {
    dc: String,
    parts: EdgeParts,
    settings: EdgeSettings,
    requests: Concurrency,
    tasks: Shutdown,
}

/// An edge whose port is open, but which does not serve yet.
pub struct Edge {
    listener: TcpListener,
    address: SocketAddr,
    config: EdgeConfig,
    parts: EdgeParts,
}

impl Edge {
    /// Opens the port. Clients that connect wait until [`serve`](Self::serve).
    pub fn bind(config: EdgeConfig, parts: EdgeParts) -> Result<Self, EdgeError> {
        let address = config.listen;
        let open = || {
            let listener = listener::bind(address)?;
            let bound = listener.local_addr()?;
            Ok((listener, bound))
        };
        let (listener, bound) = open().map_err(|source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => EdgeError::Busy { address },
            _ => EdgeError::Listen { address, source },
        })?;
        Ok(Self { listener, address: bound, config, parts })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves on tasks of `tasks` until it drains.
    pub fn serve(self, tasks: &Shutdown) {
        let Self { listener, config, parts, .. } = self;
        let EdgeConfig { dc, tls, settings, .. } = config;
        let requests = Concurrency::new("requests", settings.requests);
        parts.health.set_serving(true);
        let app = Arc::new(App { dc, parts, settings, requests, tasks: tasks.clone() });
        tasks.spawn(accept::run(listener, tls, app));
    }
}
