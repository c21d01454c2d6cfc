//! The HTTP and gRPC doors over real TLS: a real worker behind it, a store and slots in memory behind that.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod client;
#[path = "../../../worker/tests/memory/mod.rs"]
mod memory;

mod grpc;
mod grpc_hostile;
mod grpc_upload;
mod hostile;
mod refusals;
mod stopping;
mod use_cases;
