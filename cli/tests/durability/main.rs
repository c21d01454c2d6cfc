//! What the binary promises of durability, tried on the binary: `sluice dev` in a process of its own, killed while
//! clients work, and what its clients were told compared with what is there afterwards.
//!
//! The choice of actions follows from a seed, which is printed. `SLUICE_SEED` repeats a choice, `SLUICE_KILLS` makes a
//! run longer or shorter. How far a life gets before its end is up to the machine.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod file;
mod kill;
mod process;
mod verify;
mod web;
mod work;

/// The seed of this run, and a line that says so.
fn seed(test: &str) -> u64 {
    let given = std::env::var("SLUICE_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| uuid::Uuid::now_v7().as_u128() as u64 >> 1);
    println!("{test}: SLUICE_SEED={seed}");
    seed
}
