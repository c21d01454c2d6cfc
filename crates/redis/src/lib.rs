//! What processes of one datacenter share through Redis.
//!
//! Contract:
//! 1. Nothing here is the only copy of anything (G5): a Redis that is flushed, or fails over to a replica that lacks the
//!    last writes, costs sessions a login and leases a round, and no file anything.
//! 2. One [`Redis`] is one connection, made and mended by a task of its own. Every call has a deadline and at most one
//!    retry. While there is no connection, calls fail at once, instead of waiting.
//! 3. What Redis refuses for good (the password, the user) is an error at the start ([`Redis::open`]). What may pass (it
//!    cannot be reached, it is a replica yet) is not: the process starts, and the metrics say why.
//! 4. A lease ([`lease`]) may have two holders, each for itself, when Redis loses writes. What it protects compares
//!    fencing tokens, which rise whatever Redis forgets.
//! 5. One primary is talked to: no Redis Cluster, no Sentinel. Its name is resolved for every connection, so that whatever
//!    moves the name or the address fails it over.
//! 6. Passwords are never printed.

pub mod buckets;
mod config;
mod connection;
mod error;
pub mod lease;
pub mod members;
mod metrics;
pub mod revocations;
pub mod sessions;
#[cfg(feature = "testing")]
pub mod testing;

pub use config::{ConfigError, RedisConfig};
pub use connection::Redis;
pub use error::RedisError;
