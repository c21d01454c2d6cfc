//! A deterministic simulation of 2 to 5 datacenters that run the very code of the engine.
//!
//! One seed gives one world: its files, clients, network and faults. The network loses, doubles, delays and reorders
//! commands; links are cut one way or both; processes crash between any two effects; disks are lost or restored
//! from an old copy; every process has its own clock; a home may be lost for good. After each step the world checks
//! what must always hold, and at the end that everything that can finish has finished. The same seed gives the same
//! trace, to the letter.
//!
//! `world.rs` runs the events, `disk.rs` is what survives a crash, `client.rs` uploads, `check.rs` judges.

#![allow(unreachable_pub, dead_code, unused_imports)] // Shared by a test and an example, which use different parts.

mod check;
mod client;
mod disk;
mod random;
mod world;

pub use world::{Figures, Outcome, Scenario, run};
