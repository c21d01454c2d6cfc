//! What who runs the cluster asks and says of tenants.

use std::sync::Arc;

use axum::extract::{Request, State};
use http::StatusCode;
use sluice_engine::ids::TenantId;
use sluice_proto::http::Revoke;

use crate::App;
use crate::answer::{Answer, invalid, json};
use crate::files::{PathOf, json_body, object, path};
use crate::routes::Caller;

/// `POST /v1/admin/revocations`
pub(crate) async fn revoke(State(app): State<Arc<App>>, Caller(context): Caller, request: Request) -> Answer {
    let body = json_body(&app, request).await?;
    let revoke: Revoke = object(&body)?;
    json(StatusCode::OK, &app.parts.tenants.revoke(&context, revoke).await?)
}

/// `GET /v1/admin/tenants/{tenant}`
pub(crate) async fn status(
    State(app): State<Arc<App>>,
    Caller(context): Caller,
    tenant: PathOf<String>,
) -> Answer {
    let tenant = path(tenant)?;
    let tenant = tenant.parse().map(TenantId::new).map_err(|_| invalid("a tenant is a number"))?;
    json(StatusCode::OK, &app.parts.tenants.tenant(&context, tenant).await?)
}
