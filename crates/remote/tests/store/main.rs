//! A store in another process: the contract of every store, and what a tenure is worth.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]
#![allow(clippy::single_range_in_vec_init, reason = "a file often holds exactly one range")]

#[path = "../../../store/tests/store/contract.rs"]
mod contract;
#[path = "../../../store/tests/store/material.rs"]
#[allow(dead_code, reason = "other tests of the store need more of it")]
mod material;
mod place;
mod slots;
mod tenure;

use crate::place::Place;

contract::contract_tests! { Place::new() }
