//! How fast each tenant may go, over all of its sessions and requests that come here.
//!
//! The decision is the engine's ([`sluice_engine::rate`]). Its buckets are in memory, or shared with other processes of the
//! datacenter ([`Buckets`]); while those cannot be asked, the own ones count, so that a tenant may go at its rate at each
//! process instead of at all of them. Nothing has to be stopped.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use sluice_engine::context::SessionContext;
use sluice_engine::ids::TenantId;
use sluice_engine::rate::Bucket;
use sluice_node::clock::SharedClock;
use sluice_proto::problem::{Problem, Refusal};

/// Buckets kept before those that are full again are thrown away.
const TENANTS: usize = 4096;

/// Buckets that several processes take from.
#[async_trait]
pub trait Buckets: Send + Sync + 'static {
    /// Takes `bytes` at `rate` bytes a second from a tenant's bucket, or says in how many milliseconds to come back; `None`
    /// if nobody can say now.
    async fn take(&self, tenant: TenantId, rate: u64, bytes: u64) -> Option<Result<(), u64>>;
}

/// The rates of a process.
pub struct Rates {
    clock: SharedClock,
    shared: Option<Arc<dyn Buckets>>,
    own: Mutex<BTreeMap<TenantId, Bucket>>,
}

impl fmt::Debug for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rates(shared: {})", self.shared.is_some())
    }
}

impl Rates {
    /// Rates by this clock, and by `shared` buckets as long as they can be asked.
    pub fn new(clock: SharedClock, shared: Option<Arc<dyn Buckets>>) -> Self {
        Self { clock, shared, own: Mutex::default() }
    }

    /// Takes so many bytes for a session, or refuses until there is room for them.
    pub async fn take(&self, session: &SessionContext, bytes: u64) -> Result<(), Refusal> {
        let (tenant, rate) = (session.tenant, session.rate);
        if rate == 0 {
            return Ok(());
        }
        let shared = match &self.shared {
            Some(shared) => shared.take(tenant, rate, bytes).await,
            None => None,
        };
        let taken = shared.unwrap_or_else(|| self.take_own(tenant, rate, bytes));
        taken.map_err(|wait_ms| {
            let detail = format!("the tenant goes faster than {rate} bytes a second");
            Refusal::new(Problem::RateLimited, detail)
                .hint("wait as long as Retry-After says, or ask for a token with a higher rate")
                .retry_after(Duration::from_millis(wait_ms))
        })
    }

    fn take_own(&self, tenant: TenantId, rate: u64, bytes: u64) -> Result<(), u64> {
        let now = self.clock.now();
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        if own.len() >= TENANTS && !own.contains_key(&tenant) {
            own.retain(|_, bucket| !bucket.is_full(now));
        }
        own.entry(tenant).or_default().take(rate, bytes, now)
    }
}
