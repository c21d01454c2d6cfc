//! The process is killed with -9 at random moments, hundreds of times.

use std::time::Duration;

use crate::process::{Dev, end};
use crate::run::Run;

#[test]
fn what_was_acknowledged_survives_hundreds_of_kills() {
    let kills = crate::number("SLUICE_KILLS").unwrap_or(200);
    let mut run = Run::new(crate::seed("kills"), "data");
    for life in 0..kills {
        // Some die before they serve anyone.
        if run.dice.one_in(10) {
            let mut child = Dev::spawn(run.home.path(), &run.data);
            std::thread::sleep(Duration::from_micros(run.dice.below(150_000)));
            end(&mut child);
            continue;
        }
        let answers = 1 + run.dice.below(30);
        let lived = run.begin().and_then(|begun| run.live(begun, answers, |_, dev| dev.kill()));
        lived.unwrap_or_else(|wrong| panic!("life {life}: {wrong}\n{}", run.said()));
        // What lies there between two lives is sound by itself.
        if run.dice.one_in(8) {
            run.sound().unwrap_or_else(|found| panic!("life {life}: {found}"));
        }
    }
    run.finish().unwrap_or_else(|wrong| panic!("at the end: {wrong}\n{}", run.said()));
    let counts = run.counts();
    println!("{kills} kills: {counts:?}");
    assert!(counts.unanswered > 0 && counts.assembled > 0, "{counts:?}");
    assert!(counts.provisional_chunks > 0 && counts.whole > 0, "{counts:?}");
}
