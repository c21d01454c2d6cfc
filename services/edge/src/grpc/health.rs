//! `grpc.health.v1`: what `/readyz` says, for the whole and for the one service there is.

use std::sync::Arc;

use futures_util::stream::{self, BoxStream};
use futures_util::{FutureExt, StreamExt};
use sluice_node::admin;
use sluice_node::shutdown::Shutdown;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_server};

use crate::App;

/// The services that have a health: all of them together, and ours.
const SERVICES: [&str; 2] = ["", "sluice.v1.Ingest"];

/// Says whether calls should be made here.
pub(super) struct Health {
    health: admin::Health,
    tasks: Shutdown,
}

impl Health {
    pub(super) fn of(app: &Arc<App>) -> Self {
        Self { health: app.parts.health.clone(), tasks: app.tasks.clone() }
    }
}

fn reply(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

fn serving(is_ready: bool) -> HealthCheckResponse {
    reply(if is_ready { ServingStatus::Serving } else { ServingStatus::NotServing })
}

#[tonic::async_trait]
impl health_server::Health for Health {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        if SERVICES.contains(&request.get_ref().service.as_str()) {
            Ok(Response::new(serving(self.health.is_ready())))
        } else {
            Err(Status::not_found("there is no such service"))
        }
    }

    type WatchStream = BoxStream<'static, Result<HealthCheckResponse, Status>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let (health, tasks) = (self.health.clone(), self.tasks.clone());
        let stopped = async move { tasks.draining().await };
        if !SERVICES.contains(&request.get_ref().service.as_str()) {
            // One day there may be: the protocol wants the stream to stay.
            let unknown = stream::once(async { Ok(reply(ServingStatus::ServiceUnknown)) });
            let never = stream::pending().take_until(stopped);
            return Ok(Response::new(unknown.chain(never).boxed()));
        }
        let changes = stream::unfold(None, move |told: Option<bool>| {
            let health = health.clone();
            async move {
                let ready = match told {
                    None => health.is_ready(),
                    Some(before) => {
                        health.turns_from(before).await;
                        !before
                    }
                };
                Some((Ok(serving(ready)), Some(ready)))
            }
        });
        let last = stream::once(async { Ok(serving(false)) });
        Ok(Response::new(changes.take_until(stopped.boxed()).chain(last).boxed()))
    }
}
