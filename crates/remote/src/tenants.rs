//! [`Tenants`], from process to process.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::extract::State;
use axum::routing::post;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sluice_engine::context::SignedContext;
use sluice_engine::ids::TenantId;
use sluice_proto::calls::Tenants;
use sluice_proto::http::{Revoke, RevokedTokens, TenantStatus};
use sluice_proto::problem::Refusal;

use crate::call::{Answer, Call};
use crate::caller::{Caller, Head};

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
pub struct RemoteTenants(Caller);

impl RemoteTenants {
    /// Asked by way of `caller`.
    pub fn new(caller: Caller) -> Self {
        Self(caller)
    }
}

#[async_trait]
impl Tenants for RemoteTenants {
    async fn revoke(&self, context: &SignedContext, revoke: Revoke) -> Result<RevokedTokens, Refusal> {
        Ok(self.0.ask(Head::of(REVOKE, context), &revoke, Bytes::new(), Duration::ZERO).await?)
    }

    async fn tenant(&self, context: &SignedContext, tenant: TenantId) -> Result<TenantStatus, Refusal> {
        let tenant = Tenant { tenant: tenant.number() };
        Ok(self.0.ask(Head::of(STATUS, context), &tenant, Bytes::new(), Duration::ZERO).await?)
    }
}
