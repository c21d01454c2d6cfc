//! [`Tenants`], from process to process.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::extract::State;
use axum::routing::post;
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sluice_engine::context::SignedContext;
use sluice_engine::ids::TenantId;
use sluice_engine::share::Share;
use sluice_proto::calls::Tenants;
use sluice_proto::http::{Revoke, RevokedTokens, TenantStatus};
use sluice_proto::problem::Refusal;

use crate::call::{Answer, Call};
use crate::caller::{Caller, Head};
use crate::owner::Owner;
use crate::tenure::Tenures;

const REVOKE: &str = "/v1/tenants/revoke";
const STATUS: &str = "/v1/tenants/status";

#[derive(Serialize, Deserialize)]
struct Tenant {
    tenant: u64,
}

type Served = State<Arc<dyn Tenants>>;

/// What serves `tenants` to other processes.
pub fn serve_tenants(tenants: Arc<dyn Tenants>) -> Router {
    Router::new().route(REVOKE, post(revoke)).route(STATUS, post(status)).with_state(tenants)
}

async fn revoke(State(tenants): Served, call: Call<Revoke>) -> Answer<RevokedTokens> {
    let answer = async { tenants.revoke(&call.context?, call.arguments).await };
    Answer(answer.await)
}

async fn status(State(tenants): Served, call: Call<Tenant>) -> Answer<TenantStatus> {
    let answer = async { tenants.tenant(&call.context?, TenantId::new(call.arguments.tenant)).await };
    Answer(answer.await)
}

/// What another process answers of tenants.
#[derive(Clone, Debug)]
pub struct RemoteTenants(Whom);

#[derive(Clone, Debug)]
enum Whom {
    /// Any process of a role.
    Any(Caller),
    /// The aggregator that has a share.
    Owner(Owner),
}

impl RemoteTenants {
    /// Asked by way of `caller`: any process of its role can answer.
    pub fn new(caller: Caller) -> Self {
        Self(Whom::Any(caller))
    }

    /// What the aggregator answers that has a share of this process's store, under the tenure that stands in `tenures`.
    pub fn of_share(caller: Caller, tenures: Tenures, share: Share) -> Self {
        Self(Whom::Owner(Owner::new(caller, tenures, share)))
    }

    async fn ask<A: DeserializeOwned>(
        &self,
        path: &'static str,
        context: &SignedContext,
        arguments: &impl Serialize,
    ) -> Result<A, Refusal> {
        match &self.0 {
            Whom::Any(caller) => {
                Ok(caller.ask(Head::of(path, context), arguments, Bytes::new(), Duration::ZERO).await?)
            }
            Whom::Owner(owner) => owner.ask(path, context, arguments).await,
        }
    }
}

#[async_trait]
impl Tenants for RemoteTenants {
    async fn revoke(&self, context: &SignedContext, revoke: Revoke) -> Result<RevokedTokens, Refusal> {
        self.ask(REVOKE, context, &revoke).await
    }

    async fn tenant(&self, context: &SignedContext, tenant: TenantId) -> Result<TenantStatus, Refusal> {
        self.ask(STATUS, context, &Tenant { tenant: tenant.number() }).await
    }
}
