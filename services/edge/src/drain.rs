//! Drain at the door: an operator's requests, and where clients are sent when their channels end.

use std::sync::Arc;

use axum::extract::{Request, State};
use http::{HeaderValue, StatusCode, header};
use sluice_engine::context::SignedContext;
use sluice_engine::drain::Phase;
use sluice_proto::calls::{DrainOrder, Way};
use sluice_proto::http::{DrainStatus, StartDrain};
use sluice_proto::problem::Refusal;

use crate::App;
use crate::answer::{Answer, PASSED, Refused, invalid, json};
use crate::files::{json_body, object};
use crate::routes::{Caller, way};

/// Where operators come in.
pub(crate) const PATH: &str = "/v1/drain";

/// Where clients ask where they are.
pub(crate) const ABOUT: &str = "/v1";

/// `GET /v1/drain`
pub(crate) async fn show(State(app): State<Arc<App>>, Caller(context): Caller) -> Answer {
    order(&app, &context, DrainOrder::Show).await
}

/// `PUT /v1/drain`
pub(crate) async fn begin(State(app): State<Arc<App>>, Caller(context): Caller, request: Request) -> Answer {
    let body = json_body(&app, request).await?;
    let StartDrain { to, phase, evacuate } = object(&body)?;
    let phase = Phase::from_name(&phase).ok_or_else(|| {
        let names = Phase::ALL.map(Phase::name).join(", ");
        invalid(format!("{phase:?} is no phase of a drain")).hint(format!("one of {names}"))
    })?;
    order(&app, &context, DrainOrder::Begin { to, phase, evacuate, is_trial: false }).await
}

/// `DELETE /v1/drain`
pub(crate) async fn end(State(app): State<Arc<App>>, Caller(context): Caller) -> Answer {
    order(&app, &context, DrainOrder::End).await
}

async fn order(app: &App, context: &SignedContext, order: DrainOrder) -> Answer {
    let status = app.parts.workers.drain(context, order).await?;
    // One of them asks.
    let connections = u64::try_from(app.parts.metrics.connections.get()).unwrap_or(0).saturating_sub(1);
    json(StatusCode::OK, &DrainStatus { connections, ..status })
}

/// Sends a client away that goes where it is sent, once the channels of the datacenter end. Who asks where it is must be told
/// by this one: without that it knows of no other, and goes to no host that it does not know.
pub(crate) fn send_away(app: &App, request: &Request) -> Option<Refused> {
    let leaving = app.parts.leaving.borrow();
    let url = leaving.to.as_deref().filter(|_| leaving.phase == Some(Phase::Channels))?;
    if way(request) != Way::Follows || [PATH, ABOUT].contains(&request.uri().path()) {
        return None;
    }
    let path = request.uri().path();
    let query = request.uri().query().map_or_else(String::new, |query| format!("{query}&"));
    let location = format!("{}{path}?{query}{PASSED}", url.trim_end_matches('/'));
    let refusal = Refusal::elsewhere("this datacenter hands its clients over", url);
    let location = HeaderValue::try_from(location).ok()?;
    Some(Refused::from(refusal).with(header::LOCATION, location))
}
