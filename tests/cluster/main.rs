//! Whole clusters in one process: real datacenters, real TLS and mTLS on loopback, real disks.
//!
//! Every test makes its own cluster, with ports of its own in a directory of its own. What is waited for is asked
//! for again until it is so, and a test that waits too long fails.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod apart;
mod authority;
mod bed;
mod bereft;
mod clocks;
mod conflict;
mod damage;
mod death;
mod drain;
mod early;
mod economy;
mod ingest;
#[path = "../python/interpreter.rs"]
mod interpreter;
mod lists;
mod metrics;
mod open;
mod other;
mod partition;
mod python;
mod scale;
mod small;
mod spill;
mod takeover;
mod tenants;
mod whole;
mod wire;
