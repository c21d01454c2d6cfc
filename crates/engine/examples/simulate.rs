//! Runs any number of simulated worlds and ends with one line of figures.
//!
//! `cargo run --release -p sluice-engine --example simulate -- --seeds 1000 [--from 0] [--share 3/16] [--trace]`
//!
//! With `--trace` and one seed, prints the trace for a person to read. A violated rule prints the seed and ends with
//! exit code 1.

#[path = "../simulation/mod.rs"]
mod simulation;

use std::process::ExitCode;

use simulation::{Figures, Scenario, run};
use sluice_engine::rules::Rules;
use sluice_engine::share::Share;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (mut seeds, mut from, mut trace, mut share) = (200u64, 0u64, false, Share::WHOLE);
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let understood = match arg.as_str() {
            "--seeds" => args.next().and_then(|text| text.parse().ok()).map(|n| seeds = n),
            "--from" => args.next().and_then(|text| text.parse().ok()).map(|n| from = n),
            "--share" => args.next().and_then(|text| text.parse().ok()).map(|one| share = one),
            "--trace" => {
                trace = true;
                Some(())
            }
            _ => None,
        };
        if understood.is_none() {
            eprintln!("usage: simulate [--seeds N] [--from SEED] [--share 3/16] [--trace]");
            return ExitCode::from(2);
        }
    }
    let mut total = Figures::default();
    let mut broken = 0;
    for seed in from..from.saturating_add(seeds) {
        let outcome = run(Scenario { seed, rules: Rules::all(), trace, share });
        if trace {
            print!("{}", outcome.trace);
        }
        if let Some(violation) = outcome.violation {
            println!("seed {seed}: {violation}");
            broken += 1;
        }
        total.add(&outcome.figures);
    }
    let Figures { steps, commands, lost, doubled, crashes, disks_lost, restores, homes_lost, .. } = total;
    let Figures {
        takeovers,
        files,
        assembled,
        conflicts,
        dropped,
        freed,
        pages_out,
        pages_in,
        virtual_ms,
        ..
    } = total;
    println!(
        "{seeds} seeds from {from}: {broken} violations; {} h simulated in {steps} steps; {commands} commands \
         ({lost} lost, {doubled} doubled); {crashes} crashes, {disks_lost} disks lost, {restores} restored, \
         {homes_lost} datacenters lost for good; {files} files: {assembled} assembled, {conflicts} conflicts, \
         {dropped} dropped, {takeovers} taken over, {freed} copies freed, {pages_out} pages out and {pages_in} in",
        virtual_ms / 3_600_000
    );
    if broken == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
