//! The core of Sluice: every decision, and no I/O.
//!
//! Contract:
//! 1. `(state, event, now) -> effects`: time, randomness, ids and keys come in as arguments.
//! 2. No tokio, no sockets, no clock, no environment; iteration orders are fixed. The same inputs give the same
//!    outputs on every machine, which is what lets a test run years of partitions in seconds.
//! 3. Values are parsed once, at the boundary; afterwards a type is the proof ([`geometry::Run`], [`span::Place`],
//!    [`command::Verified`]).
//! 4. Facts commute and are idempotent: equal sets of facts give equal [`ledger`]s.
//! 5. Nothing here panics on what a client or a peer sends.
//! 6. Drivers apply effects in the order given: what must be durable comes before what says so.

pub mod aggregator;
pub mod command;
pub mod context;
pub mod drain;
pub mod geometry;
pub mod hash;
pub mod ids;
pub mod keys;
pub mod ledger;
pub mod limits;
pub mod metadata;
pub mod placement;
pub mod ranges;
pub mod rate;
pub mod resolve;
pub mod revocations;
pub mod rules;
pub mod scrub;
pub mod share;
pub mod span;
pub mod span_tree;
