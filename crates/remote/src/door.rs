//! The port at which a process answers others of its datacenter.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::{Router, middleware};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use sluice_engine::ids::DcId;
use sluice_node::budget::{Concurrency, MemoryBudget};
use sluice_node::listener;
use sluice_node::material::ClusterMaterial;
use sluice_node::role::Role;
use sluice_node::secure::{Readers, Secure};
use sluice_node::shutdown::Shutdown;
use sluice_node::strangers::Strangers;
use sluice_node::tcp;
use sluice_node::tls::{self, TlsError};
use tokio::net::{TcpListener, TcpStream};

use crate::call;

/// Connections at once. Each is one call at a time.
const CONNECTIONS: usize = 4096;

/// The most that is read of a body at once: what stays in a core's cache until it is hashed.
const READ_BUFFER: usize = 32 << 10;

/// How long a handshake may take, and the head of a call after the one before.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// How long a call may go on once its caller's certificate no longer counts.
const LAST_CALL: Duration = Duration::from_secs(30);
const HEAD: Duration = Duration::from_secs(60);

/// Why a door does not open.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// The port is not to be had.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// Keys or certificates are missing, or TLS does not take them.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// A port, bound and not yet served.
pub struct Door {
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    who: Who,
    passed: Vec<(Role, Answers)>,
}

/// What a process answers to callers of one role.
pub struct Answers {
    /// The calls.
    pub routes: Router,
    /// Pays for what is collected of a call before it is acted on.
    pub memory: MemoryBudget,
    /// Owns the connections: once they are to finish, calls under way are finished, and no more are taken.
    pub tasks: Shutdown,
}

/// Whose door it is.
#[derive(Clone)]
struct Who {
    dc: DcId,
    role: Role,
    material: Arc<ClusterMaterial>,
}

impl Door {
    /// Binds `address` for the calls that a role of a datacenter answers.
    pub fn bind(
        address: SocketAddr,
        material: &Arc<ClusterMaterial>,
        dc: DcId,
        role: Role,
    ) -> Result<Self, DoorError> {
        let tls = tls::role_server(material, dc, role)?;
        let listener = listener::bind(address).map_err(|source| DoorError::Listen { address, source })?;
        Ok(Self { listener, tls, who: Who { dc, role, material: material.clone() }, passed: Vec::new() })
    }

    /// Where it is.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// The same, which also answers roles of other datacenters: what they pass on is taken.
    #[must_use]
    pub fn taking(self, passed: impl IntoIterator<Item = (Role, Answers)>) -> Self {
        Self { passed: passed.into_iter().collect(), ..self }
    }

    /// Answers callers by their role until `tasks` drain, which own the port; whoever has a role that is not in `answers`
    /// has nothing to ask.
    pub fn serve(self, answers: impl IntoIterator<Item = (Role, Answers)>, tasks: &Shutdown) {
        let dc: Arc<str> = self.who.material.dc_name(self.who.dc).unwrap_or_default().into();
        let pay = |Answers { routes, memory, tasks }: Answers| {
            let routes = routes.layer(middleware::from_fn_with_state(memory, call::pay));
            (routes.layer(middleware::from_fn_with_state(dc.clone(), call::follow)), tasks)
        };
        let own = answers.into_iter().map(|(caller, answers)| (caller, pay(answers))).collect();
        let passed = self.passed.into_iter().map(|(caller, answers)| (caller, pay(answers))).collect();
        let strangers = Strangers::at(self.who.role.name());
        let answers = Arc::new(Table { own, passed, strangers });
        let owner = tasks.clone();
        tasks.spawn(async move {
            let (readers, room) = (Readers::default(), Concurrency::new("connections", CONNECTIONS));
            loop {
                let stream = tokio::select! {
                    () = owner.draining() => return,
                    stream = listener::accept(&self.listener, self.who.role.name()) => stream,
                };
                let Ok(permit) = room.try_take() else {
                    let there_are = format_args!("there are {CONNECTIONS}");
                    answers.strangers.turned_away("a caller finds too many connections", None, &there_are);
                    continue;
                };
                let handshake = (self.tls.clone(), readers.clone(), self.who.clone());
                let (answers, material) = (answers.clone(), self.who.material.clone());
                owner.spawn(async move {
                    let Some((stream, (routes, tasks))) = greeted(stream, handshake, &answers).await else {
                        return;
                    };
                    let owner = tasks.clone();
                    owner.spawn(async move {
                        connection(stream, routes, tasks, &material).await;
                        drop(permit);
                    });
                });
            }
        });
    }
}

/// What is answered to whom.
struct Table {
    /// To the roles of the datacenter.
    own: BTreeMap<Role, (Router, Shutdown)>,
    /// To those of other datacenters that pass something on.
    passed: BTreeMap<Role, (Router, Shutdown)>,
    /// Who got no answer.
    strangers: Strangers,
}

/// A connection after its handshake, and what is answered on it; `None` if that is nothing.
async fn greeted(
    stream: TcpStream,
    (tls, readers, who): (Arc<ServerConfig>, Readers, Who),
    Table { own, passed, strangers }: &Table,
) -> Option<(Secure<TcpStream>, (Router, Shutdown))> {
    let from = stream.peer_addr().ok();
    let _ = tcp::watch_over(&stream);
    let stream = match tokio::time::timeout(HANDSHAKE, Secure::accept(stream, tls, readers)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => {
            strangers.failed(from, &error);
            return None;
        }
        Err(_) => return None,
    };
    match tls::peer_role(&who.material, stream.peer_certificates()) {
        Ok((dc, caller)) => {
            let answers = if dc == who.dc {
                own.get(&caller).filter(|_| who.role.answers(caller))
            } else {
                passed.get(&caller).filter(|_| who.role.takes_from(caller))
            };
            if answers.is_none() {
                let whose = format!("the certificate is that of {caller} in {dc}");
                strangers.turned_away("a role called that has nothing to ask here", from, &whose);
            }
            answers.map(|answers| (stream, answers.clone()))
        }
        Err(error) => {
            strangers.turned_away("a caller's certificate names no role of this cluster", from, &error);
            None
        }
    }
}

async fn connection(stream: Secure<TcpStream>, routes: Router, tasks: Shutdown, material: &ClusterMaterial) {
    let shown = stream.peer_certificates().map(<[_]>::to_vec);
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(READ_BUFFER)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes));
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = tasks.draining() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        () = material.distrusts(shown.as_deref()) => {
            connection.as_mut().graceful_shutdown();
            tokio::time::timeout(LAST_CALL, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a caller's connection broke");
    }
}
