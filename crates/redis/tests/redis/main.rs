//! Against a real `redis-server`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod connection;
mod lease;
mod members;
mod shared;
