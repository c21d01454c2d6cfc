//! Properties that hold for every input: what `simulation.rs` shows in running clusters, shown here piece by piece.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod agreement;
mod bytes;
mod cluster;
mod facts;
mod fixtures;
mod model;
mod pages;
mod placement;
mod records;
mod release;
mod scale;
mod sets;
mod telling;
mod tree;
mod world;
