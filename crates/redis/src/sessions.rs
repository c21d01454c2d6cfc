//! Which sessions have begun, shared by the session services of a datacenter.
//!
//! A session is `sluice:<cluster>:<dc>:session:<id>`, a string: its tenant. It lives as long as its token. A record that was
//! lost is made again with the token's next context: nothing hangs on it but that it can be made, so that logins fail closed
//! while Redis cannot say what is revoked.

use std::sync::LazyLock;
use std::time::Duration;

use redis::Script;
use sluice_engine::ids::{DcId, SessionId, TenantId};

use crate::connection::Redis;
use crate::error::RedisError;

static BEGIN: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
local known = redis.call('EXISTS', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1 - known
",
    )
});

/// The sessions of one datacenter.
#[derive(Clone, Debug)]
pub struct SessionRecords {
    redis: Redis,
    prefix: String,
}

impl SessionRecords {
    /// Those of a datacenter of a cluster.
    pub fn new(redis: Redis, cluster: &str, dc: DcId) -> Self {
        Self { redis, prefix: format!("sluice:{cluster}:{}:session", dc.number()) }
    }

    /// Records that a session has begun, or goes on, for at most `life`; whether it was not known.
    pub async fn begin(
        &self,
        session: SessionId,
        tenant: TenantId,
        life: Duration,
    ) -> Result<bool, RedisError> {
        let key = format!("{}:{session}", self.prefix);
        let life = life.as_millis().max(1).to_string();
        self.redis.script(&BEGIN, &[key], &[tenant.number().to_string(), life]).await
    }
}
