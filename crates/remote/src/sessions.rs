//! [`Sessions`], from process to process.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use axum::Router;
use axum::extract::State;
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use prometheus_client::metrics::counter::Counter;
use quick_cache::sync::Cache;
use serde::{Deserialize, Serialize};
use sluice_engine::context::SignedContext;
use sluice_engine::drain::Phase;
use sluice_engine::hash::Root;
use sluice_engine::ids::{DcId, Timestamp};
use sluice_node::access::ContextVerifier;
use sluice_node::clock::SharedClock;
use sluice_node::metrics::Metrics;
use sluice_proto::calls::{Leaving, Sessions};
use sluice_proto::problem::{Problem, Refusal};
use tokio::sync::watch;

use crate::call::{Answer, Call, misunderstood};
use crate::caller::{Caller, Head};

const CONTEXT: &str = "/v1/sessions/context";

#[derive(Serialize, Deserialize)]
struct Token {
    token: String,
}

#[derive(Serialize, Deserialize)]
struct Issued {
    context: String,
}

/// What serves `sessions` to other processes.
pub fn serve_sessions(sessions: Arc<dyn Sessions>) -> Router {
    Router::new().route(CONTEXT, post(context)).with_state(sessions)
}

async fn context(State(sessions): State<Arc<dyn Sessions>>, call: Call<Token>) -> Answer<Issued> {
    let issued = sessions.context(&call.arguments.token).await;
    Answer(issued.map(|context| Issued { context: STANDARD.encode(context.as_bytes()) }))
}

/// Contexts that are kept: each of some 500 bytes.
const KEPT: usize = 8192;

/// A context is asked for anew when less than this of its life is left, in milliseconds.
const RENEW_BEFORE_MS: u64 = 30_000;

/// What is kept of a session: by the digest of its token, never the token.
#[derive(Clone)]
struct Kept {
    signed: SignedContext,
    renew_at: Timestamp,
    ends_at: Timestamp,
    /// Of the keys that were known when it was asked for.
    revision: u64,
}

/// The session service of another process. What it issued is kept until shortly before its end, and to its very end while
/// that process cannot be asked.
pub struct RemoteSessions {
    caller: Caller,
    verifier: Arc<ContextVerifier>,
    clock: SharedClock,
    kept: Cache<Root, Kept>,
}

impl fmt::Debug for RemoteSessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteSessions({} kept)", self.kept.len())
    }
}

impl RemoteSessions {
    /// Asked by way of `caller`. Only what `verifier` finds good is kept.
    pub fn new(caller: Caller, verifier: Arc<ContextVerifier>, clock: SharedClock) -> Self {
        Self { caller, verifier, clock, kept: Cache::new(KEPT) }
    }

    async fn ask(&self, token: &str) -> Result<SignedContext, Refusal> {
        let token = Token { token: token.to_owned() };
        let issued: Issued =
            self.caller.ask(Head::own(CONTEXT), &token, Bytes::new(), Duration::ZERO).await?;
        let bytes = STANDARD.decode(issued.context).map_err(misunderstood)?;
        SignedContext::from_bytes(bytes).map_err(misunderstood)
    }
}

/// How long a target is not asked again that could not be, or whose answer did not count.
const SHUNNED: Duration = Duration::from_secs(5);

/// The sessions of a datacenter, which are renewed at the target of its drain once that has come so far.
pub struct MovingSessions {
    own: Arc<dyn Sessions>,
    others: BTreeMap<DcId, Arc<dyn Sessions>>,
    leaving: watch::Receiver<Leaving>,
    /// What counts here.
    verifier: Arc<ContextVerifier>,
    /// Until when no target is asked.
    shunned: Mutex<Option<Instant>>,
    moved: Counter,
}

impl fmt::Debug for MovingSessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MovingSessions({} others)", self.others.len())
    }
}

impl MovingSessions {
    /// The datacenter's `own`, and those of the others, of which `leaving` tells which takes over. A context of theirs is
    /// handed on only if `verifier` finds that it counts here.
    pub fn new(
        own: Arc<dyn Sessions>,
        others: BTreeMap<DcId, Arc<dyn Sessions>>,
        leaving: watch::Receiver<Leaving>,
        verifier: Arc<ContextVerifier>,
        metrics: &Metrics,
    ) -> Self {
        let moved = Counter::default();
        metrics.register(|registry| {
            registry.register(
                "sluice_moved_contexts",
                "Requests whose session context came from the target of the drain",
                moved.clone(),
            );
        });
        Self { own, others, leaving, verifier, shunned: Mutex::default(), moved }
    }

    fn target(&self) -> Option<Arc<dyn Sessions>> {
        let target = {
            let leaving = self.leaving.borrow();
            leaving.target.filter(|_| leaving.phase >= Some(Phase::Sessions))?
        };
        if self.shunned().is_some_and(|until| Instant::now() < until) {
            return None;
        }
        self.others.get(&target).cloned()
    }

    fn shun(&self) {
        *self.shunned() = Some(Instant::now() + SHUNNED);
    }

    fn shunned(&self) -> MutexGuard<'_, Option<Instant>> {
        // One value, whole at any time.
        self.shunned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Sessions for MovingSessions {
    async fn context(&self, token: &str) -> Result<SignedContext, Refusal> {
        if let Some(target) = self.target() {
            match target.context(token).await {
                Ok(context) => match self.verifier.verify(&context) {
                    Ok(_) => {
                        self.moved.inc();
                        return Ok(context);
                    }
                    // Its clock or its keys are others: everybody here would refuse it.
                    Err(refusal) => {
                        tracing::debug!(%refusal, "a context of the datacenter that takes over does not count here");
                        self.shun();
                    }
                },
                // What is revoked is so everywhere; all else this datacenter can say itself: that one cannot be asked, that
                // the token is not for it.
                Err(refusal) if refusal.problem == Problem::RevokedToken => return Err(refusal),
                Err(refusal) => {
                    // Whoever hangs is not waited for with each request.
                    if refusal.problem == Problem::Unavailable {
                        self.shun();
                    }
                }
            }
        }
        self.own.context(token).await
    }
}

#[async_trait]
impl Sessions for RemoteSessions {
    async fn context(&self, token: &str) -> Result<SignedContext, Refusal> {
        let (digest, now) = (Root::of_bytes(token.as_bytes()), self.clock.now());
        let revision = self.verifier.revision();
        let kept = self.kept.get(&digest).filter(|kept| self.verifier.verify(&kept.signed).is_ok());
        if let Some(kept) = kept.as_ref().filter(|kept| now < kept.renew_at && kept.revision == revision) {
            return Ok(kept.signed.clone());
        }
        match self.ask(token).await {
            Ok(signed) => {
                if let Ok(context) = self.verifier.verify(&signed) {
                    let left = context.ends_at.since(now);
                    let renew_at = now.plus(left - RENEW_BEFORE_MS.min(left / 2));
                    let ends_at = context.ends_at;
                    let kept = Kept { signed: signed.clone(), renew_at, ends_at, revision };
                    self.kept.insert(digest, kept);
                }
                Ok(signed)
            }
            Err(refusal) => match kept.filter(|kept| now < kept.ends_at) {
                Some(kept) if refusal.problem == Problem::Unavailable => Ok(kept.signed),
                Some(_) | None => {
                    self.kept.remove(&digest);
                    Err(refusal)
                }
            },
        }
    }
}
