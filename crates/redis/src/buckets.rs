//! How fast tenants may go, counted over all processes of a datacenter.
//!
//! The same bucket as in [`sluice_engine::rate`], kept in Redis as `sluice:<cluster>:<dc>:rate:<tenant>`: the microsecond on
//! Redis's clock until which all that was taken is paid for, in decimal. It expires when the bucket is full again. Whatever
//! Redis forgets of it is a second of the tenant's rate.

use std::sync::LazyLock;

use redis::Script;
use sluice_engine::ids::{DcId, TenantId};
use sluice_engine::rate::{BURST_MS, MAX_WAIT_MS, REQUEST_COST};

use crate::connection::Redis;
use crate::error::RedisError;

static TAKE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local paid = tonumber(redis.call('GET', KEYS[1]) or '0')
local longest = tonumber(ARGV[3])
if paid - now > longest then
  -- The clock was set back, or somebody else wrote this.
  paid = now + longest
end
local over = paid - now - tonumber(ARGV[2])
if over > 0 then
  return math.ceil(over / 1000)
end
paid = math.max(now, paid) + tonumber(ARGV[1])
redis.call('SET', KEYS[1], string.format('%.0f', paid), 'PX', string.format('%.0f', math.max(1, math.ceil((paid - now) / 1000))))
return 0
",
    )
});

/// The longest that one taking can put a bucket ahead, in microseconds: a year, far below what Lua counts exactly.
const LONGEST_US: u64 = 365 * 86_400 * 1_000_000;

/// The buckets of one datacenter's tenants.
#[derive(Clone, Debug)]
pub struct SharedBuckets {
    redis: Redis,
    prefix: String,
}

impl SharedBuckets {
    /// Those of a datacenter of a cluster.
    pub fn new(redis: Redis, cluster: &str, dc: DcId) -> Self {
        Self { redis, prefix: format!("sluice:{cluster}:{}:rate", dc.number()) }
    }

    /// Takes `bytes` at `rate` bytes a second, which is not 0, from a tenant's bucket; or says in how many milliseconds to
    /// come back.
    pub async fn take(&self, tenant: TenantId, rate: u64, bytes: u64) -> Result<Result<(), u64>, RedisError> {
        let cost = u128::from(bytes.max(REQUEST_COST)) * 1_000_000 / u128::from(rate.max(1));
        let cost = cost.min(u128::from(LONGEST_US));
        let arguments =
            [cost.to_string(), (BURST_MS * 1000).to_string(), (LONGEST_US + BURST_MS * 1000).to_string()];
        let key = format!("{}:{}", self.prefix, tenant.number());
        let wait: u64 = self.redis.script(&TAKE, &[key], &arguments).await?;
        Ok(if wait == 0 { Ok(()) } else { Err(wait.min(MAX_WAIT_MS)) })
    }
}
