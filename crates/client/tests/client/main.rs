//! The client library against a stand-in for a cluster that breaks in every way it should survive.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

#[allow(dead_code, reason = "the command line's tests use more of it")]
mod fake;

mod download;
mod sent_on;
mod stream;
mod upload;
