//! What every process of Sluice stands on: keys and certificates, TLS, access checks, budgets, telemetry, the admin
//! port, and an orderly end.
//!
//! Contract:
//! 1. Nothing here is global: what a datacenter needs is made for it and passed in, so that several datacenters run
//!    in one process. The exceptions are the TLS provider ([`tls::install_provider`]) and the log
//!    ([`telemetry::init`]), of which a process has one, and a buffer that each thread lends to its connections
//!    ([`secure`]).
//! 2. Time comes from a [`clock::Clock`], which tests may hold still.
//! 3. Every task is spawned on a [`shutdown::Shutdown`], which drains it under a deadline or ends it at once.
//! 4. Secrets are never printed: no `Debug` here shows one, and no error carries one.
//! 5. Services depend on this crate; it depends on none of them.

pub mod access;
pub mod admin;
pub mod budget;
pub mod clock;
pub mod descriptors;
pub mod listener;
pub mod material;
pub mod metrics;
pub mod rate;
pub mod role;
pub mod secure;
pub mod seldom;
pub mod shutdown;
pub mod strangers;
pub mod tcp;
pub mod telemetry;
pub mod tls;
pub mod token;
