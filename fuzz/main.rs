//! Bytes from anywhere, at every place that takes bytes: what is accepted is what was meant, what is not is refused
//! by its name, and nothing panics, hangs or grows.
//!
//! Inputs are the vectors of `docs/vectors.json` and other good examples, mangled; or nothing but noise. As tests they
//! are a few thousand random ones each; `FUZZ_TIMES=100` makes that a hundred times as many. A failure is printed with
//! its seed and the smallest input that shows it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

#[path = "../tests/cluster/bed.rs"]
#[allow(dead_code, reason = "a part of what tests of clusters stand on")]
mod bed;
mod codecs;
mod door;
mod mangle;
mod peer;
mod volume;
#[path = "../tests/cluster/wire.rs"]
#[allow(dead_code, reason = "the bed has a place for it")]
mod wire;

/// How many inputs a target tries.
fn times(count: usize) -> usize {
    let times = std::env::var("FUZZ_TIMES").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    count * times
}
