//! A real S3 server for tests, and a proxy before it that misbehaves. For tests only.
//!
//! [`Garage`] is a process of the server Garage with an empty bucket, on ports of loopback, which ends when it is dropped.
//! [`Proxy`] passes requests on to it, and does to each what the test says: loses the answer, lands it late, refuses, hangs,
//! shows old lists. The proxy's tasks end when it is dropped.

#![allow(clippy::unwrap_used, reason = "for tests: what cannot be set up should panic")]

mod garage;
mod proxy;

pub use garage::{Garage, Key};
pub use proxy::{Fault, Proxy, Seen};
