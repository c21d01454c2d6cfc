//! What it costs to catch up after a cut: in proportion to what changed, not to what exists.

use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt};
use sluice_client::{Source, UploadOptions, WaitFor};

use crate::can_be_apart;
use crate::site::{Site, Traffic, eventually, nobody, noise};

/// Files that change during a cut, and during one in which much does.
const CHANGED: usize = 10;
const MANY_CHANGED: usize = 10 * CHANGED;

/// How long catching up may take at most. Most of that is until somebody dials again.
const SOON: Duration = Duration::from_secs(20);

/// Sends small files to a datacenter, each whole in one request, from the one of this number on.
fn send(site: &Site, dc: usize, from: usize, count: usize) {
    let client = site.client(&[dc]);
    let options = UploadOptions { wait: WaitFor::Assembled, ..UploadOptions::default() };
    let uploads = stream::iter(from..from + count).for_each_concurrent(8, |number| {
        let (client, options) = (&client, &options);
        async move {
            let source = Source::memory(noise(number as u64, 2_000));
            client.upload(&source, options, nobody()).await.unwrap();
        }
    });
    site.ask(uploads);
}

/// What it cost to catch up once.
struct Round {
    /// Files that existed before the cut.
    exist: usize,
    changed: usize,
    traffic: Traffic,
    /// From the end of the cut until both knew of all files.
    took: Duration,
}

/// Cuts, changes some files, heals, and waits until both know the same and say nothing more.
fn cut_and_catch_up(site: &Site, exist: usize, changed: usize) -> Round {
    site.network.cut(1, 2, true);
    site.network.cut(2, 1, true);
    site.linked(&[(1, 2)]);
    send(site, 1, exist, changed);
    assert_eq!((site.listed(1), site.listed(2)), (exist + changed, exist));
    let before = site.traffic();
    let began = Instant::now();
    site.network.cut(1, 2, false);
    site.network.cut(2, 1, false);
    eventually("the files that changed", || (site.listed(2) == exist + changed).then_some(()));
    let took = began.elapsed();
    let after = site.quiet();
    let traffic = Traffic { commands: after.commands - before.commands, bytes: after.bytes - before.bytes };
    Round { exist, changed, traffic, took }
}

#[test]
fn catching_up_after_a_cut_costs_what_changed_and_not_what_exists() {
    if !can_be_apart() {
        return;
    }
    let site = Site::new(2, "takeover_after = \"10min\"\nabsent_after = \"10min\"");
    site.start_all();
    send(&site, 1, 0, 100);
    eventually("100 files", || (site.listed(2) == 100).then_some(()));
    site.quiet();
    let first = cut_and_catch_up(&site, 100, CHANGED);
    send(&site, 1, 100 + CHANGED, 1_000 - 100 - CHANGED);
    eventually("1,000 files", || (site.listed(2) == 1_000).then_some(()));
    site.quiet();
    let second = cut_and_catch_up(&site, 1_000, CHANGED);
    let third = cut_and_catch_up(&site, 1_000 + CHANGED, MANY_CHANGED);
    println!("{:>7} {:>8} {:>9} {:>10} {:>8}", "existed", "changed", "commands", "bytes", "time");
    for Round { exist, changed, traffic: Traffic { commands, bytes }, took } in [&first, &second, &third] {
        println!("{exist:>7} {changed:>8} {commands:>9} {bytes:>10} {:>6.1} s", took.as_secs_f64());
        assert!(*took < SOON, "{changed} changes were known after {took:?}");
    }
    let [few, many, much] = [first, second, third].map(|round| round.traffic);
    // Ten times as many exist. What is compared grows with the logarithm, what is said with the changes.
    assert!(many.commands < 3 * few.commands, "{many:?} after {few:?}");
    assert!(many.commands < 1_000, "less than one command for each file that did not change: {many:?}");
    assert!(many.bytes < 3 * few.bytes, "{many:?} after {few:?}");
    // Ten times as many change. That costs up to ten times as much, and less the more of them are neighbours, with whom files are
    // said again that did not change.
    for (much, many) in [(much.commands, many.commands), (much.bytes, many.bytes)] {
        assert!(much < 12 * many, "{much} after {many}");
        assert!(much > 3 * many, "{much} after {many}: what is paid for is not what changed");
    }
    site.check_volumes();
}
