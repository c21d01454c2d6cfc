//! Whole datacenters in one process: what `sluice dev`, `sluice demo` and the tests are made of.
//!
//! Contract:
//! 1. [`datacenter::Datacenter`] is the one place that knows how edge, sessions, worker, aggregator and chunk store
//!    fit together. A datacenter stops in order under a deadline, or is killed as by a power cut; either way it can be
//!    started again on the same ports and the same directory.
//! 2. [`cluster::Cluster`] is several of them with one [`ClusterMaterial`](sluice_node::material::ClusterMaterial).
//!    They share nothing but the process: between them are the same sockets, TLS and signatures as between machines.
//! 3. Ports are [reserved](ports::ReservedPort) before anything starts, so that everyone can be told where everyone
//!    is, and nobody takes a port while its datacenter is down.
//! 4. [`process::Process`] is an edge or a session service by itself, for datacenters of several processes.
//! 5. Whatever keeps a datacenter from starting is a [`datacenter::StartError`], which says what to do.

mod bucket;
pub mod cluster;
pub mod datacenter;
pub mod live;
pub mod place;
pub mod ports;
pub mod process;
mod shared;
mod volume;
pub mod ways;
