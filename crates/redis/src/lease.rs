//! Leases: who of several processes does something, as long as Redis can say so; and fencing tokens for when it cannot.
//!
//! A lease has a name, one holder and a life. A holder renews it well before its end, and stops what it does under it when
//! it could not ([`Lease::until`]). That alone is not enough: a process may stand still past the end, and a Redis that
//! failed over may have forgotten the lease. So each taking gets a [`Fence`], a number that is higher than that of every
//! taking before. Whoever does what the lease is for sends it along; whoever is asked remembers the highest and refuses
//! lower ones. Redis may forget the last number it gave out, too, so a fence is above all of these: the last one that Redis
//! remembers, the microseconds on its clock, and the highest that the taker has been told of by whoever is asked
//! ([`Wanted::above`]).
//!
//! In Redis (`cluster` and `dc` are [`Leases`]'s own):
//!
//! | key | value |
//! | --- | --- |
//! | `sluice:<cluster>:<dc>:lease:<name>` | a hash of `holder` and `fence`, which expires |
//! | `sluice:<cluster>:<dc>:fence` | the last fence that was given out, in decimal |

use std::fmt;
use std::sync::LazyLock;
use std::time::Duration;

use redis::Script;
use sluice_engine::ids::DcId;
use tokio::time::Instant;

use crate::connection::Redis;
use crate::error::RedisError;

/// Leases that are asked for in one call, so that Redis is never busy with one for long.
const BATCH: usize = 256;

/// The part of a lease's life by which clocks may run differently until a lease ends here before it ends in Redis.
const DRIFT: u32 = 20;

/// Rises with each taking of any lease of a datacenter. At most 2^53, which is what Lua counts to exactly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fence(u64);

impl Fence {
    const MAX: u64 = 1 << 53;

    /// The fence with this number, if it can be one.
    pub const fn new(number: u64) -> Option<Self> {
        if number <= Self::MAX { Some(Self(number)) } else { None }
    }

    /// Its number.
    pub const fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A lease that somebody would like to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its name.
    pub name: String,
    /// The highest fence that is known to have been used for it; the lease gets one above.
    pub above: Fence,
}

/// A lease that this process holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Its name.
    pub name: String,
    /// The number of this taking.
    pub fence: Fence,
    /// Until when nobody else can hold it, as long as Redis forgets nothing.
    pub until: Instant,
}

/// What came of asking for a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// It is ours. If it was already, it is renewed, and keeps its fence.
    Held(Lease),
    /// It is another's.
    Taken {
        /// Whose.
        by: String,
        /// How long still, unless it is renewed or released.
        left: Duration,
    },
}

/// The leases of one datacenter, as one process takes them.
#[derive(Clone, Debug)]
pub struct Leases {
    redis: Redis,
    prefix: String,
    holder: String,
    life: Duration,
}

static TAKE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local answers = {}
local time = redis.call('TIME')
local last = tonumber(redis.call('GET', KEYS[1]) or '0')
local next = math.max(last + 1, time[1] * 1000000 + time[2])
for i = 2, #KEYS do
  local above = tonumber(ARGV[i + 1])
  local held = redis.call('HMGET', KEYS[i], 'holder', 'fence')
  if held[1] and held[1] ~= ARGV[1] then
    answers[i - 1] = {0, held[1], redis.call('PTTL', KEYS[i])}
  else
    local fence = held[1] and tonumber(held[2]) or 0
    if fence <= above then
      fence = math.max(next, above + 1)
      next = fence + 1
      last = fence
      redis.call('HSET', KEYS[i], 'holder', ARGV[1], 'fence', string.format('%.0f', fence))
    end
    redis.call('PEXPIRE', KEYS[i], ARGV[2])
    answers[i - 1] = {1, string.format('%.0f', fence), 0}
  end
end
redis.call('SET', KEYS[1], string.format('%.0f', last))
return answers
",
    )
});

static RENEW: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local answers = {}
for i = 1, #KEYS do
  local held = redis.call('HMGET', KEYS[i], 'holder', 'fence')
  if held[1] == ARGV[1] and held[2] == ARGV[i + 2] then
    answers[i] = redis.call('PEXPIRE', KEYS[i], ARGV[2])
  else
    answers[i] = 0
  end
end
return answers
",
    )
});

static RELEASE: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local answers = {}
for i = 1, #KEYS do
  local held = redis.call('HMGET', KEYS[i], 'holder', 'fence')
  if held[1] == ARGV[1] and held[2] == ARGV[i + 1] then
    answers[i] = redis.call('DEL', KEYS[i])
  else
    answers[i] = 0
  end
end
return answers
",
    )
});

static HOLDERS: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local answers = {}
for i = 1, #KEYS do
  answers[i] = redis.call('HGET', KEYS[i], 'holder') or ''
end
return answers
",
    )
});

impl Leases {
    /// Leases of a datacenter of a cluster. `holder` names this life of this process, and says to others what they need
    /// to know of it: where it is, say. No two processes, nor a process and the one before it, may use the same. `life`
    /// is how long a lease lasts that is not renewed.
    pub fn new(redis: Redis, cluster: &str, dc: DcId, holder: String, life: Duration) -> Self {
        Self { redis, prefix: format!("sluice:{cluster}:{}", dc.number()), holder, life }
    }

    /// How this process is known to others.
    pub fn holder(&self) -> &str {
        &self.holder
    }

    /// Takes those that nobody else holds; answers in the same order. After an error some may be ours: asking again says
    /// which, with the same fences.
    pub async fn take(&self, wanted: &[Wanted]) -> Result<Vec<Asked>, RedisError> {
        let mut all = Vec::with_capacity(wanted.len());
        for part in wanted.chunks(BATCH) {
            let mut keys = vec![format!("{}:fence", self.prefix)];
            keys.extend(part.iter().map(|wanted| self.key(&wanted.name)));
            let mut arguments = vec![self.holder.clone(), self.life_ms()];
            arguments.extend(part.iter().map(|wanted| wanted.above.to_string()));
            let until = self.until();
            let answers: Vec<(u8, String, i64)> = self.redis.script(&TAKE, &keys, &arguments).await?;
            self.complete(answers.len(), part.len())?;
            for (Wanted { name, .. }, (ours, text, left)) in part.iter().zip(answers) {
                all.push(if ours == 1 {
                    let fence = text.parse().ok().and_then(Fence::new);
                    let fence = fence.ok_or_else(|| self.strange("a fence that is none"))?;
                    Asked::Held(Lease { name: name.clone(), fence, until })
                } else {
                    let left = Duration::from_millis(u64::try_from(left).unwrap_or(0));
                    Asked::Taken { by: text, left }
                });
            }
        }
        Ok(all)
    }

    /// Renews leases; answers in the same order, `None` for one that is ours no more: what is done under it has to stop.
    /// After an error nothing is known, and they end when they end.
    pub async fn renew(&self, leases: &[Lease]) -> Result<Vec<Option<Lease>>, RedisError> {
        let mut all = Vec::with_capacity(leases.len());
        for part in leases.chunks(BATCH) {
            let until = self.until();
            let kept = self.each(&RENEW, part, &[self.holder.clone(), self.life_ms()]).await?;
            let renewed = part.iter().zip(kept);
            all.extend(renewed.map(|(lease, kept)| kept.then(|| Lease { until, ..lease.clone() })));
        }
        Ok(all)
    }

    /// Gives leases up, so that others need not wait for their end.
    pub async fn release(&self, leases: &[Lease]) -> Result<(), RedisError> {
        for part in leases.chunks(BATCH) {
            self.each(&RELEASE, part, std::slice::from_ref(&self.holder)).await?;
        }
        Ok(())
    }

    /// Who holds each of these, in the same order; `None` if nobody does.
    pub async fn holders(&self, names: &[String]) -> Result<Vec<Option<String>>, RedisError> {
        let mut all = Vec::with_capacity(names.len());
        for part in names.chunks(BATCH) {
            let keys: Vec<String> = part.iter().map(|name| self.key(name)).collect();
            let holders: Vec<String> = self.redis.script(&HOLDERS, &keys, &[]).await?;
            self.complete(holders.len(), part.len())?;
            all.extend(holders.into_iter().map(|holder| Some(holder).filter(|holder| !holder.is_empty())));
        }
        Ok(all)
    }

    async fn each(&self, script: &Script, part: &[Lease], first: &[String]) -> Result<Vec<bool>, RedisError> {
        let keys: Vec<String> = part.iter().map(|lease| self.key(&lease.name)).collect();
        let fences = part.iter().map(|lease| lease.fence.to_string());
        let arguments: Vec<String> = first.iter().cloned().chain(fences).collect();
        let answers: Vec<bool> = self.redis.script(script, &keys, &arguments).await?;
        self.complete(answers.len(), part.len())?;
        Ok(answers)
    }

    fn key(&self, name: &str) -> String {
        format!("{}:lease:{name}", self.prefix)
    }

    fn life_ms(&self) -> String {
        self.life.as_millis().to_string()
    }

    /// When a lease that is asked for now ends: reckoned from before the call, and a little less than Redis does.
    fn until(&self) -> Instant {
        Instant::now() + self.life - self.life / DRIFT
    }

    fn complete(&self, got: usize, wanted: usize) -> Result<(), RedisError> {
        if got == wanted { Ok(()) } else { Err(self.strange("fewer leases than it was asked for")) }
    }

    fn strange(&self, reason: &str) -> RedisError {
        RedisError::Failed { address: self.redis.address().to_owned(), reason: reason.to_owned() }
    }
}
