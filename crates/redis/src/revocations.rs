//! Revocations, for processes that no REVOKE reaches: a cache of what the datacenter's aggregator has on its disk.
//!
//! | key | value |
//! | --- | --- |
//! | `sluice:<cluster>:<dc>:revoked` | a hash: tenant, or tenant and session, to the epoch, in decimal |
//! | `sluice:<cluster>:<dc>:revoked:at` | when a field was last written or taken out, on Redis's clock |
//! | `sluice:<cluster>:<dc>:revoked:all` | 1 once everything was written that is revoked, even if that is nothing |
//!
//! Whoever knows revocations writes them ([`RevocationCache::write`]), and looks every now and then whether Redis still has
//! them; whoever needs them reads ([`RevocationCache::read`]) when the state has changed. A cache that was flushed, or lost
//! writes in a failover, is written again. What was read stays in force whatever becomes of Redis: revocations only grow.
//!
//! The hash has what the writer has: a session that its tenant's revocation covers is taken out, and a hash that others
//! filled is begun anew. So it stays as small as [`MAX_REVOCATIONS`].

use std::sync::LazyLock;

use redis::Script;
use sluice_engine::ids::{DcId, RevocationEpoch, SessionId, TenantId};
use sluice_engine::limits::MAX_REVOCATIONS;
use sluice_engine::revocations::{Revocation, Revoked};

use crate::connection::Redis;
use crate::error::RedisError;

/// Written in one call.
const BATCH: usize = 512;

/// Fields that are read at the most: room for what others write.
const MOST: usize = 2 * MAX_REVOCATIONS;

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
return redis.call('HLEN', KEYS[1])
",
    )
});

static FORGET: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local gone = 0
for i = 1, #ARGV, 2 do
  -- Nothing that somebody has raised meanwhile.
  if redis.call('HGET', KEYS[1], ARGV[i]) == ARGV[i + 1] then
    gone = gone + redis.call('HDEL', KEYS[1], ARGV[i])
  end
end
if gone > 0 then
  local time = redis.call('TIME')
  redis.call('SET', KEYS[2], time[1] .. '.' .. time[2])
end
return gone
",
    )
});

static BEGIN_ANEW: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
return redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
",
    )
});

static END: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
-- All of it may have gone since it was written.
if redis.call('HLEN', KEYS[1]) < tonumber(ARGV[1]) then
  return redis.error_reply('ERR what was written is not there any more')
end
redis.call('SET', KEYS[3], 1)
return 0
",
    )
});

/// What a [`CacheState`] is made of.
const STATE_OF: &str = r"
local function state_of(keys)
  local all, at = redis.call('GET', keys[3]) or '0', redis.call('GET', keys[2]) or ''
  return all .. ' ' .. redis.call('HLEN', keys[1]) .. ' ' .. at
end
";

static STATE: LazyLock<Script> = LazyLock::new(|| Script::new(&format!("{STATE_OF} return state_of(KEYS)")));

static READ: LazyLock<Script> = LazyLock::new(|| {
    let read = r"
if redis.call('HLEN', KEYS[1]) > tonumber(ARGV[1]) then
  return redis.error_reply('ERR there are more revocations than there can be')
end
local all = redis.call('HGETALL', KEYS[1])
table.insert(all, 1, state_of(KEYS))
return all
";
    Script::new(&format!("{STATE_OF}{read}"))
});

/// What Redis has of revocations: compared, it says whether anything was written or forgotten.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheState(String);

impl CacheState {
    /// Whether everything was written that is revoked: a cache that was flushed may be empty without that.
    pub fn has_all(&self) -> bool {
        self.0.starts_with("1 ")
    }
}

/// The revocations of one datacenter, in Redis.
#[derive(Clone, Debug)]
pub struct RevocationCache {
    redis: Redis,
    keys: [String; 3],
}

impl RevocationCache {
    /// Those of a datacenter of a cluster.
    pub fn new(redis: Redis, cluster: &str, dc: DcId) -> Self {
        let prefix = format!("sluice:{cluster}:{}:revoked", dc.number());
        Self { redis, keys: [prefix.clone(), format!("{prefix}:at"), format!("{prefix}:all")] }
    }

    /// What Redis has now.
    pub async fn state(&self) -> Result<CacheState, RedisError> {
        Ok(CacheState(self.redis.script(&STATE, &self.keys, &[]).await?))
    }

    /// Writes all that is revoked, and says so; fails if it was lost again meanwhile. What is there already stays, and so does
    /// what is higher; what is covered goes.
    pub async fn write(&self, revoked: &Revoked) -> Result<(), RedisError> {
        let fields: Vec<String> =
            revoked.iter().flat_map(|fact| [field(&fact), fact.epoch.to_string()]).collect();
        let mut len = self.write_fields(&fields).await?;
        if len > MOST {
            let _: u8 = self.redis.script(&BEGIN_ANEW, &self.keys, &[]).await?;
            len = self.write_fields(&fields).await?;
        }
        if len > revoked.len() {
            self.forget_what_is_covered(revoked).await?;
        }
        let _: u8 = self.redis.script(&END, &self.keys, &[revoked.len().to_string()]).await?;
        Ok(())
    }

    /// Returns how many fields there are then.
    async fn write_fields(&self, fields: &[String]) -> Result<usize, RedisError> {
        // Of nothing there is no part, and yet there may be fields.
        let mut len = self.redis.script(&WRITE, &self.keys, &[]).await?;
        for part in fields.chunks(2 * BATCH) {
            len = self.redis.script(&WRITE, &self.keys, part).await?;
        }
        Ok(len)
    }

    async fn forget_what_is_covered(&self, revoked: &Revoked) -> Result<(), RedisError> {
        let covered =
            |fact: &Revocation| fact.session.is_some() && fact.epoch <= revoked.epoch_of(fact.tenant);
        let (_, all) = self.read().await?;
        let gone: Vec<String> = all
            .iter()
            .filter(|fact| covered(fact))
            .flat_map(|fact| [field(fact), fact.epoch.to_string()])
            .collect();
        for part in gone.chunks(2 * BATCH) {
            let _: usize = self.redis.script(&FORGET, &self.keys, part).await?;
        }
        Ok(())
    }

    /// What Redis has now, and all that is revoked by it, tenants first. What is no revocation is left out: others may write
    /// here. An error if there is more than there can be.
    pub async fn read(&self) -> Result<(CacheState, Vec<Revocation>), RedisError> {
        let mut fields: Vec<String> = self.redis.script(&READ, &self.keys, &[MOST.to_string()]).await?;
        let state = CacheState(if fields.is_empty() { String::new() } else { fields.remove(0) });
        let mut all: Vec<Revocation> =
            fields.chunks_exact(2).filter_map(|pair| parse(&pair[0], &pair[1])).collect();
        all.sort_unstable_by_key(|fact| (fact.session.is_some(), *fact));
        Ok((state, all))
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
