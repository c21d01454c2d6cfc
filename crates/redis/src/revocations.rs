//! Revocations, for processes that no REVOKE reaches: a cache of what the datacenter's aggregator has on its disk.
//!
//! | key | value |
//! | --- | --- |
//! | `sluice:<cluster>:<dc>:revoked` | a hash: tenant, or tenant and session, to the epoch, in decimal |
//! | `sluice:<cluster>:<dc>:revoked:at` | when a field was last written, on Redis's clock |
//!
//! Whoever knows revocations writes them ([`RevocationCache::write`]), and looks every now and then whether Redis still has
//! them; whoever needs them reads ([`RevocationCache::read`]) when the state has changed. A cache that was flushed, or lost
//! writes in a failover, is written again. What was read stays in force whatever becomes of Redis: revocations only grow.

use std::sync::LazyLock;

use redis::Script;
use sluice_engine::ids::{DcId, RevocationEpoch, SessionId, TenantId};
use sluice_engine::limits::MAX_REVOCATIONS;
use sluice_engine::revocations::{Revocation, Revoked};

use crate::connection::Redis;
use crate::error::RedisError;

/// Written in one call.
const BATCH: usize = 512;

static WRITE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local changed = false
for i = 1, #ARGV, 2 do
  local known = redis.call('HGET', KEYS[1], ARGV[i])
  -- Epochs are larger than Lua counts exactly: the longer is the higher, and of equal length the later.
  local new = ARGV[i + 1]
  if not known or #known < #new or (#known == #new and known < new) then
    redis.call('HSET', KEYS[1], ARGV[i], new)
    changed = true
  end
end
if changed then
  local time = redis.call('TIME')
  redis.call('SET', KEYS[2], time[1] .. '.' .. time[2])
end
return 0
",
    )
});

static STATE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
return redis.call('HLEN', KEYS[1]) .. ' ' .. (redis.call('GET', KEYS[2]) or '')
",
    )
});

static READ: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
if redis.call('HLEN', KEYS[1]) > tonumber(ARGV[1]) then
  return {}
end
return redis.call('HGETALL', KEYS[1])
",
    )
});

/// What Redis has of revocations: compared, it says whether anything was written or forgotten.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheState(String);

/// The revocations of one datacenter, in Redis.
#[derive(Clone, Debug)]
pub struct RevocationCache {
    redis: Redis,
    keys: [String; 2],
}

impl RevocationCache {
    /// Those of a datacenter of a cluster.
    pub fn new(redis: Redis, cluster: &str, dc: DcId) -> Self {
        let prefix = format!("sluice:{cluster}:{}:revoked", dc.number());
        Self { redis, keys: [prefix.clone(), format!("{prefix}:at")] }
    }

    /// What Redis has now.
    pub async fn state(&self) -> Result<CacheState, RedisError> {
        Ok(CacheState(self.redis.script(&STATE, &self.keys, &[]).await?))
    }

    /// Writes what is revoked. What is there already stays, and so does what is higher.
    pub async fn write(&self, revoked: &Revoked) -> Result<(), RedisError> {
        let fields: Vec<String> =
            revoked.iter().flat_map(|fact| [field(&fact), fact.epoch.to_string()]).collect();
        for part in fields.chunks(2 * BATCH) {
            let _: u8 = self.redis.script(&WRITE, &self.keys, part).await?;
        }
        Ok(())
    }

    /// All that is revoked. What is no revocation is left out: others may write here.
    pub async fn read(&self) -> Result<Vec<Revocation>, RedisError> {
        let most = [(2 * MAX_REVOCATIONS).to_string()];
        let fields: Vec<String> = self.redis.script(&READ, &self.keys, &most).await?;
        Ok(fields.chunks_exact(2).filter_map(|pair| parse(&pair[0], &pair[1])).collect())
    }
}

fn field(fact: &Revocation) -> String {
    match fact.session {
        None => fact.tenant.number().to_string(),
        Some(session) => format!("{}/{session}", fact.tenant.number()),
    }
}

fn parse(field: &str, epoch: &str) -> Option<Revocation> {
    let (tenant, session) = match field.split_once('/') {
        None => (field, None),
        Some((tenant, session)) => (tenant, Some(SessionId::new(session.parse().ok()?))),
    };
    let tenant = TenantId::new(tenant.parse().ok()?);
    Some(Revocation { tenant, session, epoch: RevocationEpoch::new(epoch.parse().ok()?) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_engine::ids::FileId;

    #[test]
    fn what_is_written_is_what_is_read() {
        for subject in [FileId::NIL, FileId::from_bytes([7; 16])] {
            let fact = Revocation::of(subject, TenantId::new(9), RevocationEpoch::new(u64::MAX));
            assert_eq!(parse(&field(&fact), &fact.epoch.to_string()), Some(fact));
        }
        for (field, epoch) in [("", "1"), ("x", "1"), ("7/", "1"), ("7/x", "1"), ("7", "-1"), ("7", "")] {
            assert_eq!(parse(field, epoch), None, "{field} {epoch}");
        }
    }
}
