//! Tests of the chunk store: the contract of every backend, and what the backends survive.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]
#![allow(clippy::single_range_in_vec_init, reason = "a file often holds exactly one range")]

mod check;
mod contract;
mod crash;
mod faults;
mod fixtures;
mod fs;
mod log_faults;
mod material;
mod porter;
mod s3;
mod s3_faults;
