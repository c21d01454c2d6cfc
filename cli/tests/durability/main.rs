//! What the binary promises of durability, tried on the binary: `sluice dev` in a process of its own, killed while
//! clients work, and what its clients were told compared with what is there afterwards.
//!
//! `kill` kills it on a sound disk; `power` has it on a disk that fails, which `mount` shows to it.
//!
//! The choice of actions follows from a seed, which is printed. `SLUICE_SEED` makes another choice, `SLUICE_KILLS` and
//! `SLUICE_CUTS` make a run longer or shorter. How far a life gets before its end is up to the machine.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on may panic")]

mod file;
mod kill;
mod mount;
mod power;
mod process;
mod run;
mod verify;
mod web;
mod work;

/// The seed of this run, and a line that says so.
fn seed(test: &str) -> u64 {
    let seed = number("SLUICE_SEED").unwrap_or(1);
    println!("{test}: SLUICE_SEED={seed}");
    seed
}

/// A number from the environment.
fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}
