//! The protocol as others see it: `docs/vectors.json`, and what an implementation of its own makes of it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod commands;
mod digests;
#[path = "../python/interpreter.rs"]
mod interpreter;
mod keys;
mod python;
mod records;
mod sessions;
mod shapes;
mod vectors;
