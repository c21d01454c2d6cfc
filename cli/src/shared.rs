//! What processes of one datacenter share through Redis: revocations, sessions, rates.
//!
//! The aggregator's process [teaches](Shared::teach) what is revoked, from its own disk; the others [learn](Shared::learn)
//! it. Both look every [`LOOK`], and lose nothing while Redis is away: what was learned stays in force, and what Redis forgot
//! is taught again. Tasks belong to the [`Shutdown`] that [`Shared::open`] was given, which is to be killed once nobody is
//! served any more.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sluice_engine::ids::{DcId, SessionId, TenantId};
use sluice_engine::revocations::Revoking;
use sluice_engine::share::Shares;
use sluice_node::access::Revocations;
use sluice_node::clock::random_bytes;
use sluice_node::material::ClusterMaterial;
use sluice_node::metrics::Metrics;
use sluice_node::role::Role;
use sluice_node::seldom::Seldom;
use sluice_node::shutdown::Shutdown;
use sluice_proto::problem::{Problem, Refusal};
use sluice_redis::buckets::SharedBuckets;
use sluice_redis::lease::Leases;
use sluice_redis::members::Members;
use sluice_redis::revocations::{CacheState, RevocationCache};
use sluice_redis::sessions::SessionRecords;
use sluice_redis::{Redis, RedisConfig, RedisError};
use sluice_session::Records;
use sluice_worker::Buckets;
use tokio::sync::watch;

/// How often it is looked whether what is revoked has changed, here or in Redis.
const LOOK: Duration = Duration::from_millis(500);

/// What one process shares with the others of its datacenter.
pub(crate) struct Shared {
    redis: Redis,
    cluster: String,
    dc: DcId,
    /// How others know this life of this process.
    name: String,
    tasks: Shutdown,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shared({:?})", self.redis)
    }
}

impl Shared {
    /// Connects. Fails if Redis refuses us; that it cannot be reached may pass.
    pub(crate) async fn open(
        config: &RedisConfig,
        material: &ClusterMaterial,
        dc: DcId,
        metrics: &Metrics,
        tasks: &Shutdown,
    ) -> Result<Self, RedisError> {
        let redis = Redis::open(config.clone(), metrics, tasks).await?;
        let name = format!("{:032x}", u128::from_be_bytes(random_bytes()));
        Ok(Self { redis, cluster: material.name().to_owned(), dc, name, tasks: tasks.clone() })
    }

    fn cache(&self) -> RevocationCache {
        RevocationCache::new(self.redis.clone(), &self.cluster, self.dc)
    }

    /// Which aggregators are there that divide slots into so many shares, this one among them once it says so.
    pub(crate) fn aggregators(&self, shares: Shares, life: Duration) -> Members {
        let of = format!("{}-{}", Role::Aggregator, shares.count());
        Members::new(self.redis.clone(), &self.cluster, self.dc, &of, self.name.clone(), life)
    }

    /// Leases of what the processes of a role divide among themselves.
    pub(crate) fn leases(&self, life: Duration) -> Leases {
        Leases::new(self.redis.clone(), &self.cluster, self.dc, self.name.clone(), life)
    }

    /// Keeps in Redis what is revoked, until `tasks` are killed.
    pub(crate) fn teach(&self, revocations: Revocations, tasks: &Shutdown) {
        let cache = self.cache();
        tasks.spawn(async move {
            let mut taught: Option<(CacheState, usize, u64)> = None;
            loop {
                let revoked = revocations.all();
                // Epochs only rise, so that this changes with every revocation.
                let sum = revoked.iter().fold(0, |sum: u64, fact| sum.wrapping_add(fact.epoch.number()));
                let (len, known) = (revoked.len(), cache.state().await);
                let is_taught = |state: &CacheState| taught == Some((state.clone(), len, sum));
                if known.as_ref().is_ok_and(|state| !is_taught(state)) && cache.write(&revoked).await.is_ok()
                {
                    let all = cache.state().await.ok().filter(CacheState::has_all);
                    taught = all.map(|state| (state, len, sum));
                }
                tokio::time::sleep(LOOK).await;
            }
        });
    }

    /// Puts in force here what Redis says is revoked. Returns what tells whether all of it is: not before somebody who knows
    /// has written all of it there, which a Redis that was flushed has lost.
    pub(crate) fn learn(&self, revocations: Revocations) -> watch::Receiver<bool> {
        let (cache, (says, knows)) = (self.cache(), watch::channel(false));
        self.tasks.spawn(async move {
            let (mut learned, trouble): (Option<CacheState>, _) = (None, Seldom::default());
            loop {
                if let Ok(state) = cache.state().await
                    && learned.as_ref() != Some(&state)
                {
                    match cache.read().await {
                        Ok((state, all)) => {
                            // Each is to be tried: those that are known already need no room.
                            let outcomes: Vec<Revoking> =
                                all.into_iter().map(|fact| revocations.apply(fact)).collect();
                            let fits = !outcomes.contains(&Revoking::Full);
                            if !fits && let Some(times) = trouble.met("full") {
                                tracing::error!(times, "not all that is revoked can be put in force");
                            }
                            if fits && state.has_all() {
                                says.send_replace(true);
                            }
                            learned = Some(state);
                        }
                        Err(error) => {
                            if let Some(times) = trouble.met(error.code()) {
                                tracing::warn!(%error, times, "what is revoked cannot be read");
                            }
                        }
                    }
                }
                tokio::time::sleep(LOOK).await;
            }
        });
        knows
    }

    /// Buckets of tenants' rates, for all workers.
    pub(crate) fn buckets(&self) -> Arc<dyn Buckets> {
        Arc::new(OfAll(SharedBuckets::new(self.redis.clone(), &self.cluster, self.dc)))
    }

    /// Sessions, for all session services; none begins before it is known what is revoked.
    pub(crate) fn records(&self, knows: watch::Receiver<bool>) -> Arc<dyn Records> {
        Arc::new(OfDatacenter {
            records: SessionRecords::new(self.redis.clone(), &self.cluster, self.dc),
            knows,
        })
    }
}

struct OfAll(SharedBuckets);

#[async_trait]
impl Buckets for OfAll {
    async fn take(&self, tenant: TenantId, rate: u64, bytes: u64) -> Option<Result<(), u64>> {
        self.0.take(tenant, rate, bytes).await.ok()
    }
}

struct OfDatacenter {
    records: SessionRecords,
    knows: watch::Receiver<bool>,
}

#[async_trait]
impl Records for OfDatacenter {
    async fn begin(&self, session: SessionId, tenant: TenantId, life: Duration) -> Result<(), Refusal> {
        let begun = self.records.begin(session, tenant, life).await;
        let why = match begun {
            Ok(_) if *self.knows.borrow() => return Ok(()),
            Ok(_) => "what is revoked is not known here yet".to_owned(),
            Err(error) => {
                tracing::debug!(%error, "a session cannot begin");
                "the sessions of this datacenter cannot be asked now".to_owned()
            }
        };
        Err(Refusal::new(Problem::Unavailable, why).hint("try again, or use another datacenter"))
    }
}
