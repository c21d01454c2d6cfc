//! The client: its URLs, and every operation that is one question.
//!
//! Clones share connections and what is known of each URL's health. Nothing runs in the background: a client that
//! is dropped leaves no task behind.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use sluice_proto::http::{
    About, DrainStatus, FilePage, FileStatus, Revoke, RevokedTokens, State, TenantStatus,
};
use tokio::time::Instant;
use uuid::Uuid;

use crate::concurrency::Concurrency;
use crate::config::{ClientConfig, ConfigError, MAX_JOBS, tls};
use crate::creation::Creation;
use crate::door::{Door, DrainRequest, ListFilter};
use crate::doors::{Doors, First, gave_up};
use crate::error::ClientError;
use crate::event::{SharedObserver, unobserved};
use crate::hosts::Hosts;
use crate::wire::Wire;

/// The longest that a server is asked to wait in one request.
const LONGEST_POLL: Duration = Duration::from_secs(60);

/// A client of one cluster, for one tenant.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
    /// Watches the questions; transfers have observers of their own.
    observer: SharedObserver,
}

#[derive(Debug)]
struct Inner {
    doors: Doors,
    jobs: usize,
}

/// What those URLs that answer say of a file.
#[derive(Debug, Default)]
pub(crate) struct Statuses {
    /// Where it stands, by the URLs that know it.
    pub(crate) known: Vec<(usize, FileStatus)>,
    /// Whether one would know more of it if it had the metadata.
    pub(crate) some_lack_it: bool,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}

impl Client {
    /// Sets a client up. Connects to nothing yet.
    pub fn new(config: ClientConfig) -> Result<Self, ClientError> {
        if config.urls.is_empty() {
            return Err(ConfigError::NoUrl.into());
        }
        if config.jobs == 0 || config.jobs > MAX_JOBS {
            return Err(ConfigError::Jobs { got: config.jobs, limit: MAX_JOBS }.into());
        }
        let authorization = config.token.header()?;
        let idle = config.jobs.saturating_add(1);
        let wire = Wire::new(tls(&config.ca_pem)?, config.timeouts, idle, config.trace);
        let hosts = Arc::new(Hosts::default());
        let doors = config
            .urls
            .iter()
            .enumerate()
            .map(|(place, url)| {
                let at = (place, url.as_str());
                Door::new(wire.clone(), hosts.clone(), at, authorization.clone(), config.timeouts)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let concurrency = Concurrency::new(config.jobs, config.adaptive);
        let doors = Doors::new(doors, config.retry, concurrency);
        Ok(Self { inner: Arc::new(Inner { doors, jobs: config.jobs }), observer: unobserved() })
    }

    /// The same client, whose questions (all but uploads and downloads) this observer watches.
    #[must_use]
    pub fn observed_by(self, observer: SharedObserver) -> Self {
        Self { observer, ..self }
    }

    /// Where the first URL that answers leads: the cluster, and its datacenters.
    pub async fn about(&self) -> Result<About, ClientError> {
        let ask = |door: Arc<Door>| async move { door.about().await };
        Ok(self.doors().anywhere(First::Configured, &self.observer, ask).await?.1)
    }

    /// Where a file stands, as the first URL that knows it says.
    pub async fn status(&self, id: Uuid) -> Result<FileStatus, ClientError> {
        let ask = |door: Arc<Door>| async move { door.status(id, None).await };
        Ok(self.doors().anywhere(First::Configured, &self.observer, ask).await?.1)
    }

    /// Where a file stands once it has reached `state` (`complete` or `assembled`), or after `longest`. `conflict` and
    /// `dropped` end the wait.
    pub async fn wait(&self, id: Uuid, state: State, longest: Duration) -> Result<FileStatus, ClientError> {
        let until = Instant::now() + longest;
        loop {
            let left = until.saturating_duration_since(Instant::now()).min(LONGEST_POLL);
            let ask = |door: Arc<Door>| async move { door.status(id, Some((state, left))).await };
            let asked_at = Instant::now();
            let (_, status) = self.doors().anywhere(First::Configured, &self.observer, ask).await?;
            if status.state >= state || Instant::now() >= until {
                return Ok(status);
            }
            if asked_at.elapsed() < left / 2 {
                tokio::time::sleep(self.doors().pause(1)).await;
            }
        }
    }

    /// One page of the files that the first URL that answers knows.
    pub async fn list(&self, filter: ListFilter) -> Result<FilePage, ClientError> {
        let ask = |door: Arc<Door>| async move { door.list(filter).await };
        Ok(self.doors().anywhere(First::Configured, &self.observer, ask).await?.1)
    }

    /// Has tokens revoked, by the first URL that answers; the token of this client has to be an operator's.
    pub async fn revoke(&self, revoke: &Revoke) -> Result<RevokedTokens, ClientError> {
        let ask = |door: Arc<Door>| async move { door.revoke(revoke).await };
        Ok(self.doors().anywhere(First::Configured, &self.observer, ask).await?.1)
    }

    /// What the first URL that answers knows of a tenant; the token of this client has to be an operator's.
    pub async fn tenant(&self, tenant: u64) -> Result<TenantStatus, ClientError> {
        let ask = |door: Arc<Door>| async move { door.tenant(tenant).await };
        Ok(self.doors().anywhere(First::Configured, &self.observer, ask).await?.1)
    }

    /// Shows, begins or ends the drain of the datacenter at the first URL. The token must allow it.
    pub async fn drain(&self, request: DrainRequest) -> Result<DrainStatus, ClientError> {
        let ask = |door: Arc<Door>| {
            let request = request.clone();
            async move { door.drain(&request).await }
        };
        Ok(self.doors().anywhere(First::Configured, &self.observer, ask).await?.1)
    }

    /// Ends a file for good. One that is gone already is a success.
    pub async fn remove(&self, id: Uuid) -> Result<(), ClientError> {
        let ask = |door: Arc<Door>| async move {
            match door.remove(id).await {
                Err(ClientError::Refused(refused)) if refused.status == 410 => Ok(()),
                result => result,
            }
        };
        self.doors().anywhere(First::Configured, &self.observer, ask).await?;
        Ok(())
    }

    /// What every URL that answers says of a file. Those that lack its metadata are told of it, if the caller can.
    /// Goes on trying until one answers.
    pub(crate) async fn statuses(
        &self,
        id: Uuid,
        creation: Option<&Creation>,
        observer: &SharedObserver,
    ) -> Result<Statuses, ClientError> {
        let begun = Instant::now();
        let deadline = begun + self.doors().policy().retry_for;
        loop {
            let asked = self.doors().usable().into_iter().map(|(url, _)| async move {
                let ticket = self.doors().enter(url);
                let ask = |door: Arc<Door>| async move { door.status(id, None).await };
                let answer = match creation {
                    Some(creation) => creation.with(ticket.door(), ask).await,
                    None => ask(ticket.door()).await,
                };
                (ticket, answer)
            });
            let mut statuses = Statuses::default();
            let (mut answered, mut last) = (false, None);
            for (ticket, answer) in join_all(asked).await {
                match answer {
                    Ok(status) => {
                        ticket.succeeded(observer);
                        answered = true;
                        statuses.known.push((ticket.url, status));
                    }
                    // One that cannot ask the others is alive, and does not know the file itself.
                    Err(error)
                        if error.is_not_found() || error.is_unavailable() || error.lacks_metadata() =>
                    {
                        ticket.succeeded(observer);
                        answered = true;
                        statuses.some_lack_it |= error.lacks_metadata();
                    }
                    Err(error) if error.is_transient() => {
                        ticket.failed(&error, observer);
                        last = Some(error);
                    }
                    Err(error) => return Err(error),
                }
            }
            if answered {
                return Ok(statuses);
            }
            if Instant::now() >= deadline {
                return Err(gave_up(begun.elapsed(), last));
            }
            self.doors().wait(deadline, &[]).await;
        }
    }

    pub(crate) fn doors(&self) -> &Doors {
        &self.inner.doors
    }

    pub(crate) fn jobs(&self) -> usize {
        self.inner.jobs
    }
}
