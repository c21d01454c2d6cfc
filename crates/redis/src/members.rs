//! Members: which processes of a role are there, as they say themselves every now and then.
//!
//! In Redis `sluice:<cluster>:<dc>:members:<of>` is a sorted set of names, by when each is forgotten, in milliseconds on
//! Redis's clock. A member that was forgotten, because it stood still or Redis lost it, is one again when it says so again.

use std::collections::BTreeSet;
use std::sync::LazyLock;
use std::time::Duration;

use redis::Script;
use sluice_engine::ids::DcId;

use crate::connection::Redis;
use crate::error::RedisError;

/// The most that are told of: whoever finds more has a bug, or an enemy.
const MAX_MEMBERS: usize = 1_000;

static ANNOUNCE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
-- Nobody says so far ahead, unless the clock was set back since.
redis.call('ZREMRANGEBYSCORE', KEYS[1], now + tonumber(ARGV[4]) + 1, '+inf')
if ARGV[2] ~= '0' then
  redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
  redis.call('PEXPIRE', KEYS[1], tonumber(ARGV[2]) * 10)
else
  redis.call('ZREM', KEYS[1], ARGV[1])
end
return redis.call('ZRANGE', KEYS[1], 0, tonumber(ARGV[3]) - 1)
",
    )
});

/// The members of one role in one datacenter, as one of them sees it.
#[derive(Clone, Debug)]
pub struct Members {
    redis: Redis,
    key: String,
    me: String,
    life: Duration,
}

impl Members {
    /// Those of something that processes divide, in a datacenter of a cluster. `me` names this life of this process; it is
    /// forgotten `life`, the same for all of them, after it said last that it is there.
    pub fn new(redis: Redis, cluster: &str, dc: DcId, of: &str, me: String, life: Duration) -> Self {
        let key = format!("sluice:{cluster}:{}:members:{of}", dc.number());
        Self { redis, key, me, life }
    }

    /// How this process is known to others.
    pub fn me(&self) -> &str {
        &self.me
    }

    /// Says that this process is there; who is.
    pub async fn announce(&self) -> Result<BTreeSet<String>, RedisError> {
        self.say(self.life).await
    }

    /// Says that this process is not there, or not yet; who is.
    pub async fn leave(&self) -> Result<BTreeSet<String>, RedisError> {
        self.say(Duration::ZERO).await
    }

    async fn say(&self, life: Duration) -> Result<BTreeSet<String>, RedisError> {
        let longest = self.life.as_millis().to_string();
        let arguments = [self.me.clone(), life.as_millis().to_string(), MAX_MEMBERS.to_string(), longest];
        let all: Vec<String> =
            self.redis.script(&ANNOUNCE, std::slice::from_ref(&self.key), &arguments).await?;
        Ok(all.into_iter().collect())
    }
}
