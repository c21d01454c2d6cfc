//! A deterministic simulation of 2 to 5 datacenters that run the very code of the engine.
//!
//! One seed gives one world: its files, clients, network and faults. The network loses, doubles, delays and reorders
//! commands, some of them for a minute; links are cut one way or both; processes crash between any two effects; what a
//! store did is reported late and out of order; disks are lost or restored from an old copy; peers say that somebody
//! spoke in our name, or that they hold what they do not; every process has its own clock; a home may be lost for good. After each step the world checks
//! what must always hold, and at the end that everything that can finish has finished. The same seed gives the same
//! trace, to the letter.
//!
//! `world.rs` runs the events, `network.rs` carries commands, `faults.rs` breaks things, `jobs.rs` is what takes a
//! while, `disk.rs` what survives a crash, `client.rs` and `uploads.rs` upload, `check.rs` judges.

#![allow(unreachable_pub, dead_code, unused_imports)] // Shared by a test and an example, which use different parts.

mod check;
mod client;
mod disk;
mod faults;
mod figures;
mod jobs;
mod network;
mod random;
mod uploads;
mod world;

pub use figures::Figures;
pub use world::{Outcome, Scenario, run};
