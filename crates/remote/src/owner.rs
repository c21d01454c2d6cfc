//! Whoever has a share: how a worker asks it, and how a process with several of them answers.
//!
//! A worker names the tenure that stands with its store in every call. A process that has not begun it, or for which it has
//! ended, answers that it is the wrong one, and the worker asks the next that the name of the role stands for. All of these
//! calls may be repeated: whoever makes them again, because an answer was lost, is told the same. So a call is made again,
//! for a while, when nobody was reached, an answer was lost, or the aggregator is just being replaced: what a client has
//! sent must not be sent again for that.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::StatusCode;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sluice_engine::context::SignedContext;
use sluice_engine::share::Share;
use sluice_node::clock::random_bytes;
use sluice_node::shutdown::Shutdown;
use sluice_proto::problem::{Problem, Refusal};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tower::ServiceExt;

use crate::call::{Answer, misunderstood, tenure};
use crate::caller::{Caller, Failed, Head};
use crate::tenure::{Tenure, Tenures};

/// For how long a call is made again: as long as it takes another aggregator to be there, and a little more.
const TRY_FOR: Duration = Duration::from_secs(8);

/// The shortest and the longest pause between two tries.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// Asks the aggregator that has a share of this process's store, whichever that is; or the worker that keeps the bucket,
/// which knows.
#[derive(Clone, Debug)]
pub(crate) struct Owner {
    caller: Caller,
    /// Which share, and the tenures of this process's store; `None`: the keeper is asked.
    of: Option<(Tenures, Share)>,
}

impl Owner {
    /// Asked by way of `caller`, under the tenure that stands in `tenures`.
    pub(crate) fn new(caller: Caller, tenures: Tenures, share: Share) -> Self {
        Self { caller, of: Some((tenures, share)) }
    }

    /// The worker that keeps the bucket, asked by way of `caller`.
    pub(crate) fn keeper(caller: Caller) -> Self {
        Self { caller, of: None }
    }

    pub(crate) async fn ask<A: DeserializeOwned>(
        &self,
        path: &'static str,
        context: &SignedContext,
        arguments: &impl Serialize,
    ) -> Result<A, Refusal> {
        self.ask_with(Head::of(path, context), arguments, Bytes::new(), Duration::ZERO).await
    }

    pub(crate) async fn ask_with<A: DeserializeOwned>(
        &self,
        call: Head<'_>,
        arguments: &impl Serialize,
        bytes: Bytes,
        longer: Duration,
    ) -> Result<A, Refusal> {
        let answer = self.ask_bytes(call, arguments, bytes, longer).await?;
        serde_json::from_slice(&answer).map_err(misunderstood)
    }

    /// Makes a call, again and again for a while.
    pub(crate) async fn ask_bytes(
        &self,
        call: Head<'_>,
        arguments: &impl Serialize,
        bytes: Bytes,
        longer: Duration,
    ) -> Result<Bytes, Refusal> {
        let until = Instant::now() + TRY_FOR;
        let mut pause = PAUSES.0;
        loop {
            let answer = match &self.of {
                None => self.caller.ask_bytes(call, arguments, bytes.clone(), longer).await,
                Some((tenures, share)) => {
                    let tenure = tenure_of(tenures, *share, until).await?;
                    let mut current = tenures.watch(*share);
                    let call = call.under(tenure);
                    tokio::select! {
                        answer = self.caller.ask_bytes(call, arguments, bytes.clone(), longer) => answer,
                        // One that hangs answers nobody, and another has it now.
                        _ = current.wait_for(|now| *now != Some(tenure)) => Err(Failed::Unknown(nobody(*share))),
                    }
                }
            };
            let failed = match answer {
                Ok(answer) => return Ok(answer),
                Err(Failed::Refused(refusal)) if refusal.problem != Problem::Stopping => return Err(refusal),
                Err(failed) => Refusal::from(failed),
            };
            if Instant::now() + pause >= until {
                return Err(failed);
            }
            // Up to half as much again, so that many do not come back in step.
            let jitter = u32::from(random_bytes::<1>()[0]);
            tokio::time::sleep(pause + pause * jitter / 512).await;
            pause = (pause * 2).min(PAUSES.1);
        }
    }
}

/// The tenure that stands, or comes until then.
async fn tenure_of(tenures: &Tenures, share: Share, until: Instant) -> Result<Tenure, Refusal> {
    let mut current = tenures.watch(share);
    let found = current.wait_for(Option::is_some);
    match tokio::time::timeout_at(until, found).await {
        Ok(Ok(found)) => found.ok_or_else(|| nobody(share)),
        Ok(Err(_)) | Err(_) => Err(nobody(share)),
    }
}

fn nobody(share: Share) -> Refusal {
    let what = match share {
        Share::WHOLE => "the store".to_owned(),
        share => format!("share {share} of the store"),
    };
    Refusal::new(Problem::Unavailable, format!("no aggregator of this datacenter has {what} now"))
}

/// What a process answers under each tenure that it has. A clone means the same.
#[derive(Clone, Default)]
pub struct Owned(Arc<RwLock<BTreeMap<Tenure, (Router, Shutdown)>>>);

impl std::fmt::Debug for Owned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.0.read().unwrap_or_else(PoisonError::into_inner).keys()).finish()
    }
}

impl Owned {
    /// From now on `routes` answer calls under a tenure. Calls under way are tasks of `tasks`: these are not done before
    /// they are, and a kill ends both.
    pub fn add(&self, tenure: Tenure, routes: Router, tasks: Shutdown) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(tenure, (routes, tasks));
    }

    /// From now on nothing is answered under a tenure.
    pub fn remove(&self, tenure: Tenure) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&tenure);
    }

    /// What answers all of them.
    pub fn routes(&self) -> Router {
        Router::new().fallback(answer).with_state(self.clone())
    }

    fn under(&self, tenure: Tenure) -> Option<(Router, Shutdown)> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&tenure).cloned()
    }
}

async fn answer(State(owned): State<Owned>, request: Request) -> Response {
    let under = tenure(request.headers()).and_then(|tenure| owned.under(tenure));
    let Some((routes, tasks)) = under.filter(|(_, tasks)| !tasks.is_draining()) else {
        return misdirected();
    };
    let (mut running, ended) = oneshot::channel::<Infallible>();
    tasks.spawn(async move {
        // Ends when the call does, or whoever makes it goes away.
        let _ = ended.await;
    });
    tokio::select! {
        answer = routes.oneshot(request) => answer.unwrap_or_else(|never| match never {}),
        () = running.closed() => misdirected(),
    }
}

/// The answer to whoever has another process in mind: one of the two is late.
fn misdirected() -> Response {
    let late = Refusal::new(Problem::Stopping, "another aggregator has it, or nobody");
    let mut response = Answer::<()>(Err(late)).into_response();
    *response.status_mut() = StatusCode::MISDIRECTED_REQUEST;
    response
}
