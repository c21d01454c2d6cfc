//! Whole clusters, simulated: the rules hold, the same seed gives the same trace, and a broken rule is noticed.

#[path = "../simulation/mod.rs"]
mod simulation;

use simulation::{Scenario, run};
use sluice_engine::rules::{Rule, Rules};
use sluice_engine::share::Share;

const SEEDS: u64 = 200;

/// The first seed of this run: `SIMULATION_FROM`, or 0.
fn first_seed() -> u64 {
    #[expect(clippy::disallowed_methods, reason = "a test is told by its environment which seeds to run")]
    let from = std::env::var("SIMULATION_FROM");
    from.ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Every fourth world is about one share of sixteen.
fn share_of(seed: u64) -> Share {
    if seed % 4 == 3 { Share::new(seed as u32 / 4 % 16, 16).expect("one of them") } else { Share::WHOLE }
}

#[test]
fn the_rules_hold_and_a_seed_is_a_trace() {
    for seed in first_seed()..first_seed() + SEEDS {
        let scenario = Scenario { seed, rules: Rules::all(), trace: false, share: share_of(seed) };
        let first = run(scenario);
        if let Some(violation) = first.violation {
            panic!(
                "seed {seed}: {violation}\nreplay: cargo run --release -p sluice-engine --example simulate -- \
                 --seeds 1 --from {seed} --share {} --trace",
                share_of(seed)
            );
        }
        assert_eq!(first.digest, run(scenario).digest, "seed {seed} gave two traces");
    }
}

/// Runs worlds in which one rule is broken, until one of them shows it.
fn is_noticed(rule: Rule) {
    let broken = (0..2_000).find_map(|seed| {
        run(Scenario { seed, rules: Rules::without(rule), trace: false, share: Share::WHOLE })
            .violation
            .map(|violation| (seed, violation))
    });
    match broken {
        Some((seed, violation)) => println!("without {rule:?}, seed {seed}: {violation}"),
        None => panic!("2,000 worlds without {rule:?}, and nothing was noticed"),
    }
}

#[test]
fn freeing_without_confirmation_is_noticed() {
    is_noticed(Rule::ConfirmBeforeFree);
}

#[test]
fn counting_old_generations_is_noticed() {
    is_noticed(Rule::NewestGeneration);
}

#[test]
fn accepting_contradicting_spans_is_noticed() {
    is_noticed(Rule::OverlapsAgree);
}

#[test]
fn not_retracting_what_was_freed_is_noticed() {
    is_noticed(Rule::RetractFreed);
}

#[test]
fn not_revoking_again_after_a_restart_is_noticed() {
    is_noticed(Rule::RevokeAgain);
}

#[test]
fn freeing_to_a_lower_claim_is_noticed() {
    is_noticed(Rule::HigherClaim);
}

#[test]
fn not_exceeding_what_a_peer_has_seen_is_noticed() {
    is_noticed(Rule::ExceedSeen);
}

#[test]
fn not_claiming_again_what_was_lost_is_noticed() {
    is_noticed(Rule::ClaimAgain);
}
